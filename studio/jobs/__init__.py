"""Jobs: training, drawing, blending, ... one after another in processes of their own, their state on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from studio.jobs import queue
from studio.jobs.job import JOBS, TRAIN_SD, kind_of, run_job, title_of
from studio.jobs.result import Result, result, save_result
from studio.jobs.supervisor import ensure_supervisor, stop, supervise
from studio.jobs.worker import work
from studio.workspace import Workspace

__all__ = [
    "JOBS",
    "TRAIN_SD",
    "Result",
    "ensure_supervisor",
    "kind_of",
    "queue",
    "result",
    "resume",
    "run_job",
    "save_result",
    "stop",
    "submit",
    "supervise",
    "title_of",
    "work",
]


def submit(workspace: Workspace, kind: str, config: BaseModel | dict[str, Any], title: str = "") -> Path:
    """Adds a job to the queue and sees that somebody works on it. Returns its folder; see `queue.add`."""
    folder = queue.add(workspace, kind, config, title)
    ensure_supervisor(workspace)
    return folder


def resume(workspace: Workspace, folder: Path) -> None:
    """Queues a job that stopped, failed or crashed, to go on from its last checkpoint; see `queue.add_again`."""
    queue.add_again(workspace, folder)
    ensure_supervisor(workspace)
