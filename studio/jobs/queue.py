"""The queue: a file for each job that waits, named by when it was added; a process takes it by renaming it.

A rename happens or it does not, whoever else tries and whatever is killed: no entry is lost, none is taken
twice. Who works holds the lease, a lock that the system takes back when the process ends, however it ends.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from studio.errors import ConfigError, nearest
from studio.jobs.job import JOBS, TRAIN_SD, create, find_kind, kind_of, title_of
from studio.runs import REQUESTS, Run, RunView, look
from studio.settings import explain
from studio.status import ACTIVE, read_status, write_atomic
from studio.workspace import Workspace

STRANDED_AFTER_S = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A job in the queue. `place` is the entry's file, `folder` the job's, whose name is its `id`."""

    place: Path
    folder: Path
    kind: str
    title: str

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def waiting(self) -> bool:
        """Whether no process had taken it when the queue was read."""
        return self.place.parent.name != "running"

    @property
    def trains(self) -> bool:
        """Whether it needs a process of its own."""
        return self.kind not in JOBS or JOBS[self.kind].trains

    def look(self) -> RunView:
        """The state of the job now."""
        return look(self.folder)


def add(workspace: Workspace, kind: str, config: BaseModel | dict[str, Any], title: str = "") -> Path:
    """A new job at the end of the queue; returns its folder. Nobody is told: `jobs.submit` sees to that too.

    Raises ConfigError for an unknown kind, and for settings that its schema refuses.
    """
    schema = find_kind(kind).schema
    try:
        checked = config if isinstance(config, schema) else schema.model_validate(config)
    except ValidationError as problem:
        raise ConfigError(explain(problem)) from problem
    workspace.create()
    run = create(workspace.runs if kind == TRAIN_SD else workspace.jobs, kind, checked, title)
    _write(workspace, run.folder)
    return run.folder


def add_again(workspace: Workspace, folder: Path) -> None:
    """Queues a job that stopped, failed, crashed or was cancelled: it goes on from its last checkpoint.

    Raises ConfigError for one that is done, at work, or in the queue already.
    """
    folder = folder.resolve()
    if folder.name in {entry.id for entry in entries(workspace)}:
        raise ConfigError(f"'{folder.name}' is in the queue already")
    state = look(folder).status.state
    if state in (*ACTIVE, "finished"):
        raise ConfigError(f"'{folder.name}' is {state}: there is nothing to go on with")
    run = Run.open(folder)
    for request in REQUESTS:
        (run.control / request).unlink(missing_ok=True)
    run.update_status(state="queued", message="", eta_s=None, rate=None)
    workspace.create()
    _write(workspace, folder)


def entries(workspace: Workspace) -> list[Entry]:
    """The jobs that processes have taken and not ended, and then those that wait, in their order."""
    taken = _read(workspace, workspace.queue / "running")
    return [entry for entry in taken if entry.look().status.state in ("queued", *ACTIVE)] + waiting(workspace)


def waiting(workspace: Workspace) -> list[Entry]:
    """The jobs that wait, in their order."""
    return list(_read(workspace, workspace.queue))


def first(workspace: Workspace) -> Entry | None:
    """The job that comes next; None while a run that somebody started beside the queue is alive."""
    found = waiting(workspace)
    return found[0] if found and not beside(workspace) else None


def beside(workspace: Workspace) -> list[RunView]:
    """The runs at work that are not from the queue: `studio train-sd` in a terminal."""
    taken = {entry.id for entry in _read(workspace, workspace.queue / "running")}
    return [view for view in _active(workspace.runs) if view.id not in taken]


def cancel(workspace: Workspace, id: str) -> bool:
    """Takes a waiting job out of the queue; False where a process was quicker. Its folder stays.

    Raises ConfigError for an id that is not in the queue.
    """
    entry = find(workspace, id)
    if not entry.waiting:
        return False
    try:
        entry.place.unlink()
    except FileNotFoundError:
        return False
    _give_up(entry.folder)
    return True


