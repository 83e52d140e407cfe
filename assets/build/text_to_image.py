"""The text encoder and the U-Net, trained together from scratch on cached latents (v-prediction)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from assets.build.pictures import Picture
from assets.build.similarity import blurred, nearest
from assets.build.training import train
from assets.build.vae import LATENT_CHANNELS, encode_all

WIDTH = 192
EMPTY_CAPTION = 0.1  # classifier-free guidance needs an unconditional model
WELL_KNOWN = (
    "dog face", "rocket", "penguin", "guitar", "pizza", "red heart",
    "cat face", "sunflower", "automobile", "umbrella", "birthday cake", "robot",
)  # fmt: skip


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128, 256),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def assemble(vae: nn.Module, text_encoder: nn.Module, unet: nn.Module, tokenizer: CLIPTokenizer):
    """The four parts as a StableDiffusionPipeline."""
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=new_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sample(pipeline: StableDiffusionPipeline, prompts: Sequence[str], seed: int, steps: int = 20) -> np.ndarray:
    """One picture a prompt, each from its own seed. (N, 64, 64, 3) uint8."""
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[np.ndarray] = []
    for start in range(0, len(prompts), 50):
        batch = list(prompts[start : start + 50])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        drawn = pipeline(
            batch, height=64, width=64, num_inference_steps=steps, guidance_scale=3.0, generator=generators
        )
        pictures += [np.asarray(image) for image in drawn.images]
    return np.stack(pictures)


def caption(picture: Picture, rng: np.random.Generator) -> str:
    """The name, half of the time with one to three keywords; sometimes nothing."""
    if rng.random() < EMPTY_CAPTION:
        return ""
    if rng.random() < 0.6 or not picture.keywords:
        return picture.name
    count = min(len(picture.keywords), int(rng.integers(1, 4)))
    return ", ".join([picture.name, *rng.choice(picture.keywords, size=count, replace=False)])


def _drawn(step: int, batch: int, total: int, seed: int) -> list[int]:
    """The pictures of one step: every epoch is its own permutation."""
    indices = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, total)
        indices.append(int(_permutation(seed, epoch, total)[place]))
    return indices


_PERMUTATIONS: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(seed: int, epoch: int, total: int) -> np.ndarray:
    key = (seed, epoch, total)
    if key not in _PERMUTATIONS:
        _PERMUTATIONS.clear()
        _PERMUTATIONS[key] = np.random.default_rng((seed, epoch)).permutation(total)
    return _PERMUTATIONS[key]


def train_text_to_image(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    concepts: list[Picture],
    noto: list[Picture],
    work: Path,
    *,
    steps: int,
    batch: int = 64,
    seed: int = 0,
) -> nn.ModuleDict:
    """Returns {"unet", "text_encoder"}, averaged. Reports accuracy on captions as it goes."""
    torch.manual_seed(seed)
    modules = nn.ModuleDict({"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)})
    latents = encode_all(vae, np.stack([p.pixels for p in concepts])) * vae.config.scaling_factor
    alphas = new_scheduler().alphas_cumprod

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((seed, 1, step))
        drawn = _drawn(step, batch, len(concepts), seed)
        captions = [caption(concepts[i], rng) for i in drawn]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        x = latents[drawn]  # (B, C, 8, 8)
        noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
        strata = (rng.permutation(batch) + rng.random(batch)) / batch  # one timestep in each stratum
        t = torch.from_numpy((strata * 1000).astype(np.int64))
        a = alphas[t].view(-1, 1, 1, 1)
        noisy, velocity = a.sqrt() * x + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x
        hidden = modules["text_encoder"](ids).last_hidden_state  # (B, 32, 192)
        predicted = modules["unet"](noisy, t, hidden).sample
        # no min-SNR weights: they silence the noisy timesteps, where the words decide what is drawn
        return (predicted - velocity).square().mean()

    everything = blurred(np.stack([p.pixels for p in noto]))
    places = {p.name: i for i, p in enumerate(noto)}

    def report(step: int, ema: nn.Module) -> None:
        pipeline = assemble(vae, ema["text_encoder"], ema["unet"], tokenizer)
        names = [concepts[i].name for i in np.random.default_rng(1).choice(len(concepts), 24, replace=False)]
        found = nearest(blurred(sample(pipeline, names, seed=0)), everything)
        right = np.mean([places[name] == int(i) for name, i in zip(names, found, strict=True)])
        drawn = sample(pipeline, WELL_KNOWN, seed=0)
        Image.fromarray(drawn.reshape(2, 6, 64, 64, 3).transpose(0, 2, 1, 3, 4).reshape(128, 384, 3)).resize(
            (1536, 512), Image.Resampling.LANCZOS
        ).save(work / f"well_known_{step:05d}.png")
        print(f"text-to-image step {step}: {right:.0%} of 24 captions drew their own picture", flush=True)
        with (work / "text_to_image.jsonl").open("a") as log:
            log.write(json.dumps({"step": step, "right": right}) + "\n")

    return train(
        modules, loss, file=work / "text_to_image.pt", steps=steps, lr=1e-3, ema_decay=0.995, report=report, every=1000
    )  # type: ignore[return-value]
