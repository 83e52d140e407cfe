"""The settings of a training, goal first: a goal and a base name a preset, and only what matters is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from studio.config import TrainSDConfig
from studio.errors import ConfigError
from studio.settings import explain, fields, presets
from studio.ui import form

Values = dict[str, Any]  # dotted key -> setting


@dataclass(frozen=True)
class Goal:
    """What somebody wants, in words; `keys` are the settings that matter for it beyond `COMMON`."""

    title: str
    advice: str
    keys: tuple[str, ...] = ()


GOALS = {
    "style": Goal(
        "A style",
        "20 to 100 pictures in the style. Captions say what is shown, not how: the style is what they leave out.",
        ("loss.caption_dropout",),
    ),
    "character": Goal(
        "A character",
        "10 to 40 pictures of one character, in many poses and places. Every caption begins with its trigger word.",
        ("adapter.train_text_encoder", "data.flip"),
    ),
    "object": Goal(
        "An object",
        "5 to 30 pictures of one thing, from all sides, in several places. Every caption begins with its trigger word.",
        ("adapter.train_text_encoder", "data.flip"),
    ),
    "face": Goal(
        "A face",
        "10 to 30 pictures of one person, in several lights, close and far. Every caption begins with a trigger word.",
        ("adapter.train_text_encoder",),
    ),
}
BASES = {
    "Built-in: 64 pixels, needs no GPU": "builtin",
    "Stable Diffusion 1.5: 512 pixels": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "SDXL: 1024 pixels, 12 GB of GPU": "stabilityai/stable-diffusion-xl-base-1.0",
}
"""What the user reads -> `model.source`; any other hub id, folder or file can be typed."""

COMMON = ("train.steps", "optimizer.lr", "adapter.rank", "data.resolution", "train.batch_size", "samples.prompts")
ELSEWHERE = ("data.folder", "output.folder", "output.name")  # the dataset, the workspace and its name decide them
CONTENT = ("samples.prompts",)  # what a change of the preset leaves as it is
LABELS = {
    "model.source": "Base",
    "train.steps": "Steps",
    "optimizer.lr": "Learning rate",
    "adapter.rank": "Rank",
    "data.resolution": "Resolution",
    "train.batch_size": "Batch size",
    "samples.prompts": "Sample prompts",
    "adapter.train_text_encoder": "Train the text encoder",
    "data.flip": "Mirror",
    "loss.caption_dropout": "Caption dropout",
}
MATTERS, CHANGED, ALL = "What matters", "Changed", "All settings"


def form_keys() -> list[str]:
    """The settings of the form: those that matter first, the rest by group."""
    first = list(dict.fromkeys([*COMMON, *(key for goal in GOALS.values() for key in goal.keys)]))
    rest = [key for key in fields(TrainSDConfig) if key not in (*first, *ELSEWHERE, "model.source")]
    return ["model.source", *first, *rest]


def label(key: str) -> str:
    """What the form calls a setting: a word, or its group and name."""
    return LABELS.get(key) or key.replace(".", ": ").replace("_", " ").capitalize()


def preset_for(goal: str, source: str) -> str:
    """The preset of a goal on a base. A base that is none of ours is taken for SDXL where its name says so."""
    return f"{_base_of(source)}-{goal}"


def _base_of(source: str) -> str:
    if source in ("builtin", ""):
        return "builtin"
    if Path(source).exists():
        from studio.families.loading import family_of

        return "sdxl" if family_of(source) == "sdxl" else "sd15"
    return "sdxl" if "xl" in source.casefold() else "sd15"


@cache
def preset_values(preset: str) -> Values:
    """Every setting of the form as a preset has it."""
    given = yaml.safe_load(presets()[preset].read_text(encoding="utf-8"))
    config = TrainSDConfig.model_validate({**given, "data": {**given.get("data", {}), "folder": "."}})
    shown = form.flat(config.model_dump(mode="json"))
    return {key: shown[key] for key in form_keys()}


def preset_advice(preset: str) -> str:
    """What a preset's file says it is for: its comment."""
    lines = presets()[preset].read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def differences(values: Mapping[str, Any], preset: str) -> dict[str, tuple[Any, Any]]:
    """Key -> (setting, the preset's) where they differ; prompts are content, and no difference."""
    known = preset_values(preset)
    pairs = {key: (values[key], known[key]) for key in known if key not in CONTENT}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def shown(view: str, search: str, goal: str, values: Mapping[str, Any], preset: str) -> set[str]:
    """The settings to show: those that a search finds by name or description, or else those of the view."""
    if words := search.casefold().split():
        known = fields(TrainSDConfig)
        texts = {
            key: f"{key} {label(key)} {known[key].description}".casefold().replace("_", " ") for key in form_keys()
        }
        return {key for key, text in texts.items() if all(word.replace("_", " ") in text for word in words)}
    if view == CHANGED:
        return set(differences(values, preset))
    return set(form_keys()) if view == ALL else {"model.source", *COMMON, *GOALS[goal].keys}


def make_config(values: Mapping[str, Any], dataset: Path, name: str, runs: Path) -> TrainSDConfig:
    """The config of a run on a dataset. Raises ConfigError that names every bad value."""
    own = {"data.folder": str(dataset), "output.folder": str(runs), "output.name": name.strip() or dataset.name}
    try:
        return TrainSDConfig.model_validate(form.nested({**values, **own}))
    except ValidationError as problem:
        raise ConfigError(explain(problem)) from problem


def difference_html(changed: Mapping[str, tuple[Any, Any]], preset: str) -> str:
    """What differs from the preset, as a line."""
    if not changed:
        return f"<p>As in the preset <b>{preset}</b>. {escape(preset_advice(preset))}</p>"
    words = [f"{label(key)} <b>{_word(new)}</b> (preset: {_word(old)})" for key, (new, old) in changed.items()]
    return f"<p>Different from the preset <b>{preset}</b>: {'; '.join(words)}.</p>"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value in (None, "", [], {}):
        return "not set"
    return escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))