def up(workspace: Workspace, id: str) -> None:
    """Lets a waiting job and the one before it change places; nothing where it comes next already.

    Raises ConfigError for an id that is not in the queue.
    """
    entry = find(workspace, id)
    order = waiting(workspace)
    place = next((place for place, other in enumerate(order) if other.id == id), 0)
    if place == 0:
        return
    before = order[place - 1]
    with suppress(FileNotFoundError):  # a process took one of them
        # a kill between the two renames leaves both with one time, and none lost
        entry.place.rename(_place(workspace, _stamp(before.place), entry.folder))
        before.place.rename(_place(workspace, _stamp(entry.place), before.folder))


def find(workspace: Workspace, id: str) -> Entry:
    """The entry of a job. Raises ConfigError, naming the nearest, where there is none."""
    known = {entry.id: entry for entry in entries(workspace)}
    if id not in known:
        raise ConfigError(f"there is no '{id}' in the queue.{nearest(id, known)} `studio queue` lists it.")
    return known[id]


# -- for those who work ----------------------------------------------------------------------


def take(workspace: Workspace, entry: Entry) -> bool:
    """Takes a waiting job; False where it was cancelled, moved, or taken by another process."""
    try:
        entry.place.rename(workspace.queue / "running" / entry.place.name)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def working(workspace: Workspace, patience_s: float) -> Iterator[None]:
    """Holds the lease: nobody else works, so what processes before had taken is cleared away. Raises Timeout."""
    with FileLock(workspace.queue / "lease.lock").acquire(timeout=patience_s):
        _sweep(workspace)
        try:
            yield
        finally:
            _sweep(workspace)


def is_free(workspace: Workspace) -> bool:
    """Whether no process of the queue works."""
    try:
        with working(workspace, patience_s=0):
            return True
    except Timeout:
        return False


def _sweep(workspace: Workspace) -> None:
    for file in (workspace.queue / "running").glob("*.json"):
        file.unlink(missing_ok=True)


def reconcile(workspace: Workspace) -> None:
    """Brings the queue in line with the folders after a crash or a power cut: drops entries that mean no job,
    and gives up jobs that say they wait and are not in the queue."""
    files = set(workspace.queue.glob("*.json"))  # before the entries are read, lest one that is added now be dropped
    for file in files - {entry.place for entry in waiting(workspace)}:
        logger.warning("dropped %s from the queue: it names no job", file.name)
        file.unlink(missing_ok=True)
    ids = {entry.id for entry in entries(workspace)}
    for folder in (workspace.runs, workspace.jobs):
        for file in folder.glob("*/config.yaml"):
            status = read_status(file.parent)
            lost = status.state == "queued" and time.time() - status.heartbeat > STRANDED_AFTER_S
            if lost and file.parent.name not in ids:
                _give_up(file.parent, "it was not in the queue any more: start it again")


def _write(workspace: Workspace, folder: Path) -> None:
    about = {
        "folder": os.path.relpath(folder, workspace.root),
        "kind": kind_of(folder),
        "title": title_of(folder),
    }
    write_atomic(_place(workspace, time.time_ns(), folder), json.dumps(about))


def _place(workspace: Workspace, stamp: int, folder: Path) -> Path:
    return workspace.queue / f"{stamp:020d}-{folder.name}.json"


def _stamp(place: Path) -> int:
    return int(place.name.partition("-")[0])


def _read(workspace: Workspace, folder: Path) -> Iterator[Entry]:
    """The entries of a folder in their order, less those that mean no job."""
    for place in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError, KeyError):  # taken just now; or left so by a power cut
            about = json.loads(place.read_text(encoding="utf-8"))
            job = workspace.root / about["folder"]
            if (job / "config.yaml").is_file():
                yield Entry(place, job, about["kind"], about["title"])


def _give_up(folder: Path, message: str = "") -> None:
    """The state of a job that is not to begin: what it was before, as far as that can be known."""
    run = Run.open(folder)
    run.update_status(state="stopped" if run.status.step else "cancelled", message=message)


def _active(folder: Path) -> list[RunView]:
    views = (file.parent for file in folder.glob("*/status.json") if read_status(file.parent).state in ACTIVE)
    return [view for view in map(look, views) if view.alive]
