"""What the screen of runs knows without Gradio: the list, a run in words, its curves and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from studio import errors, jobs
from studio.jobs import queue
from studio.launch import RUNGS
from studio.runs import RunView, look
from studio.status import ACTIVE, Status, read_status
from studio.ui.live import POINTS, Series, smoothed
from studio.units import duration
from studio.workspace import Workspace

ENDED_EARLY = ("stopped", "failed", "crashed", "cancelled")
"""States of a job that can go on."""
COLUMNS = 8  # steps of which samples are shown


@dataclass(frozen=True)
class Row:
    """A job in the list. `ahead` is how many wait before it, None for one that does not wait."""

    folder: Path
    kind: str
    title: str
    status: Status
    ahead: int | None = None

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def trains(self) -> bool:
        return self.kind == jobs.TRAIN_SD


def rows(workspace: Workspace) -> list[Row]:
    """What is at work; what waits, of any kind and in its order; then trainings that ended, the newest first."""
    waits = {entry.folder: place for place, entry in enumerate(queue.waiting(workspace))}
    taken = [entry.folder for entry in queue.entries(workspace) if entry.folder not in waits]
    newest = (file.parent for file in sorted(workspace.runs.glob("*/config.yaml"), reverse=True))
    found = [_row(folder, waits.get(folder)) for folder in dict.fromkeys([*taken, *waits, *newest])]
    return sorted(found, key=lambda row: 0 if row.status.state in ACTIVE else 2 if row.ahead is None else 1)


def _row(folder: Path, ahead: int | None) -> Row:
    status = read_status(folder)
    if status.state in ACTIVE:
        status = look(folder, 1).status  # it may have died
    return Row(folder, jobs.kind_of(folder), jobs.title_of(folder), status, ahead)


def choose(found: Sequence[Row], id: str | None) -> Row | None:
    """The row with this id; without one, what is at work, or else the newest."""
    by_id = {row.id: row for row in found}
    return by_id.get(id or "") or next(iter(found), None)


# -- in words --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """What a run does or why it ended, the details, and what to do next."""

    headline: str
    detail: str = ""
    next_step: str = ""


def words(row: Row, view: RunView) -> Words:
    """A run's state, for somebody who has never seen one."""
    status, saved = view.status, checkpoint_step(row.folder)
    going_on = f"Resume goes on from step {saved}" if saved else "Resume begins again: nothing was saved yet"
    match status.state:
        case "queued":
            return _waiting(row)
        case "running" | "stopping":
            return _at_work(row, view)
        case "finished":
            return Words("Finished", f"{status.total} steps" if status.total else "")
        case "stopped":
            return Words("Stopped", f"at step {status.step} of {status.total}, and saved", f"{going_on}.")
        case "cancelled":
            return Words("Taken out of the queue", status.message or "before it began", "Resume puts it back.")
        case "crashed":
            killed = rung(view.log_tail) == len(RUNGS) - 1
            reason = "It did not answer and was killed" if killed else "Its process ended without a word"
            hint = "Where this repeats, it may be short of memory: a smaller batch or resolution needs less."
            return Words("Crashed", f"{reason}, at step {status.step}.", f"{going_on}. {hint}")
    kind, _, reason = status.message.partition(": ")
    message = reason if hasattr(errors, kind) else status.message  # ours say what to do: their name says nothing
    other = " For other settings, start a new run in Train." if row.trains else ""
    return Words("Failed", message, f"Mend what it says; then {going_on}.{other}")


def _waiting(row: Row) -> Words:
    if row.ahead is None:
        return Words("Starting")
    if row.ahead:
        return Words("Waiting", f"{row.ahead} in the queue before it")
    return Words("Waiting", "it comes next, when the job at work has ended")


def _at_work(row: Row, view: RunView) -> Words:
    status, control = view.status, row.folder / "control"
    if status.state == "stopping" or (control / "stop").exists():
        return Words("Stopping", _rungs(view.log_tail))
    what = (status.message or "starting").capitalize()
    parts = []
    if status.rate:
        rate = status.rate
        parts.append(f"{rate:.1f} steps a second" if rate >= 1 else f"{1 / rate:.1f} seconds a step")
    if status.eta_s:
        parts.append(f"{duration(status.eta_s)} left")
    asked = {"save": "a checkpoint is asked for", "sample": "samples are asked for"}
    parts += [text for request, text in asked.items() if (control / request).exists()]
    return Words(what, ", ".join(parts))


