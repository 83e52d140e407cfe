"""The tools that read adapter files: which keys each uses, and how far it computes from what the file means.

The rules were read from the tools and are stated in our own terms. A tool is one file here, with its names and its
way to compute, and one line in `CONSUMERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from studio.errors import ConfigError, nearest
from studio.families.base import ModelFamily, Models
from studio.formats import FORMATS, format_of
from studio.formats.consumers import a1111, comfyui, diffusers, forge, lycoris, peft, sd_scripts
from studio.formats.consumers.effect import Reading, deviations
from studio.formats.consumers.places import Base
from studio.formats.consumers.subject import Entry, File, published, read_file

TOLERANCE = 1e-3
"""The relative error from which on a tool is said to compute something else: bf16 weights are that far off anyway."""


@dataclass(frozen=True)
class Consumer:
    """A tool: its name, and the rule that says what it reads of a file on a base."""

    name: str
    rule: Callable[[File, Base], Reading]


CONSUMERS: dict[str, Consumer] = {
    "diffusers": Consumer("diffusers", diffusers.rule),
    "sd-scripts": Consumer("kohya sd-scripts", sd_scripts.rule),
    "comfyui": Consumer("ComfyUI", comfyui.rule),
    "a1111": Consumer("A1111", a1111.rule),
    "forge": Consumer("Forge", forge.rule),
    "peft": Consumer("PEFT", peft.rule),
    "lycoris": Consumer("LyCORIS", lycoris.rule),
    "lycoris-merge": Consumer("LyCORIS, merged", lycoris.merged),
}


@dataclass(frozen=True)
class ConsumerReport:
    """How many of a file's `total` keys a tool uses and which it does not, and how far its result is off.

    `error` is the largest |dW_tool - dW| over the largest |dW|, both over all layers, at `layer`; None where only
    the base's weights could tell, or where `problem` says why the file's own meaning is not known. `notes` say what
    the tool does differently.
    """

    consumer: str
    used: int
    total: int
    unused: tuple[str, ...]
    error: float | None
    layer: str
    notes: tuple[str, ...]
    problem: str = ""

    @property
    def faithful(self) -> bool:
        """Whether the tool uses everything and computes what the file means."""
        return not self.unused and self.error is not None and self.error <= TOLERANCE


def check_file(path: str | Path, family: ModelFamily, models: Models | None = None) -> dict[str, ConsumerReport]:
    """One report for each of `CONSUMERS`.

    A key counts as used where the tool's names lead it to a layer that it fits, and the tool knows the
    method. `models` is the base that the adapter is for; without it, the family's published full-size one, of
    which the shapes are known and not the weights. Raises ConfigError for a file that cannot be read.
    """
    path = Path(path)
    meant, problem = _meaning(path)
    file = read_file(path, meant)
    base = Base(family, models or published(file, family))
    readings = {name: consumer.rule(file, base) for name, consumer in CONSUMERS.items()}
    found = deviations(meant, readings.values(), base.targets)
    return {
        name: ConsumerReport(
            CONSUMERS[name].name,
            used=sum(key in reading.keys for key in file.tensors),
            total=len(file.tensors),
            unused=tuple(key for key in file.tensors if key not in reading.keys),
            error=None if problem else deviation.error,
            layer=deviation.layer,
            notes=tuple(reading.notes),
            problem=problem,
        )
        for (name, reading), deviation in zip(readings.items(), found, strict=True)
    }


def _meaning(path: Path) -> tuple[Mapping[str, Entry], str]:
    """(full layer name -> entry, why there is none): tools may use files that are not valid as a whole."""
    try:
        return FORMATS[format_of(path)].read(path).tensors, ""
    except ConfigError as problem:
        return {}, str(problem)


def consumer_named(name: str) -> str:
    """The key in `CONSUMERS` of a tool's name, whatever its case. Raises ConfigError for an unknown one."""
    if name.lower() not in CONSUMERS:
        raise ConfigError(f"unknown tool '{name}'.{nearest(name.lower(), CONSUMERS)} Tools: {', '.join(CONSUMERS)}")
    return name.lower()
