"""Starting a run as a process of its own, and stopping it in three rungs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from studio.runs import look


def launch(folder: Path, command: str = "train-sd") -> subprocess.Popen[bytes]:
    """Trains a queued or stopped run in a process and session of its own, so that it outlives this one.

    Its output goes to log.txt, never to a pipe: a reader that dies would block the trainer.
    """
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "studio", command, "--resume", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=sys.platform != "win32",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )


def stop(folder: Path, patience_s: float = 120.0, grace_s: float = 30.0) -> Iterator[str]:
    """Stops a run; yields each rung as it is taken, and returns when the process is gone.

    A control file asks for a stop after the step under way; `patience_s` later comes SIGTERM, which
    asks the same; `grace_s` later SIGKILL, children first. A run killed so resumes from its last checkpoint.
    """
    import psutil

    if not look(folder).alive:
        return
    (folder / "control" / "stop").touch()
    yield "asked it to stop after this step"
    if _ended(folder, patience_s):
        return
    process = psutil.Process(look(folder).status.pid)
    process.terminate()
    yield "sent SIGTERM"
    if _ended(folder, grace_s):
        return
    for victim in [*process.children(recursive=True), process]:
        victim.kill()
    yield "killed it"


def _ended(folder: Path, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while look(folder).alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