def rung(log: Sequence[str]) -> int:
    """The place in `RUNGS` of the last that a log tells of; -1 without any."""
    told = [place for line in log for place, one in enumerate(RUNGS) if line.strip() == one]
    return told[-1] if told else -1


def _rungs(log: Sequence[str]) -> str:
    """How far the ladder of a stop has got."""
    return (
        "first rung: it finishes its step, saves and ends",
        "second rung: it did not answer, and was sent SIGTERM, which asks the same",
        "last rung: it did not answer, and is killed",
    )[max(rung(log), 0)]


# -- files -----------------------------------------------------------------------------------


def checkpoint_step(folder: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    return max(_steps(folder / "checkpoints"), default=0)


def _steps(folder: Path) -> dict[int, Path]:
    """Step -> its folder, in order."""
    found = {place.name[5:]: place for place in sorted(folder.glob("step-*"))}
    return {int(step): place for step, place in found.items() if step.isdigit()}


def adapter_of(folder: Path) -> Path | None:
    """The adapter that a run has made: its last file, or its newest checkpoint's; None before any."""
    made = jobs.result(folder)
    if made and made.files:
        return made.files[0]
    step = f"checkpoints/step-{checkpoint_step(folder):06d}"
    found = [file for pattern in ("*.safetensors", f"{step}/*.safetensors") for file in sorted(folder.glob(pattern))]
    return next(iter(found), None)


def weights(adapter: Path) -> Path:
    """The file with an adapter's tensors: a peft folder's is in it."""
    return adapter / "adapter_model.safetensors" if adapter.is_dir() else adapter


def settings(folder: Path) -> dict[str, Any]:
    """A run's frozen config; {} where it cannot be read."""
    file = folder / "config.yaml"
    return _settings(file, file.stat().st_mtime_ns) if file.is_file() else {}


@lru_cache(maxsize=256)
def _settings(file: Path, changed: int) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def clone(workspace: Workspace, folder: Path) -> Path:
    """A new job at the end of the queue with the settings of another. Raises ConfigError."""
    return jobs.submit(workspace, jobs.kind_of(folder), settings(folder), jobs.title_of(folder))


# -- curves ----------------------------------------------------------------------------------

Point = tuple[int, float, str]  # step, loss, name of the curve


def loss_points(series: Series) -> list[Point]:
    """Every loss as it was logged, and smoothed: two curves each, a thousand points in all at most."""
    losses = {name: curve for name, curve in series.curves.items() if "loss" in name}
    points: list[Point] = []
    for name, curve in losses.items():
        label = "each step" if name == "loss" else name.replace("_", " ")
        both = {label: curve, "smoothed" if name == "loss" else f"{label}, smoothed": smoothed(curve)}
        points += [point for one in both.items() for point in named(*one, POINTS // len(losses))]
    return points


def named(label: str, curve: list[tuple[int, float]], most: int) -> list[Point]:
    """A curve as a chart takes it: `most` points at most, its last among them, five digits of each."""
    stride = max(-(-len(curve) // most), 1)
    return [(step, float(f"{value:.5g}"), label) for step, value in curve[::-1][::stride][::-1]]


def rates(series: Series) -> dict[str, float]:
    """Learning rates as they are now, by the name of their group of parameters."""
    return {name: curve[-1][1] for name, curve in series.curves.items() if name.startswith("lr") and curve}


# -- samples ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """`pictures[step]` are the samples of a step, in the order of `prompts`."""

    prompts: list[str] = field(default_factory=list)
    pictures: dict[int, list[Path]] = field(default_factory=dict)

    def spread(self, most: int = COLUMNS) -> list[int]:
        """Evenly spread steps, the first and the last among them."""
        steps = sorted(self.pictures)
        if len(steps) <= most:
            return steps
        return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def samples(folder: Path) -> Samples:
    """What a run has drawn so far."""
    pictures = {step: sorted(place.glob("*.png")) for step, place in _steps(folder / "samples").items()}
    count = max(map(len, pictures.values()), default=0)
    known = (settings(folder).get("samples") or {}).get("prompts") or []
    return Samples([*known, *(f"Caption {place + 1} of the dataset" for place in range(len(known), count))], pictures)
