"""What the generate screen knows without Gradio: the settings of a job, the cells of a grid, and a job at work.
Files go by their place in the workspace ("library/ink.safetensors"), the `key` of an adapter."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from studio.errors import ConfigError
from studio.jobs import queue
from studio.jobs.draw import DrawConfig, DrawRequest
from studio.runs import look
from studio.settings import explain, load
from studio.status import ACTIVE
from studio.ui.adapters import adapters_of, find
from studio.workspace import Workspace

if TYPE_CHECKING:
    from PIL import Image

Use = dict[str, Any]
"""An adapter of the page's list: source, strength, and blocks (pattern -> factor)."""

NONE, STRENGTH, CHECKPOINT, PROMPT, SEED = "Nothing", "Strength", "Checkpoint", "Prompt", "Seed"
AXES = (NONE, STRENGTH, CHECKPOINT, PROMPT, SEED)
MAX_CELLS = 400


def use(workspace: Workspace, source: str | Path, strength: float = 1.0) -> Use:
    """An adapter as the page's list has it: what other screens put there."""
    return {"source": workspace.outside(str(source)), "strength": strength, "blocks": {}}


def checkpoints(workspace: Workspace) -> dict[str, str]:
    """Source -> what to call it, for the adapters that runs saved on their way, and each run's last one after them."""
    found = {}
    for run in sorted(workspace.runs.glob("*"), reverse=True):
        for file in sorted(run.glob("checkpoints/step-*/*.safetensors")):
            found[workspace.outside(str(file))] = f"{run.name[16:] or run.name} {int(file.parent.name[5:])}"
        for file in run.glob("*.safetensors"):
            found[workspace.outside(str(file))] = f"{file.stem} (end of {run.name[:15]})"
    return found


def bases(workspace: Workspace) -> list[str]:
    """The bases that the workspace itself has."""
    return [workspace.outside(str(place)) for place in sorted((workspace.library / "bases").glob("*"))]


