"""Pictures and the settings that they tell, our own and A1111's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from studio.diffusion.samplers import SAMPLERS
from studio.errors import ConfigError
from studio.jobs.draw import DrawConfig, read_picture
from studio.ui.drawing import Use, named_adapter, use
from studio.workspace import Workspace


@dataclass(frozen=True)
class Restored:
    """The settings of a picture: `values` by name of a `DrawRequest`, and what of them could not be had."""

    base: str | None
    uses: list[Use]
    values: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def restore(workspace: Workspace, file: Path) -> Restored:
    """The settings that a picture tells, ours or A1111's. Raises ConfigError for one that tells none."""
    from PIL import UnidentifiedImageError

    from studio.diffusion.metadata import read_parameters

    try:
        told = read_picture(file, workspace)
        parameters = {} if told else read_parameters(file)
    except (OSError, UnidentifiedImageError) as problem:
        raise ConfigError(f"'{file.name}' is no picture: {problem}") from problem
    if told:
        return _of_ours(workspace, told)
    if not parameters:
        raise ConfigError(f"'{file.name}' does not say how it was made: other tools may have removed it")
    return _of_parameters(workspace, parameters)


def _of_ours(workspace: Workspace, told: DrawConfig) -> Restored:
    (picture,) = told.requests
    uses, notes = [], []
    for one in picture.adapters:
        source = one.source if Path(one.source).exists() else named_adapter(workspace, Path(one.source).stem)
        if source:
            uses.append({**use(workspace, source, one.strength), "blocks": dict(one.blocks)})
        else:
            notes.append(f"the adapter {Path(one.source).name} is not in this workspace")
    values = picture.model_dump(exclude={"adapters"})
    values["image"] = workspace.outside(picture.image)
    if values["image"] and not Path(picture.image).exists():
        notes.append(f"the picture {values['image']} that it starts from is not in this workspace")
        values["image"] = ""
    return Restored(workspace.outside(told.model.source), uses, values, notes)


_NUMBERS = {"Steps": ("steps", int), "CFG scale": ("guidance", float), "Seed": ("seed", int)}


def _of_parameters(workspace: Workspace, parameters: Mapping[str, str]) -> Restored:
    """A1111's text names no files: adapters are found by their names, and the base stays what it is."""
    from studio.diffusion.prompts import extract_loras

    prompt, named = extract_loras(parameters["Prompt"])
    values: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": parameters["Negative prompt"],
        "count": 1,
        "image": "",
    }
    uses, notes = [], []
    for name, strength in named:
        source = named_adapter(workspace, name)
        if source:
            uses.append(use(workspace, source, strength))
        else:
            notes.append(f"the adapter {name} is not in this workspace")
    for key, (name, kind) in _NUMBERS.items():
        try:
            values[name] = kind(parameters[key])
        except (KeyError, ValueError):
            notes.append(f"it has no {key.lower()}")
    sampler, schedule = parameters.get("Sampler", ""), parameters.get("Schedule type", "")
    names = [name for name in (f"{sampler} {schedule}", sampler) if name in SAMPLERS]
    if names:
        values["sampler"] = names[0]
    else:
        notes.append(f"its sampler {sampler or '(none)'} is not one of ours")
    if size := re.fullmatch(r"(\d+)x(\d+)", parameters.get("Size", "")):
        values |= {"width": int(size[1]), "height": int(size[2])}
    skipped = parameters.get("Clip skip", "1")
    values["clip_skip"] = max(int(skipped) - 1, 0) if skipped.isdigit() else 0  # A1111 counts from 1
    return Restored(None, uses, values, notes)


def history(workspace: Workspace, most: int) -> list[tuple[Path, str]]:
    """The pictures, the newest first, each with how it was made."""
    files = sorted(workspace.pictures.glob("[!.]*.png"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    return [(file, _told(file, file.stat().st_mtime_ns)) for file in files[:most]]


@lru_cache(maxsize=1024)
def _told(file: Path, changed: int) -> str:
    from studio.diffusion.metadata import read_parameters

    try:
        told = read_parameters(file)
    except OSError:
        return "not readable"
    keys = ("Seed", "Steps", "Sampler", "CFG scale")
    return ", ".join([told.get("Prompt", file.stem), *(f"{key.lower()} {told[key]}" for key in keys if key in told)])
