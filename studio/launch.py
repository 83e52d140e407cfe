"""Starting a job as a process of its own, and stopping it in three rungs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from studio.runs import look

RUNGS = ("asked it to stop after this step", "sent SIGTERM", "killed it")
"""What `stop` says of each rung that it takes."""


def detached(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`studio ARGUMENTS` in a process and session of its own, so that it outlives this one.

    Its output goes to the end of the file `log`, never to a pipe: a reader that dies would block it.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "studio", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
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
    yield RUNGS[0]
    if _ended(folder, patience_s):
        return
    process = psutil.Process(look(folder).status.pid)
    process.terminate()
    yield RUNGS[1]
    if _ended(folder, grace_s):
        return
    for victim in [*process.children(recursive=True), process]:
        victim.kill()
    yield RUNGS[2]


def _ended(folder: Path, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while look(folder).alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
