"""The run folder: the one truth about a run, written the same by the command line and the app.

`config.yaml` holds the frozen settings; `status.json` is replaced atomically; `metrics.jsonl` has one
JSON object a line and only grows; `log.txt`, `samples/` and `checkpoints/` are what they say; a file
named stop, save or sample in `control/` asks the trainer for it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import yaml
from pydantic import BaseModel

from studio.errors import ConfigError, StudioError
from studio.status import HEARTBEAT_EVERY_S, RunView, Status, list_runs, look, read_status, start_time, write_atomic

__all__ = ["REQUESTS", "Request", "Run", "RunView", "Status", "StopSignals", "list_runs", "look"]

Request = Literal["stop", "save", "sample"]
REQUESTS: tuple[Request, ...] = ("stop", "save", "sample")

logger = logging.getLogger(__name__)


class StopSignals:
    """While active, the first Ctrl-C or SIGTERM sets `requested`; the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._former = {one: signal.signal(one, self._on_signal) for one in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class Run:
    """One run folder, as its trainer sees it.

    In a job of several processes only the main one writes: elsewhere `is_main` is False, writing
    does nothing and `should` is False, so the main process must tell the others what to do.
    """

    def __init__(self, folder: Path, is_main: bool = True) -> None:
        self.folder = folder
        self.is_main = is_main
        self.samples = folder / "samples"
        self.checkpoints = folder / "checkpoints"
        self.control = folder / "control"
        self.log = folder / "log.txt"
        self.metrics_file = folder / "metrics.jsonl"
        self.config_file = folder / "config.yaml"
        self.status = read_status(folder)
        self.on_status: list[Callable[[Status], None]] = []
        self._signals = StopSignals()
        self._lock = threading.RLock()
        self._recent: deque[tuple[int, float]] = deque(maxlen=50)

    @property
    def id(self) -> str:
        return self.folder.name

    @classmethod
    def create(cls, output_dir: str | Path, name: str, config: BaseModel, job: Mapping[str, str] | None = None) -> Run:
        """A new folder `output_dir`/<date-time>-<name>/, queued; never an existing one.

        `job` is for job.json: what kind of job it is, where it is no training by `studio train-sd`.
        """
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = _new_folder(Path(output_dir).expanduser().resolve(), f"{stamp}-{slug}")
        for inner in ("samples", "checkpoints", "control"):
            (folder / inner).mkdir()
        if job:
            write_atomic(folder / "job.json", json.dumps(job))  # first: with config.yaml the folder is seen
        settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomic(folder / "config.yaml", settings)
        write_atomic(folder / "status.json", json.dumps(asdict(Status(heartbeat=time.time()))))
        return cls(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """An existing run. Raises ConfigError where the folder is no run."""
        folder = Path(folder).expanduser().resolve()
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"'{folder}' is no run folder: it has no config.yaml. `studio runs` lists the runs.")
        return cls(folder)

    # -- while training -----------------------------------------------------------------------

    @contextmanager
    def session(self) -> Iterator[Run]:
        """The time in which this process trains the run: it owns the folder, beats, logs to log.txt
        and heeds Ctrl-C. Leaves the state finished, stopped or failed, and raises what was raised.

        Raises ConfigError when another live process trains the same run.
        """
        if not self.is_main:
            with self._signals:
                yield self
            return
        self._claim()
        done = threading.Event()
        threading.Thread(target=self._beat_until, args=(done,), daemon=True).start()
        try:
            with self._signals, _logging_to(self.log):
                try:
                    yield self
                except BaseException as problem:
                    done.set()
                    self._end_failed(problem)
                    raise
            done.set()
            done_all = 0 < self.status.total <= self.status.step
            stopped = self.status.state == "stopping" and not done_all
            self.update_status(state="stopped" if stopped else "finished", message="", eta_s=None)
        finally:
            done.set()

    def update_status(self, **changes: Any) -> None:
        """Changes fields of `Status`, beats, and tells `on_status`. A new `step` brings rate and ETA along."""
        if not self.is_main:
            return
        with self._lock:
            if "step" in changes:
                changes = {**self._speed(changes["step"], changes.get("total", self.status.total)), **changes}
            self.status = replace(self.status, **changes, heartbeat=time.time())
            write_atomic(self.folder / "status.json", json.dumps(asdict(self.status)))
        for listener in self.on_status:
            listener(self.status)

    def beat(self) -> None:
        """Says that the process is alive; writes at most once in `HEARTBEAT_EVERY_S`."""
        with self._lock:
            if self.is_main and time.time() - self.status.heartbeat >= HEARTBEAT_EVERY_S:
                self.status = replace(self.status, heartbeat=time.time())
                write_atomic(self.folder / "status.json", json.dumps(asdict(self.status)))

    def log_metrics(self, **metrics: Any) -> None:
        """Appends one line to metrics.jsonl; give `step`."""
        if self.is_main:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl."""
        return list(_whole_lines(self.metrics_file))

    def rewind(self, step: int) -> None:
        """Forgets metrics after `step`: what follows the checkpoint that a run resumes from."""
        if self.is_main:
            kept = [json.dumps(line) + "\n" for line in self.metrics() if line.get("step", 0) <= step]
            write_atomic(self.metrics_file, "".join(kept))
            self.update_status(step=step)
            self._recent.clear()

    def should(self, request: Request) -> bool:
        """Whether `request` was asked for since the last call; "stop", by control file or signal, stays asked."""
        if not self.is_main:
            return False
        self.beat()
        file = self.control / request
        asked = file.exists()
        file.unlink(missing_ok=True)
        if request != "stop":
            return asked
        if (asked or self._signals.requested) and self.status.state != "stopping":
            logger.info("stopping after this step")
            self.update_status(state="stopping")
        return self.status.state == "stopping"

    def _claim(self) -> None:
        view = look(self.folder)
        if view.alive and view.status.pid != os.getpid():
            raise ConfigError(
                f"process {view.status.pid} is training '{self.folder}' now; "
                f"wait for it, or stop it with: studio runs stop {self.id}"
            )
        for request in REQUESTS:  # left over from a former session
            (self.control / request).unlink(missing_ok=True)
        self.update_status(
            state="running", pid=os.getpid(), started=start_time(os.getpid()), message="", eta_s=None, rate=None
        )

    def _end_failed(self, problem: BaseException) -> None:
        interrupted = isinstance(problem, KeyboardInterrupt)
        if not interrupted:
            mine = isinstance(problem, StudioError)  # the user's to mend: the message says it all
            with self.log.open("a", encoding="utf-8") as log:
                log.write(f"{problem}\n" if mine else "".join(traceback.format_exception(problem)))
        message = "interrupted before it could save" if interrupted else f"{type(problem).__name__}: {problem}"
        self.update_status(state="failed", message=message, eta_s=None)

    def _beat_until(self, done: threading.Event) -> None:
        # a step, a download or a compilation may take minutes; the process is alive all the same
        while not done.wait(HEARTBEAT_EVERY_S):
            with suppress(OSError):
                self.beat()

    def _speed(self, step: int, total: int) -> dict[str, float]:
        """Rate and ETA over the last steps of this session."""
        now = time.monotonic()
        self._recent.append((step, now))
        first_step, first_time = self._recent[0]
        if step <= first_step or now <= first_time:
            return {}
        rate = (step - first_step) / (now - first_time)
        return {"rate": rate, "eta_s": max(total - step, 0) / rate}


def _new_folder(parent: Path, name: str) -> Path:
    for count in range(1, 1000):
        folder = parent / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as problem:
            raise ConfigError(f"cannot create the run folder '{folder}': {problem.strerror}") from problem
        return folder
    raise ConfigError(f"'{parent}' has a thousand runs named {name}")


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a file; a line that a killed process left half written is left out."""
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                yield json.loads(line)


@contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """Sends log records to `file` too, unless standard error is that file already."""
    file.touch()
    try:
        if os.path.samestat(os.fstat(sys.stderr.fileno()), file.stat()):
            yield
            return
    except (OSError, ValueError):
        pass  # standard error is no real file
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
