"""A job: a run folder with a kind, and the function that does what its config says."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from studio.config import TrainSDConfig
from studio.errors import ConfigError, nearest
from studio.jobs.blend import AnalyzeConfig, BlendConfig, ExtractConfig, MergeConfig, ResizeConfig
from studio.jobs.draw import DrawConfig
from studio.jobs.result import Result, save_result
from studio.runs import Run
from studio.settings import load

TRAIN_SD = "train-sd"
"""The kind of a folder without job.json: what the command line writes."""


class Kind(NamedTuple):
    """A kind of job. `function` is "module:name" of (config, run) -> Result, imported by the process that does it.

    A job that `trains` gets a process of its own; the others take turns in one, which keeps the base that it has.
    """

    schema: type[BaseModel]
    function: str
    trains: bool = False

    def load(self) -> Callable[[Any, Run], Result]:
        """The function itself."""
        module, _, name = self.function.partition(":")
        return getattr(import_module(module), name)


JOBS: dict[str, Kind] = {
    TRAIN_SD: Kind(TrainSDConfig, "studio.jobs.train:train_sd", trains=True),
    "probe": Kind(TrainSDConfig, "studio.jobs.probe:probe", trains=True),  # its peak of memory is its own
    "draw": Kind(DrawConfig, "studio.jobs.draw:draw"),
    "blend": Kind(BlendConfig, "studio.jobs.blend:blend"),
    "analyze": Kind(AnalyzeConfig, "studio.jobs.blend:analyze"),
    "resize": Kind(ResizeConfig, "studio.jobs.blend:resize"),
    "extract": Kind(ExtractConfig, "studio.jobs.blend:extract"),
    "merge": Kind(MergeConfig, "studio.jobs.blend:merge"),
}


def find_kind(kind: str) -> Kind:
    """Raises ConfigError for a kind that is not in `JOBS`."""
    if kind not in JOBS:
        raise ConfigError(f"there is no job of the kind '{kind}'.{nearest(kind, JOBS)} Kinds: {', '.join(JOBS)}.")
    return JOBS[kind]


def create(parent: Path, kind: str, config: BaseModel, title: str = "") -> Run:
    """A new job below `parent`, queued; `title` is what people read."""
    if kind == TRAIN_SD and isinstance(config, TrainSDConfig):
        return Run.create(parent, title or config.output.name, config)
    return Run.create(parent, f"{kind}-{title}"[:60], config, job={"kind": kind, "title": title or kind})


def kind_of(folder: Path) -> str:
    """The kind of a job folder."""
    return _about(folder).get("kind", TRAIN_SD)


def title_of(folder: Path) -> str:
    """What a job is called: for a run of the command line, its id without date and time."""
    return _about(folder).get("title") or folder.name.split("-", 2)[-1]


def run_job(folder: Path) -> Result:
    """Does a job, here and now; state, log and result are then in its folder. Raises what the job raises."""
    run = Run.open(folder)
    with run.session():
        kind = find_kind(kind_of(run.folder))
        made = kind.load()(load(kind.schema, run.config_file), run)
        save_result(run.folder, made)
    return made


def _about(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "job.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
