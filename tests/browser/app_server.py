"""The real app in a process of its own, and the pictures and runs that its tests need."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from studio.runs import look

T = TypeVar("T")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SETTINGS = {
    "data": {"resolution": 64, "bucket_step": 8},
    "train": {"steps": 12, "batch_size": 2, "checkpoint_every": 2, "sample_every": 1000},
    "adapter": {"rank": 4, "targets": ["attention"]},
    "samples": {"prompts": ["a red circle"], "steps": 2},
}
"""A training of some seconds on the built-in base."""


def studio(*arguments: str | Path) -> list[str]:
    """The command line of `studio`."""
    return ["nice", "-n", "5", sys.executable, "-m", "studio", *map(str, arguments)]


def wait_for(look_at: Callable[[], T], seconds: float, what: str) -> T:
    """The first true value. Fails when there is none in time."""
    until = time.monotonic() + seconds
    while not (found := look_at()):
        assert time.monotonic() < until, f"no {what} within {seconds} s"
        time.sleep(0.1)
    return found


class AppServer:
    """`studio app` on a free port of 127.0.0.1. `started` is when its process was."""

    def __init__(self, workspace: Path, *options: str) -> None:
        self.workspace = workspace
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.log = workspace.parent / f"{workspace.name}-server.log"
        self.started = time.monotonic()
        command = studio("app", "--workspace", workspace, "--port", str(self.port), *options)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
        wait_for(self._answers, 60, "answer of the server")

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def api(self, path: str, body: Any = None) -> Any:
        """What /api/v1 answers."""
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}api/v1/{path}", content, {"Content-Type": "application/json"} if content else {}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def train(self, name: str, **train: Any) -> Path:
        """Queues a training; its folder."""
        config = {**SETTINGS, "train": {**SETTINGS["train"], **train}, "output": {"name": name}}  # type: ignore[dict-item]
        config["output"]["folder"] = str(self.workspace / "runs")
        job = self.api("jobs", {"kind": "train-sd", "config": config, "title": name})
        return self.workspace / "runs" / job["id"]

    def kill(self) -> None:
        """kill -9 of the server alone."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Ends the server and whatever works in its workspace."""
        self.process.terminate()
        self.process.wait()
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if str(self.workspace).encode() in place.read_bytes():
                    os.kill(int(place.parent.name), signal.SIGKILL)


def at_step(folder: Path, step: int) -> int:
    """Waits until a run has done so many steps; its process."""
    wait_for(lambda: look(folder).status.step >= step, 90, f"step {step} of {folder.name}")
    pid = look(folder).status.pid
    assert pid
    return pid


def ended(folder: Path, seconds: float = 90) -> str:
    """Waits until a run ends; its state."""
    over = ("finished", "stopped", "failed", "crashed")
    return wait_for(lambda: (state := look(folder).status.state) in over and state, seconds, f"end of {folder.name}")


def draw_pictures(folder: Path, count: int, size: int = 96) -> list[Path]:
    """Shapes in colours, each picture another one."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(count):
        picture = Image.new("RGB", (size, size), (255 - number % 90, 240, 200 + number % 50))
        draw = ImageDraw.Draw(picture)
        shape = (draw.ellipse, draw.rectangle)[number % 2]
        edge = 8 + number * 7 % (size // 3)
        shape((edge, 10, size - 10, size - edge), fill=(number * 53 % 256, number * 97 % 256, number * 29 % 256))
        files.append(folder / f"shape {number:03d}.png")
        picture.save(files[-1])
    return files
