"""Supervisors, workers and jobs as real processes: whoever is killed, every job has its turn, one at a time."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import job_kinds
import psutil
import pytest
from job_kinds import states, until

from studio import jobs
from studio.config import TrainSDConfig
from studio.jobs import queue
from studio.runs import Run, look
from studio.workspace import Workspace

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    for name, value in job_kinds.environment(tmp_path / "site").items():
        monkeypatch.setenv(name, value)
    workspace = Workspace(tmp_path / "home").create()
    yield workspace
    for process in processes(workspace):
        process.kill()


def processes(workspace: Workspace, *words: str) -> list[psutil.Process]:
    """The processes of this workspace whose command line has these words."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if str(workspace.root) in line and {"studio", *words} <= set(line):
            found.append(process)
    return found


def add(workspace: Workspace, title: str, kind: str = "play", **config: Any) -> Path:
    return queue.add(workspace, kind, config, title)


def studio(workspace: Workspace, *words: str) -> subprocess.Popen[bytes]:
    """`studio queue run`, or another command, on this workspace."""
    command = [sys.executable, "-m", "studio", *(words or ("queue", "run")), "--workspace", str(workspace.root)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def journal(workspace: Workspace) -> list[dict[str, Any]]:
    """What the jobs wrote of themselves, in the order of their ends; no two overlap."""
    lines = [json.loads(line) for line in (workspace.root / "journal.jsonl").read_text().splitlines()]
    for one, other in itertools.pairwise(lines):
        assert one["ended"] <= other["began"], "two worked at once"
    return lines


def test_of_ten_jobs_one_is_broken_and_nine_finish(workspace: Workspace) -> None:
    made = [add(workspace, f"job {i}", "play-alone" if i in (0, 4) else "play") for i in range(3)]
    made.append(queue.add(workspace, "train-sd", {"data": {"folder": str(workspace.root / "nowhere")}}, "broken"))
    made += [add(workspace, f"job {i}", "play-alone" if i == 4 else "play") for i in range(4, 10)]
    assert studio(workspace).wait(60) == 0
    assert states(*made) == ["finished"] * 3 + ["failed"] + ["finished"] * 6
    assert "nowhere" in look(made[3]).status.message
    lines = journal(workspace)
    assert [line["id"] for line in lines] == [folder.name for folder in made if folder != made[3]], "in their order"
    pids = [line["pid"] for line in lines]
    assert pids == [pids[0], *[pids[1]] * 2, pids[3], *[pids[4]] * 5], "one process keeps what it has loaded"
    assert len({*pids}) == 4, "trainings have processes of their own"
    assert jobs.result(made[0]) == jobs.Result([made[0] / "log.txt"], {"steps": 2})
    assert not list(workspace.queue.rglob("*.json")) and not processes(workspace)


def test_a_job_that_kills_its_process_takes_no_other_with_it(workspace: Workspace) -> None:
    ends = ("well", "die", "well", "raise", "well")
    made = [add(workspace, end, end=end) for end in ends]
    assert studio(workspace).wait(30) == 0
    assert states(*made) == ["finished", "crashed", "finished", "failed", "finished"]
    assert look(made[3]).status.message == "ValueError: as asked"
    assert "Traceback" in (made[3] / "log.txt").read_text() and "Traceback" not in (made[2] / "log.txt").read_text()
    queue.add_again(workspace, made[1])
    assert states(made[1]) == ["queued"]


def test_the_death_of_a_job_shows_at_once_and_the_queue_goes_on(workspace: Workspace) -> None:
    long, short = add(workspace, "long", "play-alone", steps=10**6), add(workspace, "short")
    supervisor = studio(workspace)
    until(lambda: look(long).status.step)
    os.kill(look(long).status.pid or 0, signal.SIGKILL)
    until(lambda: states(long) == ["crashed"], seconds=2)
    assert supervisor.wait(30) == 0
    assert states(long, short) == ["crashed", "finished"]


def test_a_killed_supervisor_is_replaced_and_its_job_goes_on(workspace: Workspace) -> None:
    first, second = add(workspace, "first", steps=60, step_s=0.05), add(workspace, "second", "play-alone")
    supervisor = studio(workspace)
    until(lambda: look(first).status.step)
    supervisor.kill()
    supervisor.wait()
    assert look(first).alive
    assert jobs.ensure_supervisor(workspace)
    until(lambda: processes(workspace, "queue", "run"))
    assert states(first, second) == ["running", "queued"], "the new one waits for the job of the old one"
    until(lambda: states(first, second) == ["finished", "finished"])
    assert [line["id"] for line in journal(workspace)] == [first.name, second.name]


def test_of_two_supervisors_one_works(workspace: Workspace) -> None:
    made = [add(workspace, f"job {i}", "play-alone") for i in range(3)]
    assert [one.wait(40) for one in [studio(workspace) for _ in range(3)]] == [0, 0, 0]
    until(lambda: states(*made) == ["finished"] * 3)
    assert [line["id"] for line in journal(workspace)] == [folder.name for folder in made], "each once"


def test_of_two_workers_one_gets_the_job(workspace: Workspace) -> None:
    folder = add(workspace, "one", steps=20)
    assert [one.wait(30) for one in [studio(workspace, "job", str(folder)) for _ in range(3)]] == [0, 0, 0]
    assert states(folder) == ["finished"] and len(journal(workspace)) == 1


def test_a_killed_server_takes_nothing_with_it(workspace: Workspace) -> None:
    """The process that adds the job, and all of its session, are killed."""
    code = """
        import sys, time
        import job_kinds
        from studio import jobs
        from studio.workspace import Workspace
        print(jobs.submit(Workspace(sys.argv[1]), "play-alone", {"steps": 10**6}, "long"), flush=True)
        time.sleep(1000)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(workspace.root)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    folder = Path(server.stdout.readline().strip())  # type: ignore[union-attr]
    until(lambda: look(folder).status.step)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    step = look(folder).status.step
    until(lambda: look(folder).status.step > step + 5)
    jobs.stop(folder)
    until(lambda: states(folder) == ["stopped"])


def test_a_job_that_comes_just_as_the_supervisor_leaves_is_done(workspace: Workspace) -> None:
    folder = add(workspace, "job")
    supervisor = studio(workspace)
    until(lambda: states(folder) == ["finished"])
    late = jobs.submit(workspace, "play", {}, "late")
    until(lambda: states(late) == ["finished"])
    supervisor.wait(30)


def test_the_queue_waits_for_a_run_that_was_started_beside_it(workspace: Workspace) -> None:
    code = """
        import sys, time
        from studio.runs import Run
        with Run.open(sys.argv[1]).session() as run:
            while not run.should("stop"):
                time.sleep(0.02)
    """
    beside = Run.create(workspace.runs, "terminal", TrainSDConfig()).folder
    terminal = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(beside)])
    until(lambda: look(beside).alive)
    folder = add(workspace, "job")
    supervisor = studio(workspace)
    until(lambda: processes(workspace, "queue", "run"))
    time.sleep(1.5)
    assert states(folder) == ["queued"]
    assert [view.id for view in queue.beside(workspace)] == [beside.name]
    jobs.stop(beside)
    assert terminal.wait(10) == 0
    assert supervisor.wait(30) == 0
    assert states(beside, folder) == ["stopped", "finished"]


def test_a_worker_keeps_what_it_has_and_leaves_when_another_wants_the_memory(workspace: Workspace) -> None:
    first = add(workspace, "first")
    jobs.ensure_supervisor(workspace)
    until(lambda: states(first) == ["finished"])
    (worker,) = processes(workspace, "job")
    second = jobs.submit(workspace, "play", {}, "second")
    until(lambda: states(second) == ["finished"])
    assert {line["pid"] for line in journal(workspace)} == {worker.pid}
    assert [entry.id for entry in queue.entries(workspace)] == [], "what is done is not in the queue"
    training = jobs.submit(workspace, "play-alone", {}, "training")
    until(lambda: states(training) == ["finished"])
    assert not worker.is_running() and journal(workspace)[-1]["pid"] != worker.pid


def test_a_job_whose_process_cannot_begin_is_a_failure(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, broken = add(workspace, "job"), workspace.root / "broken"
    (broken / "typer").mkdir(parents=True)
    (broken / "typer" / "__init__.py").write_text("raise ImportError('a broken installation')")
    monkeypatch.setenv("PYTHONPATH", f"{broken}{os.pathsep}{os.environ['PYTHONPATH']}")
    assert jobs.supervise(workspace)
    assert states(folder) == ["failed"]
    assert "exit code 1" in look(folder).status.message
    assert "a broken installation" in (folder / "log.txt").read_text()
