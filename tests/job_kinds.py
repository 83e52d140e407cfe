"""Jobs for tests: they take a moment, and end as they are told, without any heavy library.

`environment(folder)` makes them known to every Python process that it is given to.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from studio.config import Group
from studio.jobs.job import JOBS, Kind
from studio.jobs.result import Result
from studio.runs import Run, look


class PlayConfig(Group):
    steps: int = 2
    step_s: float = 0.02
    end: Literal["well", "raise", "die"] = "well"


def play(config: PlayConfig, run: Run) -> Result:
    """Steps until the end or a stop, and says in journal.jsonl of the workspace who did it, and when."""
    began = time.time()
    run.update_status(total=config.steps)
    while run.status.step < config.steps and not run.should("stop"):
        time.sleep(config.step_s)
        run.update_status(step=run.status.step + 1)
    with (run.folder.parent.parent / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps({"id": run.id, "pid": os.getpid(), "began": began, "ended": time.time()}) + "\n")
    if config.end == "raise":
        raise ValueError("as asked")
    if config.end == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return Result([run.log], {"steps": run.status.step})


JOBS["play"] = Kind(PlayConfig, "job_kinds:play")
JOBS["play-alone"] = Kind(PlayConfig, "job_kinds:play", trains=True)


def environment(folder: Path) -> dict[str, str]:
    """The variables of processes that are to know these kinds; `folder` is theirs."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import job_kinds\n")
    known = [str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(known), "PYTHONDONTWRITEBYTECODE": "1"}


def until(condition: Callable[[], Any], seconds: float = 30) -> None:
    """Waits for something that other processes bring about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def states(*folders: Path) -> list[str]:
    return [look(folder).status.state for folder in folders]
