"""Drawing as a job: pictures one after another, each written when it is done, on a base that stays loaded.

A picture's file name tells what it was made with, so that one which is there already is not drawn again: a grid
that was stopped goes on, and one with another column draws only that.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field

from studio.config import Group, ModelConfig, absolute
from studio.diffusion.samplers import check_sampler
from studio.errors import ConfigError
from studio.jobs.result import Result, save_result
from studio.runs import Run
from studio.workspace import Workspace

if TYPE_CHECKING:
    from PIL import Image

    from studio.diffusion.generate import Progress
    from studio.diffusion.lora import AppliedLora
    from studio.families.base import DiffusionFamily, Models

CHUNK = "studio"
"""The text chunk of a PNG that holds its `DrawConfig` as JSON, complete where A1111's "parameters" are not. It names
files below the workspace, and of others nothing but the name."""


def _known_sampler(name: str) -> str:
    check_sampler(name)
    return name


class AdapterUse(Group):
    """An adapter, and how strongly it acts."""

    source: Annotated[str, AfterValidator(absolute)] = Field(min_length=1)
    """A .safetensors file, a peft folder or a hub id."""
    strength: float = Field(1.0, ge=-10, le=10)
    """1 is as trained, 0 is off, below 0 inverts."""
    blocks: dict[str, float] = {}
    """Further factors of some layers, by role, block or layer: {"*up_blocks.1*": 0.5}."""


class DrawRequest(Group):
    """What to draw, and with which adapters."""

    prompt: str = ""
    """What to draw; (word:1.2) weighs a word."""
    negative_prompt: str = ""
    """What to keep out of the picture."""
    adapters: list[AdapterUse] = []
    """The adapters that act."""
    seed: int = Field(0, ge=0)
    """The same seed gives the same picture; the next pictures add 1."""
    count: int = Field(1, ge=1, le=1000)
    """Pictures to draw."""
    steps: int = Field(25, ge=1, le=1000)
    """Sampler steps; more take longer and change less and less."""
    guidance: float = Field(7.0, ge=0, le=50)
    """How closely to follow the prompt; 1 is no guidance."""
    sampler: Annotated[str, AfterValidator(_known_sampler)] = "DPM++ 2M"
    """Sampler, by A1111's name."""
    width: int | None = Field(None, ge=8, le=8192)
    """Pixels; without a value, the base's own size."""
    height: int | None = Field(None, ge=8, le=8192)
    """Pixels; without a value, the base's own size."""
    clip_skip: int = Field(0, ge=0, le=30)
    """Last text encoder layers to leave out."""
    image: Annotated[str, AfterValidator(absolute)] = ""
    """A picture to start from; empty: from noise alone."""
    denoising: float = Field(0.75, gt=0, le=1)
    """How much of `image` may change: near 0 hardly anything, 1 everything."""


