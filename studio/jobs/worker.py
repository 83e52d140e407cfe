"""The process that does jobs: one training, or one job after another for as long as none of them trains."""

from __future__ import annotations

import os
import time
from pathlib import Path

from filelock import Timeout

from studio.errors import StudioError
from studio.jobs import queue
from studio.jobs.job import run_job
from studio.jobs.queue import Entry
from studio.workspace import Workspace

POLL_S = 0.2


def work(workspace: Workspace, id: str, stay_s: float) -> None:
    """Takes the waiting job `id` and does it, then those after it, unless one of them trains.

    It leaves when the next job trains, when none came for `stay_s` seconds, and after a failure that was not
    the user's, which may have left this process or its device in any state. Returns at once where another
    process works, or has taken the job.
    """
    try:
        with queue.working(workspace, patience_s=2):
            entry = next((entry for entry in queue.waiting(workspace) if entry.id == id), None)
            while entry and queue.take(workspace, entry) and _do(entry) and not entry.trains:
                entry = _next(workspace, stay_s)
    except Timeout:
        return


def _do(entry: Entry) -> bool:
    """Does a job; whether this process may go on."""
    _write_to(entry.folder / "log.txt")
    try:
        run_job(entry.folder)
    except StudioError:
        return True  # its status and its log say what to mend
    except (Exception, KeyboardInterrupt):
        return False  # its log has the traceback
    return True


def _write_to(log: Path) -> None:
    """Sends what this process prints, libraries in other languages included, to a job's log."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _next(workspace: Workspace, stay_s: float) -> Entry | None:
    """The next job that trains nothing, as soon as there is one."""
    until = time.monotonic() + stay_s
    while True:
        entry = queue.first(workspace)
        if entry is not None:
            return None if entry.trains else entry
        if time.monotonic() >= until or queue.beside(workspace):  # who works beside the queue wants the memory
            return None
        time.sleep(POLL_S)