def blocks(workspace: Workspace, source: str) -> dict[str, str]:
    """Pattern -> name of each block that an adapter changes, as the model runs.

    Raises ConfigError for what is no adapter of the workspace, and as `read_adapter` does.
    """
    place = workspace.root / source if source in checkpoints(workspace) else find(workspace, source).path
    return _blocks(str(place), place.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _blocks(place: str, changed: int) -> dict[str, str]:
    from studio.algebra.statistics import block_of, block_order
    from studio.formats import read_adapter

    found = {}
    for block in sorted({block_of(name) for name in read_adapter(place).tensors}, key=block_order):
        component, _, rest = block.partition(".")
        if component.startswith("text_encoder"):
            found[f"{component}.*"] = component.replace("_", " ")
        elif rest:
            found[f"{block}.*"] = rest.replace("_blocks.", " ").replace("mid_block", "middle").replace("_", " ")
    return found


def keep_start(workspace: Workspace, picture: Image.Image) -> str:
    """Keeps a picture to start from. Returns its source, which its pixels decide."""
    buffer = BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    place = workspace.pictures / "starts" / f"{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.png"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(buffer.getvalue())
    return workspace.outside(str(place))


# -- settings of a job ------------------------------------------------------------------------------


def request(workspace: Workspace, uses: Sequence[Use], values: Mapping[str, Any]) -> DrawRequest:
    """What the page's fields ask for. `<lora:name:0.8>` in the prompt counts as an adapter of the workspace.

    Raises ConfigError for a value out of its range, and for a name that is not found.
    """
    prompt, named = _tags(workspace, values["prompt"])
    known = {one["source"] for one in named}
    chosen = [one for one in uses if one["source"] and one["source"] not in known] + named
    return _request(workspace, {**values, "prompt": prompt, "adapters": chosen})


def config(workspace: Workspace, base: str, requests: Sequence[DrawRequest]) -> DrawConfig:
    """The job that draws `requests` on a base. An adapter of strength 0 is left out, as the picture is that of the base
    and may be there."""
    acting = [
        one.model_copy(update={"adapters": [adapter for adapter in one.adapters if adapter.strength]})
        for one in requests
    ]
    return DrawConfig.model_validate({"model": {"source": workspace.inside(base or "builtin")}, "requests": acting})


def compared(asked: DrawRequest) -> list[DrawRequest]:
    """One picture without any adapter, and the same with them."""
    if not any(one.strength for one in asked.adapters):
        raise ConfigError("add an adapter with a strength other than 0: there is nothing to compare the base with")
    with_them = asked.model_copy(update={"count": 1})
    return [with_them.model_copy(update={"adapters": []}), with_them]


@dataclass(frozen=True)
class Axis:
    """One direction of a grid: `values` are texts, for checkpoints sources; `labels` what to show."""

    kind: str
    values: list[str]
    labels: list[str]


def axis(workspace: Workspace, kind: str, text: str, files: Sequence[str]) -> Axis:
    """An axis from its fields: one prompt a line, numbers with commas or lines between them, "1-4" for seeds.

    Raises ConfigError where there are no values, and for those that are no numbers.
    """
    if kind == NONE:
        return Axis(NONE, [""], [""])
    if kind == CHECKPOINT:
        names = checkpoints(workspace)
        values = list(files)
        labels = [names.get(one, Path(one).stem) for one in values]
    elif kind == PROMPT:
        values = labels = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        values = labels = [one for part in re.split(r"[,\s]+", text.strip()) if part for one in _numbers(kind, part)]
    if not values:
        raise ConfigError(f"{kind} is an axis of the grid: give it values")
    return Axis(kind, values, labels)


def _numbers(kind: str, part: str) -> list[str]:
    span = re.fullmatch(r"(\d+)-(\d+)", part) if kind == SEED else None
    if span:
        first, last = int(span[1]), int(span[2])
        return [str(seed) for seed in range(first, min(last, first + MAX_CELLS) + 1)]
    if not re.fullmatch(r"\d+" if kind == SEED else r"[+-]?(\d+\.?\d*|\.\d+)", part):
        raise ConfigError(f"'{part}' is no {kind.lower()}: write numbers with commas between them, as in 0, 0.5, 1")
    return [part]


def grid(workspace: Workspace, asked: DrawRequest, rows: Axis, columns: Axis) -> list[DrawRequest]:
    """The cells, row by row. Raises ConfigError for two equal axes, too many cells, and a strength of nothing."""
    if rows.kind == columns.kind:
        what = "both axes are Nothing" if rows.kind == NONE else f"both axes are {rows.kind}"
        raise ConfigError(f"{what}: choose two different ones")
    if len(rows.values) * len(columns.values) > MAX_CELLS:
        raise ConfigError(f"the grid has {len(rows.values) * len(columns.values)} cells; {MAX_CELLS} are the most")
    one = asked.model_copy(update={"count": 1})
    cells = [{rows.kind: row, columns.kind: column} for row in rows.values for column in columns.values]
    return [_cell(workspace, one, cell) for cell in cells]


def _cell(workspace: Workspace, asked: DrawRequest, cell: Mapping[str, str]) -> DrawRequest:
    values = asked.model_dump()
    first, *others = values["adapters"] or [{"source": "", "strength": 1.0, "blocks": {}}]
    if CHECKPOINT in cell:
        first = {**first, "source": cell[CHECKPOINT]}
    if STRENGTH in cell:
        if not first["source"]:
            raise ConfigError("add the adapter whose strength the grid is to change")
        first = {**first, "strength": float(cell[STRENGTH])}
    values["adapters"] = [first, *others] if first["source"] else []
    if SEED in cell:
        values["seed"] = int(cell[SEED])
    if PROMPT in cell:
        values["prompt"], named = _tags(workspace, cell[PROMPT])
        values["adapters"] += named
    return _request(workspace, values)


def _request(workspace: Workspace, values: Mapping[str, Any]) -> DrawRequest:
    uses = [
        {
            "source": workspace.inside(one["source"]),
            "strength": one["strength"],
            "blocks": {pattern: factor for pattern, factor in one["blocks"].items() if factor != 1},
        }
        for one in values["adapters"]
    ]
    try:
        start = workspace.inside(values.get("image") or "")
        return DrawRequest.model_validate({**values, "adapters": uses, "image": start})
    except ValidationError as problem:
        raise ConfigError(explain(problem)) from problem


def _tags(workspace: Workspace, prompt: str) -> tuple[str, list[Use]]:
    """The prompt without its tags, and the adapters that they name."""
    from studio.diffusion.prompts import extract_loras

    text, named = extract_loras(prompt)
    found = [(named_adapter(workspace, name), name, strength) for name, strength in named]
    if missing := [name for source, name, _ in found if source is None]:
        raise ConfigError(f"the prompt names '{missing[0]}': no adapter of the workspace is called that")
    return text, [use(workspace, source or "", strength) for source, _, strength in found]


def named_adapter(workspace: Workspace, name: str) -> str | None:
    """The source of the adapter whose file has that name; the library's goes before those of runs."""
    return next((one.key for one in adapters_of(workspace) if one.path.name.removesuffix(".safetensors") == name), None)


# -- a job at work ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A job now: `pictures` has a place for each picture, None for those that are not there yet."""

    state: str
    message: str
    share: float
    pictures: list[Path | None]
    requests: list[DrawRequest]
    before: int = 0

    @property
    def over(self) -> bool:
        return self.state not in ("queued", *ACTIVE)

    @property
    def done(self) -> int:
        return sum(picture is not None for picture in self.pictures)


def view(workspace: Workspace, id: str) -> View | None:
    """A drawing job; None where there is none of that id."""
    folder = workspace.jobs / id
    if not re.fullmatch(r"\w[\w.-]*", id) or not (folder / "config.yaml").is_file():
        return None
    status = look(folder).status
    settings = load(DrawConfig, folder / "config.yaml")
    pictures = [file if file.exists() else None for file in settings.files(workspace)]
    waiting = [entry.id for entry in queue.entries(workspace)] if status.state == "queued" else []
    before = waiting.index(id) if id in waiting else 0
    share = status.step / status.total if status.total else 0.0
    return View(status.state, status.message, share, pictures, settings.pictures(), before)
