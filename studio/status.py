"""What a run is doing, as `status.json` says it and as it really is."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

ACTIVE = ("running", "stopping")
HEARTBEAT_EVERY_S = 5.0
HEARTBEAT_FRESH_S = 60.0


@dataclass(frozen=True)
class Status:
    """What `status.json` holds. Times are seconds since 1970; `rate` is optimizer steps a second.

    `state` is queued, cancelled (before it began), running, stopping, stopped, finished, failed or crashed;
    the last is never written: `look` finds it.
    """

    state: str = "queued"
    step: int = 0
    total: int = 0
    eta_s: float | None = None
    rate: float | None = None
    loss: float | None = None
    pid: int | None = None
    started: float | None = None
    heartbeat: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class RunView:
    """A run as seen from outside. `status.state` is the true one: a dead trainer's is "crashed"."""

    folder: Path
    status: Status
    alive: bool
    log_tail: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return self.folder.name


def look(folder: str | Path, log_lines: int = 10) -> RunView:
    """The truth about a run now: alive only while its pid exists, the process start time matches and
    the heartbeat is fresh; a run that says it is active and is not has crashed."""
    folder = Path(folder)
    status = read_status(folder)
    alive = status.state in ACTIVE and _is_alive(status)
    tail = _tail(folder / "log.txt", log_lines)
    if status.state in ACTIVE and not alive:
        last = tail[-1] if tail else "its log is empty"
        status = replace(status, state="crashed", eta_s=None, message=f"the process ended without a word; {last}")
    return RunView(folder, status, alive, tail)


def list_runs(output_dir: str | Path) -> list[RunView]:
    """Every run below `output_dir`, the newest first."""
    found = Path(output_dir).glob("*/config.yaml")
    return [look(file.parent) for file in sorted(found, reverse=True)]


def read_status(folder: Path) -> Status:
    """`status.json`, or a queued status where there is none; unknown fields of other versions are left out."""
    try:
        values = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Status()
    known = {field.name for field in fields(Status)}
    return Status(**{key: value for key, value in values.items() if key in known})


def _is_alive(status: Status) -> bool:
    if status.pid is None or time.time() - status.heartbeat > HEARTBEAT_FRESH_S:
        return False
    started = start_time(status.pid)
    # pids are used again: the same pid with another start time is another process
    return started is not None and status.started is not None and abs(started - status.started) < 2


def start_time(pid: int) -> float | None:
    """Seconds since 1970 at which a live process began; None for a dead or unreaped one."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def write_atomic(file: Path, text: str) -> None:
    """Atomic: a reader sees the old file or the new one, whole."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def _tail(file: Path, lines: int) -> tuple[str, ...]:
    if not file.is_file():
        return ()
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 20_000))
        return tuple(stream.read().decode("utf-8", "replace").splitlines()[-lines:])
