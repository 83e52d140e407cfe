"""The run folder: written whole, truthful after a crash, owned by one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from studio.config import TrainSDConfig
from studio.errors import ConfigError
from studio.launch import stop
from studio.runs import Run, Status, StopSignals, list_runs, look
from studio.settings import load
from studio.status import HEARTBEAT_FRESH_S


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "runs", "My Style!", TrainSDConfig())


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def trainer(folder: Path) -> subprocess.Popen[bytes]:
    """Another process that trains the run until it is asked to stop."""
    code = """
        import sys, time
        from studio.runs import Run
        with Run.open(sys.argv[1]).session() as run:
            step = 0
            while not run.should("stop"):
                step += 1
                run.log_metrics(step=step, loss=1 / step)
                run.update_status(step=step, total=10**9, loss=1 / step)
                time.sleep(0.01)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(folder)])
    until(lambda: look(folder).status.step > 5)
    return process


def test_a_new_run_is_queued_and_keeps_its_config(run: Run) -> None:
    assert run.id.endswith("-my-style")
    assert load(TrainSDConfig, run.config_file) == TrainSDConfig()
    assert look(run.folder).status.state == "queued"
    assert all(folder.is_dir() for folder in (run.samples, run.checkpoints, run.control))


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    made = {Run.create(tmp_path, "same", TrainSDConfig()).folder for _ in range(4)}
    assert len(made) == 4
    assert {view.folder for view in list_runs(tmp_path)} == made


def test_a_session_ends_finished_stopped_or_failed(run: Run) -> None:
    with run.session():
        run.update_status(step=3, total=3)
    assert look(run.folder).status.state == "finished"
    with run.session():
        run.update_status(step=1, total=3)
        (run.control / "stop").touch()
        assert run.should("stop")
        assert run.should("stop"), "a stop stays asked for"
    assert look(run.folder).status.state == "stopped"
    with pytest.raises(ZeroDivisionError), run.session():
        1 / 0  # noqa: B018
    view = look(run.folder)
    assert (view.status.state, view.status.message) == ("failed", "ZeroDivisionError: division by zero")
    assert "Traceback" in "\n".join(view.log_tail)


def test_control_files_are_consumed(run: Run) -> None:
    with run.session():
        (run.control / "save").touch()
        assert (run.should("save"), run.should("save"), run.should("sample")) == (True, False, False)


def test_status_gains_rate_and_eta(run: Run) -> None:
    seen: list[Status] = []
    run.on_status.append(seen.append)
    run.update_status(step=0, total=10)
    time.sleep(0.05)
    run.update_status(step=5)
    assert seen[-1].rate == pytest.approx(5 / 0.05, rel=0.5)
    assert seen[-1].eta_s == pytest.approx(0.05, rel=0.5)


def test_readers_never_see_half_a_status(run: Run) -> None:
    def write() -> None:
        for step in range(300):
            run.update_status(step=step, total=300, message="x" * 5000)

    thread = threading.Thread(target=write)
    run.update_status(message="begun")
    thread.start()
    while thread.is_alive():
        assert look(run.folder).status.message  # an unreadable file would give the default, ""
    thread.join()


def test_a_killed_trainer_has_crashed(run: Run) -> None:
    process = trainer(run.folder)
    assert look(run.folder).alive
    process.kill()
    until(lambda: not look(run.folder).alive)  # dead, though not yet reaped
    process.wait()
    view = look(run.folder)
    assert view.status.state == "crashed"
    assert view.status.step > 5
    with run.session():  # nothing stands in the way of going on
        run.update_status(step=1, total=1)


def test_a_stale_heartbeat_or_another_process_with_the_pid_is_a_crash(run: Run) -> None:
    with run.session():
        mine = run.status
        assert look(run.folder).alive
        old = replace(mine, heartbeat=time.time() - HEARTBEAT_FRESH_S - 1)
        reused = replace(mine, started=(mine.started or 0) - 100)
        for status in (old, reused):
            (run.folder / "status.json").write_text(json.dumps(vars(status)))
            assert look(run.folder).status.state == "crashed"


def test_two_processes_never_train_one_run_and_stop_saves(run: Run) -> None:
    process = trainer(run.folder)
    with pytest.raises(ConfigError, match=f"process {process.pid}"), run.session():
        pass
    assert list(stop(run.folder)) == ["asked it to stop after this step"]
    assert process.wait(10) == 0
    assert look(run.folder).status.state == "stopped"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_one_signal_stops_and_a_second_interrupts() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_rewind_forgets_later_metrics_and_torn_lines(run: Run) -> None:
    for step in (1, 2, 3):
        run.log_metrics(step=step, loss=1 / step)
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in run.metrics()] == [1, 2, 3]
    run.rewind(2)
    run.log_metrics(step=3, loss=9.0)
    assert [(line["step"], line["loss"]) for line in run.metrics()] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_processes_beside_the_main_one_write_nothing(run: Run) -> None:
    before = sorted(path.name for path in run.folder.rglob("*")), (run.folder / "status.json").read_text()
    with Run(run.folder, is_main=False).session() as other:
        other.update_status(step=5)
        other.log_metrics(step=5, loss=0.0)
        assert not other.should("stop")
    assert before == (sorted(path.name for path in run.folder.rglob("*")), (run.folder / "status.json").read_text())


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        Run.open(tmp_path)
