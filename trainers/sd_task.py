"""The diffusion task: a batch of pictures to a loss for each, and sample pictures along the way."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from studio import paths
from studio.adapters import AdapterPlan, inject, match_targets
from studio.config import TrainSDConfig
from studio.data.buckets import Size, assign_buckets, bucket_batches, bucket_report
from studio.data.cache import TensorCache
from studio.data.images import ImageFolder, ImageItem
from studio.diffusion.encoded import EncodedImages, EncodedPrompts
from studio.diffusion.generate import GenerateRequest, generate
from studio.diffusion.objective import Objective
from studio.diffusion.prompts import plain
from studio.diffusion.sheets import sheet
from studio.errors import ConfigError
from studio.families.base import Conditioning, DiffusionFamily, Models
from studio.formats import check_layers, write_adapter
from studio.formats.state import AdapterState
from studio.runs import Run
from studio.seeds import sample_generator, seed_of
from trainers.adapter_settings import adapter_settings, rank_schedule
from trainers.sd_metadata import training_metadata
from trainers.task import Task

SHEET_COLUMNS = 6


@dataclass(frozen=True)
class Sample:
    """A picture in its bucket (width, height), at its place in the batch."""

    item: ImageItem
    size: Size
    place: int


def adapter_plan(config: TrainSDConfig, family: DiffusionFamily, models: Models) -> AdapterPlan:
    """The layers and settings that the config asks for.

    Raises ConfigError where a target matches nothing, or a text encoder's rate has no text encoder to act on.
    """
    adapter, rate = config.adapter, config.optimizer.text_encoder_lr
    targets = tuple(adapter.targets) or family.default_targets
    if adapter.train_text_encoder:
        targets += ("text-encoder",)
    settings, overrides = adapter_settings(adapter, config.train.steps)
    plan = AdapterPlan(targets, tuple(adapter.exclude), settings, overrides)
    if rate is None:
        return plan
    if not any(name.startswith("text_encoder") for name in match_targets(family.prefixes(models), plan, family.roles)):
        raise ConfigError(
            f"optimizer.text_encoder_lr is {rate:g}, but no text encoder is adapted: add --train-text-encoder, "
            "or leave the rate out"
        )
    return replace(plan, overrides={"text_encoder*": {"lr": rate}, **overrides})  # first: the user's own win


class DiffusionTask(Task[Sample]):
    """Trains adapters on a frozen diffusion base."""

    def __init__(self, config: TrainSDConfig, family: DiffusionFamily, models: Models, images: ImageFolder) -> None:
        super().__init__()
        self.config, self.family, self.models, self.images = config, family, models, images
        data = config.data
        self.buckets = assign_buckets(images.items, data.resolution, data.bucket_step, data.max_aspect)
        self.objective = Objective(models.scheduler)
        self.parts = nn.ModuleDict(models.parts).requires_grad_(False).eval()
        self.adapters = inject(
            family.prefixes(models), adapter_plan(config, family, models), family.roles, config.train.seed
        )
        self.rank_schedule = rank_schedule(config.adapter, config.train.seed)
        exported = {name: adapter.export() for name, adapter in self.adapters.items()}
        check_layers(exported, family.name, config.output.format)
        self.trains_text = any(not name.startswith("unet.") for name in self.adapters.names)
        cache = TensorCache(paths.cache())
        self._images = EncodedImages(family, models, cache)
        self._prompts = EncodedPrompts(family, models, cache)
        if config.train.gradient_checkpointing:
            self._checkpoint_activations()

    def _checkpoint_activations(self) -> None:
        self.parts["unet"].enable_gradient_checkpointing()
        for name, part in self.parts.items():
            if name.startswith("text_encoder") and self.trains_text:
                part.gradient_checkpointing_enable({"use_reentrant": False})
                part.train()  # transformers recomputes in training mode only; CLIP has no dropout

    # -- batches ------------------------------------------------------------------------------

    def batches(self, epoch: int, batch_size: int) -> list[list[Sample]]:
        sizes = {id(item): size for size, items in self.buckets.items() for item in items}
        drawn = bucket_batches(self.buckets, batch_size, self.config.train.seed, epoch)
        return [[Sample(item, sizes[id(item)], place) for place, item in enumerate(batch)] for batch in drawn]

    def encode_all(self, run: Run) -> None:
        """Fills the cache before the first step, so that training never waits and bad files show now."""
        flips = (False, True) if self.config.data.flip else (False,)
        todo = [(item, size, flip) for size, items in self.buckets.items() for item in items for flip in flips]
        for done, (item, size, flip) in enumerate(todo, start=1):
            self._images.get(item, size, flip)
            if not self.trains_text and not self.config.data.shuffle_captions:
                self._prompts.get([item.caption])
            run.update_status(message=f"encoding pictures ({done}/{len(todo)})")
            if run.should("stop"):
                break

    def _caption(self, sample: Sample, step: int) -> str:
        """The caption of this step: perhaps dropped, perhaps with its parts in another order."""
        generator = sample_generator(self.config.train.seed, sample.item.id, step, sample.place, "caption")
        if torch.rand((), generator=generator) < self.config.loss.caption_dropout:
            return ""
        if not self.config.data.shuffle_captions:
            return sample.item.caption
        parts = [part.strip() for part in sample.item.caption.split(",")]
        return ", ".join(parts[i] for i in torch.randperm(len(parts), generator=generator).tolist())

    def _flipped(self, sample: Sample, step: int) -> bool:
        return self.config.data.flip and bool(self._key(sample, step, "flip") & 1)

    def _key(self, sample: Sample, step: int, purpose: str) -> int:
        return seed_of(self.config.train.seed, sample.item.id, step, sample.place, purpose)

    # -- loss ---------------------------------------------------------------------------------

    def forward(self, items: list[Sample], step: int) -> Tensor:
        unet = self.parts["unet"]
        encoded = [self._images.get(sample.item, sample.size, self._flipped(sample, step)) for sample in items]
        generators = [
            sample_generator(self.config.train.seed, sample.item.id, step, sample.place, "noise") for sample in items
        ]
        latents = torch.stack([one.latents for one in encoded])  # (B, C, h, w)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        timesteps = self.objective.sample_timesteps(generators).to(unet.device)
        latents, noise = latents.to(unet.device), noise.to(unet.device)
        self.adapters.set_keys([self._key(sample, step, "dropout") for sample in items])
        noisy = self.objective.add_noise(latents, noise, timesteps).to(unet.dtype)
        sizes = torch.stack([one.sizes for one in encoded]).to(unet.device)
        conditioning = self._conditioning([self._caption(sample, step) for sample in items])
        prediction = self.family.denoise(self.models, noisy, timesteps, conditioning, sizes)
        target = self.objective.target(latents, noise, timesteps)
        error = (prediction.float() - target).square().mean(dim=(1, 2, 3))  # (B,)
        return error * self.objective.weight(timesteps, self.config.loss.min_snr_gamma)

    def _conditioning(self, captions: list[str]) -> Conditioning:
        if self.trains_text:
            return self.family.encode_prompt(self.models, captions)
        stored = self._prompts.get(captions, keep=not self.config.data.shuffle_captions)
        unet = self.parts["unet"]
        pooled = None if stored.pooled is None else stored.pooled.to(unet.device, unet.dtype)
        return Conditioning(stored.encoder_hidden_states.to(unet.device, unet.dtype), pooled)

    # -- pictures and files -------------------------------------------------------------------

    def preview_prompts(self) -> list[str]:
        """The configured prompts, or the first four different captions of the dataset, taken literally."""
        captions = list(dict.fromkeys(item.caption for item in self.images.items if item.caption))
        return list(self.config.samples.prompts) or [plain(caption) for caption in captions[:4]] or [""]

    def preview(self, run: Run, step: int) -> None:
        """Draws every preview prompt at its own fixed seed into `samples/step-000123/`, all or none."""
        folder = run.samples / f"step-{step:06d}"
        if folder.exists():
            return
        partial = run.samples / ".part"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed while it drew
        partial.mkdir(parents=True)
        for place, prompt in enumerate(self.preview_prompts()):
            self.draw(prompt, place).save(partial / f"{place:02d}.png")
            if run.should("stop") and step < self.config.train.steps:
                return
        partial.rename(folder)

    def draw(self, prompt: str, place: int, steps: int | None = None) -> Image.Image:
        """A sample picture in the settings of the config, of its place's seed; `steps` are the sampler's."""
        samples, side = self.config.samples, self.config.data.resolution
        request = GenerateRequest(
            prompt,
            seed=samples.seed + place,
            steps=steps or samples.steps,
            guidance=samples.guidance,
            width=side,
            height=side,
        )
        return generate(self.family, self.models, request)[0]

    def before_after(self, run: Run) -> Path:
        """The sheet of base and adapter, prompt by prompt at the same seeds, with up to four steps between."""
        folders = _spread(sorted(run.samples.glob("step-*")), SHEET_COLUMNS)
        columns = ["base" if folder.name.endswith("-000000") else f"step {int(folder.name[5:])}" for folder in folders]
        rows = []
        for place, prompt in enumerate(self.preview_prompts()):
            pictures = [Image.open(folder / f"{place:02d}.png") for folder in folders]
            rows.append((prompt, pictures))
        path = run.folder / "before_after.png"
        sheet(rows, columns, title=self.config.output.name).save(path)
        return path

    def state(self, step: int, picture: Path | None = None) -> AdapterState:
        """The adapters with the metadata of this run, and a sample `picture` as their thumbnail."""
        metadata = training_metadata(self.config, self.family, self.models, self.images, step, picture)
        return AdapterState(self.family.name, self.adapters.state(), metadata)

    def save(self, path: Path, step: int, picture: Path | None = None) -> Path:
        return write_adapter(self.state(step, picture), path, self.config.output.format)

    def describe(self) -> str:
        """Layers, parameters and buckets, as lines for the log."""
        count = sum(parameter.numel() for parameter in self.adapters.parameters())
        layers = Counter(f"{one.config.method} of rank {one.config.rank}" for _, one in self.adapters.items())
        named = ", ".join(f"{name} on {number} layers" for name, number in layers.items())
        return f"{named}; {count:,} parameters\n{bucket_report(self.buckets)}"


def _spread(things: list[Path], count: int) -> list[Path]:
    """At most `count` of `things`, evenly spread, with the first and the last."""
    if len(things) <= count:
        return things
    return [things[round(place * (len(things) - 1) / (count - 1))] for place in range(count)]
