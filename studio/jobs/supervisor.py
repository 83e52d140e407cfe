"""One process for each workspace that starts the next job when the last one has ended.

It knows nothing that is not on disk: killed, it is replaced by another at the next occasion, and the job at
work goes on, whose lease tells the new one to wait.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from filelock import FileLock, Timeout

from studio.jobs import queue
from studio.jobs.queue import Entry
from studio.launch import detached
from studio.runs import Run, look
from studio.status import ACTIVE
from studio.workspace import Workspace

POLL_S = 0.3
STAY_S = 60.0
"""How long a supervisor waits for more jobs, and a base stays in memory for the next picture."""

logger = logging.getLogger(__name__)


def ensure_supervisor(workspace: Workspace) -> bool:
    """Starts a supervisor, which outlives this process, where jobs wait and none is there; whether it did."""
    if not queue.waiting(workspace) or not _is_free(_lock(workspace)):
        return False
    log, root = workspace.queue / "supervisor.log", str(workspace.root)
    detached(log, "queue", "run", "--workspace", root, "--stay", str(STAY_S))
    return True


def supervise(workspace: Workspace, stay_s: float = 0.0) -> bool:
    """Starts jobs until none has waited for `stay_s` seconds. Returns False where another supervisor does that."""
    workspace.create()
    while True:
        try:
            with _lock(workspace).acquire(timeout=2):
                queue.reconcile(workspace)
                _serve(workspace, stay_s)
        except Timeout:
            return False
        # who added a job before the lock was free has started nobody
        if not queue.waiting(workspace):
            return True


def stop(folder: Path) -> None:
    """Ends a job in whatever state it is, and returns at once.

    One that waits leaves the queue. One at work is asked to save and stop; a process of its own sees that it
    does, by SIGTERM and SIGKILL in the end (`studio.launch.stop`).
    """
    folder = folder.resolve()
    workspace = Workspace(folder.parent.parent)
    waits = folder.name in {entry.id for entry in queue.waiting(workspace)}
    if waits and queue.cancel(workspace, folder.name):
        return
    state = look(folder).status.state
    if state in ("queued", *ACTIVE):
        (folder / "control" / "stop").touch()
    if state in ACTIVE:
        detached(folder / "log.txt", "runs", "stop", str(folder))


def _lock(workspace: Workspace) -> FileLock:
    return FileLock(workspace.queue / "supervisor.lock")


def _is_free(lock: FileLock) -> bool:
    try:
        with lock.acquire(timeout=0):
            return True
    except Timeout:
        return False


def _serve(workspace: Workspace, stay_s: float) -> None:
    until = time.monotonic() + stay_s
    while True:
        if queue.waiting(workspace):
            entry = queue.first(workspace) if queue.is_free(workspace) else None
            if entry:
                _see_through(workspace, entry, stay_s)
            until = time.monotonic() + stay_s
        elif time.monotonic() >= until:
            return
        time.sleep(POLL_S)


def _see_through(workspace: Workspace, entry: Entry, stay_s: float) -> None:
    """Starts a worker with a job and waits until it ends."""
    logger.info("%s: %s", entry.id, entry.title)
    options = ["--workspace", str(workspace.root), "--stay", str(stay_s)]
    code = detached(entry.folder / "log.txt", "job", str(entry.folder), *options).wait()
    if code and queue.take(workspace, entry):
        message = f"its process ended before it began, with exit code {code}; its log says more"
        Run.open(entry.folder).update_status(state="failed", message=message)
    logger.info("%s: %s", entry.id, look(entry.folder).status.state)
