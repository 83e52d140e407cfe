"""Pictures from prompts: classifier-free guidance over any diffusers scheduler, for every family.

The loop is ours, not a diffusers pipeline's, because adapters sit beside the modules, prompts carry
weights and any length, and one loop serves every family through `DiffusionFamily.denoise`. For a
plain prompt it gives the pipelines' pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from studio.diffusion.prompts import encode_prompts, extract_loras
from studio.diffusion.samplers import check_sampler, make_scheduler
from studio.errors import ConfigError
from studio.families.base import Conditioning, DiffusionFamily, Models, vae_factor

if TYPE_CHECKING:
    from PIL import Image

Progress = Callable[[int, int], None]
"""Called after each denoising step with (steps done, steps in all)."""

Start = tuple["Image.Image", float]
"""An RGB picture to start from, and the share of the steps, in (0, 1], that may change it."""


@dataclass(frozen=True)
class GenerateRequest:
    """What to draw. Raises ConfigError for values out of range.

    `prompt` has no `<lora:...>` tags any more: `studio.diffusion.lora.wanted_loras` takes them out.
    Picture i of `batch` has the seed `seed + i` and does not depend on the others. `guidance` 1 or
    less turns the negative prompt off. `width` and `height` are pixels, None for the base's own
    size. `clip_skip` counts the last text encoder layers left out, 0 for none.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = 7.0
    sampler: str = "DPM++ 2M"
    width: int | None = None
    height: int | None = None
    clip_skip: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        check_sampler(self.sampler)
        least = {"seed": 0, "steps": 1, "guidance": 0, "clip_skip": 0, "batch": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {minimum} or more")
        if self.seed + self.batch > 1 << 63:
            raise ConfigError(f"seed is {self.seed}; it must be below 2^63")
        for name in ("prompt", "negative_prompt"):
            if extract_loras(getattr(self, name))[1]:
                raise ConfigError(f"a <lora:...> tag in the {name.replace('_', ' ')} would have no effect here")


@torch.no_grad()
def generate(
    family: DiffusionFamily,
    models: Models,
    request: GenerateRequest,
    progress: Progress | None = None,
    start: Start | None = None,
) -> list[Image.Image]:
    """Draws `request.batch` RGB pictures with whatever adapters are attached to the models.

    The noise of a picture is drawn on the CPU from its own seed, as A1111's CPU noise and diffusers'
    generators are. With `start`, its picture, cut to the size, is noised and denoised for the last share of the
    steps only (arXiv:2108.01073). Raises ConfigError for a size the VAE cannot make.
    """
    width, height = picture_size(models, request)
    generators = [torch.Generator().manual_seed(request.seed + place) for place in range(request.batch)]
    conditioning = _conditioning(family, models, request)
    factor, channels = vae_factor(models), models.parts["vae"].config.latent_channels
    shape = (1, channels, height // factor, width // factor)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    begin = None if start is None else (_encoded(family, models, start[0], (width, height)), start[1])
    latents = _denoise(family, models, request, noise, conditioning, generators, (width, height), progress, begin)
    return [_image(pixels) for pixels in family.decode(models, latents)]


def picture_size(models: Models, request: GenerateRequest) -> tuple[int, int]:
    """(width, height) in pixels, the base's own where the request leaves them open.

    Raises ConfigError, with the nearest size that works, for one that is no multiple of the VAE's factor.
    """
    factor = vae_factor(models)
    native = models.parts["unet"].config.sample_size * factor
    sizes = []
    for name in ("width", "height"):
        asked = getattr(request, name)
        size = native if asked is None else asked
        if size < factor or size % factor:
            fitting = max(factor, round(size / factor) * factor)
            raise ConfigError(f"{name} is {size}; it must be a multiple of {factor}, such as {fitting}")
        sizes.append(size)
    return sizes[0], sizes[1]


def _conditioning(family: DiffusionFamily, models: Models, request: GenerateRequest) -> Conditioning:
    """Conditioning of the whole batch: with guidance (2B, ...), negative prompts first."""
    guided = request.guidance > 1
    prompts = [request.negative_prompt, request.prompt] if guided else [request.prompt]
    encoded = encode_prompts(family, models, prompts, request.clip_skip)
    hidden, pooled = encoded.encoder_hidden_states, encoded.pooled
    if guided and not request.negative_prompt.strip() and models.info.get("force_zeros_for_empty_prompt"):
        # SDXL was trained with zeros, not with the encoding of "", for pictures without a caption
        hidden[0] = 0
        if pooled is not None:
            pooled[0] = 0
    rows = request.batch
    return Conditioning(
        hidden.repeat_interleave(rows, dim=0), None if pooled is None else pooled.repeat_interleave(rows, dim=0)
    )


def _denoise(
    family: DiffusionFamily,
    models: Models,
    request: GenerateRequest,
    noise: Tensor,
    conditioning: Conditioning,
    generators: list[torch.Generator],
    size: tuple[int, int],
    progress: Progress | None,
    begin: tuple[Tensor, float] | None,
) -> Tensor:
    """Scaled latents, shape of `noise` (B, C, h, w); guidance as in arXiv:2207.12598. `begin` is the start's latents
    (1, C, h, w) and its share of the steps."""
    hidden = conditioning.encoder_hidden_states
    scheduler = make_scheduler(request.sampler, models.scheduler)
    scheduler.set_timesteps(request.steps, device=hidden.device)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generators} if takes_generator else {}
    width, height = size
    sizes = torch.tensor([[height, width, 0, 0, height, width]], device=hidden.device).repeat(len(hidden), 1)
    timesteps, latents = _start(scheduler, request.steps, noise.to(hidden.device), begin)
    for done, timestep in enumerate(timesteps, start=1):
        noisy = torch.cat([latents] * (len(hidden) // len(latents)))
        noisy = scheduler.scale_model_input(noisy, timestep).to(hidden.dtype)
        prediction = family.denoise(models, noisy, timestep.expand(len(noisy)), conditioning, sizes).float()
        if len(noisy) > len(latents):
            negative, positive = prediction.chunk(2)
            prediction = negative + request.guidance * (positive - negative)
        latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
        if progress is not None:
            progress(done, len(timesteps))
    return latents.to(hidden.dtype)


def _start(scheduler: Any, steps: int, noise: Tensor, begin: tuple[Tensor, float] | None) -> tuple[Tensor, Tensor]:
    """(the timesteps to go, the noisy latents of the first), shape of `noise` (B, C, h, w)."""
    if begin is None:
        return scheduler.timesteps, noise * scheduler.init_noise_sigma
    latents, share = begin
    first = (steps - max(1, int(steps * share))) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):  # those that count their steps
        scheduler.set_begin_index(first)
    timesteps = scheduler.timesteps[first:]
    return timesteps, scheduler.add_noise(latents.to(noise).expand_as(noise), noise, timesteps[:1].expand(len(noise)))


def _encoded(family: DiffusionFamily, models: Models, image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Scaled latents (1, C, h, w) of a picture, its middle cut out at `size`."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)
    levels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).reshape(size[1], size[0], 3)
    pixels = levels.permute(2, 0, 1)[None].float() / 127.5 - 1  # (1, 3, H, W)
    return family.encode_image(models, pixels)


def _image(pixels: Tensor) -> Image.Image:
    """An RGB picture of `pixels` (3, H, W) in [-1, 1]; values outside are clipped."""
    from PIL import Image

    levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