class DrawConfig(Group):
    """The settings of a drawing job."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    requests: list[DrawRequest] = Field(min_length=1)
    """What to draw, one after another."""

    def files(self, workspace: Workspace) -> list[Path]:
        """Where each picture of `pictures` is, or will be."""
        return [workspace.pictures / self.name(picture) for picture in self.pictures()]

    def pictures(self) -> list[DrawRequest]:
        """One request for each picture."""
        return [
            request.model_copy(update={"seed": request.seed + place, "count": 1})
            for request in self.requests
            for place in range(request.count)
        ]

    def name(self, picture: DrawRequest) -> str:
        """The file name of a picture: its prompt and seed, and a hash of all that it is made with."""
        sources = [self.model.source, picture.image, *(use.source for use in picture.adapters)]
        facts = [self.model.model_dump(), picture.model_dump(), *map(_version, sources)]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        slug = re.sub(r"[^a-z0-9]+", "-", picture.prompt.lower())[:40].strip("-") or "picture"
        return f"{slug}-{picture.seed}-{digest[:12]}.png"


def read_picture(file: Path, workspace: Workspace) -> DrawConfig | None:
    """The settings of a picture that a drawing job made; None for others, and where another version wrote them."""
    from PIL import Image

    with Image.open(file) as image:
        text = image.info.get(CHUNK)
    try:
        return _with_sources(DrawConfig.model_validate_json(text), workspace.inside) if text else None
    except ValueError:
        return None


def _with_sources(config: DrawConfig, change: Callable[[str], str]) -> DrawConfig:
    """A config of one picture, with other names for all files in it."""
    (picture,) = config.requests
    uses = [use.model_copy(update={"source": change(use.source)}) for use in picture.adapters]
    changed = picture.model_copy(update={"adapters": uses, "image": change(picture.image)})
    model = config.model
    names = {"source": change(model.source), "config": change(model.config)}
    return config.model_copy(update={"model": model.model_copy(update=names), "requests": [changed]})


class _Stopped(Exception):
    """A stop was asked for in the middle of a picture."""


def draw(config: DrawConfig, run: Run) -> Result:
    """Draws every picture that is not there yet; a stop ends it at once and keeps the finished ones."""
    workspace = Workspace(run.folder.parent.parent).create()
    pictures = config.pictures()
    for picture in pictures:
        if picture.image and not Path(picture.image).resolve().is_relative_to(workspace.root):
            raise ConfigError(f"'{picture.image}' is outside the workspace '{workspace.root}': upload it first")
    run.update_status(total=sum(picture.steps for picture in pictures), step=0, message="loading the base")
    made = Result([])
    artist = _Artist(*_base(config.model))
    try:
        for picture, file in zip(pictures, config.files(workspace), strict=True):
            run.update_status(message=picture.prompt)
            if not file.exists():
                told = _with_sources(config.model_copy(update={"requests": [picture]}), workspace.outside)
                artist.draw(picture, file, {CHUNK: told.model_dump_json()}, _progress(run, picture.steps))
            made.files.append(file)
            save_result(run.folder, made)
            run.update_status(step=sum(one.steps for one in pictures[: len(made.files)]))
    except _Stopped:
        pass  # the run knows
    finally:
        artist.take_off()
    return made


def _progress(run: Run, steps: int) -> Progress:
    before = run.status.step

    def progress(done: int, total: int) -> None:  # samplers of second order take nearly two passes a step
        if run.should("stop"):
            raise _Stopped
        run.update_status(step=before + min(steps * done // total, steps - 1))

    return progress


class _Artist:
    """A base that wears the adapters of the last picture, for as long as the next one has the same."""

    def __init__(self, family: DiffusionFamily, models: Models) -> None:
        self.family, self.models = family, models
        self._worn: list[AdapterUse] = []
        self._applied: list[AppliedLora] = []

    def draw(self, picture: DrawRequest, file: Path, chunks: dict[str, str], progress: Progress) -> None:
        """Draws one picture, and writes it whole or not at all."""
        from studio.diffusion.generate import GenerateRequest, generate
        from studio.diffusion.lora import check_mentioned
        from studio.diffusion.metadata import save_png

        request = GenerateRequest(**picture.model_dump(exclude={"adapters", "count", "image", "denoising"}))
        applied = self._put_on(picture.adapters)
        check_mentioned(applied, [request.prompt, request.negative_prompt])
        start = (_opened(picture.image), picture.denoising) if picture.image else None
        (image,) = generate(self.family, self.models, request, progress, start)
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        base = Path(self.models.source).name.removesuffix(".safetensors")
        save_png(image, part, request, applied, model=base, chunks=chunks)
        os.replace(part, file)

    def take_off(self) -> None:
        """Makes the models what they were."""
        from studio.diffusion.lora import take_off

        take_off(self.models, self._applied)
        self._worn, self._applied = [], []

    def _put_on(self, uses: list[AdapterUse]) -> list[AppliedLora]:
        from studio.adapters.targets import select
        from studio.diffusion.lora import apply_loras

        if uses == self._worn:
            return self._applied
        self.take_off()
        active = [use for use in uses if use.strength]
        self._applied = apply_loras(self.family, self.models, [(use.source, use.strength) for use in active])
        self._worn = uses
        for lora, use in zip(self._applied, active, strict=True):
            factors: dict[str, float] = {}
            for pattern, factor in use.blocks.items():
                factors |= dict.fromkeys(select(pattern, lora.adapters.names, self.family.roles), factor)
            if factors:
                lora.adapters.set_strength(use.strength, factors)
        return self._applied


_loaded: dict[ModelConfig, tuple[DiffusionFamily, Models]] = {}
"""The base of the last drawing job of this process."""


def _base(model: ModelConfig) -> tuple[DiffusionFamily, Models]:
    """A base on the best device, loaded if it is not the last one."""
    from studio.devices import best_device, precision_dtype
    from studio.families.loading import load_base

    if model not in _loaded:
        _loaded.clear()
        gc.collect()  # two bases may not fit
        device = best_device()
        dtype = precision_dtype(model.precision, device)
        family, models = load_base(model.source, dtype, model.config or None, model.prediction_type)
        for part in models.parts.values():
            part.to(device)
        _loaded[model] = family, models
    return _loaded[model]


def _opened(file: str) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file).convert("RGB")
    except (OSError, UnidentifiedImageError) as problem:
        raise ConfigError(f"cannot read the picture '{file}' to start from: {problem}") from problem


def _version(source: str) -> str:
    """What tells the versions of a file apart."""
    try:
        facts = Path(source).stat()
    except OSError:
        return source
    return f"{source} {facts.st_size} {facts.st_mtime_ns}"
