"""The queue as files: order, taking, cancelling, going on, and what a power cut leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import job_kinds  # noqa: F401
import pytest

from studio import jobs
from studio.config import TrainSDConfig
from studio.errors import ConfigError
from studio.jobs import queue
from studio.runs import look
from studio.status import write_atomic
from studio.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "home")


def ids(workspace: Workspace) -> list[str]:
    return [entry.id for entry in queue.waiting(workspace)]


def add(workspace: Workspace, title: str, kind: str = "play") -> Path:
    return queue.add(workspace, kind, {}, title)


def says(folder: Path, **changes: object) -> None:
    """Writes a status as it is, without a heartbeat of now."""
    write_atomic(folder / "status.json", json.dumps(asdict(replace(look(folder).status, **changes))))


def test_a_job_is_a_run_folder_with_a_kind(workspace: Workspace) -> None:
    drawing = queue.add(workspace, "draw", {"requests": [{"prompt": "a red fox"}]}, "A red fox!")
    training = queue.add(workspace, "train-sd", TrainSDConfig())
    assert drawing.parent == workspace.jobs and training.parent == workspace.runs
    assert (jobs.kind_of(drawing), jobs.title_of(drawing)) == ("draw", "A red fox!")
    assert (jobs.kind_of(training), jobs.title_of(training)) == ("train-sd", "demo")
    assert not (training / "job.json").exists(), "a run of the queue is a run of the command line"
    entries = queue.entries(workspace)
    assert [(entry.id, entry.kind, entry.title, entry.waiting, entry.trains) for entry in entries] == [
        (drawing.name, "draw", "A red fox!", True, False),
        (training.name, "train-sd", "demo", True, True),
    ]
    assert {entry.look().status.state for entry in entries} == {"queued"}
    assert jobs.result(drawing) is None


def test_what_cannot_be_done_is_refused_before_it_waits(workspace: Workspace) -> None:
    for kind, config, message in (
        ("drawn", {}, "no job of the kind 'drawn'. Did you mean draw"),
        ("draw", {"requests": []}, "requests"),
        ("draw", {"requests": [{"sampler": "Eular"}]}, "unknown sampler 'Eular'. Did you mean Euler"),
        ("draw", {"requests": [{"denoising": 0}]}, "denoising"),
        ("blend", {"adapters": [{"source": "a"}], "file": {"name": "../up"}}, "file.name"),
        ("train-sd", {"train": {"steps": 0}}, "train.steps is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            queue.add(workspace, kind, config)
    assert not queue.entries(workspace)


def test_the_order_is_that_of_adding_and_can_be_changed(workspace: Workspace) -> None:
    a, b, c = (add(workspace, title).name for title in "abc")
    assert ids(workspace) == [a, b, c]
    queue.up(workspace, c)
    assert ids(workspace) == [a, c, b]
    queue.up(workspace, c)
    queue.up(workspace, c)
    assert ids(workspace) == [c, a, b]
    d = add(workspace, "d").name
    assert ids(workspace) == [c, a, b, d], "what is added later comes later"
    with pytest.raises(ConfigError, match=f"there is no '{a[:-1]}x' in the queue. Did you mean"):
        queue.up(workspace, f"{a[:-1]}x")


def test_an_entry_is_taken_once(workspace: Workspace) -> None:
    add(workspace, "a")
    (entry,) = queue.waiting(workspace)
    assert queue.take(workspace, entry)
    assert not queue.take(workspace, entry)
    assert not queue.waiting(workspace)
    (taken,) = queue.entries(workspace)
    assert taken.id == entry.id and not taken.waiting
    assert not queue.cancel(workspace, entry.id), "a process has it"


def test_a_cancelled_job_stays_as_a_folder_and_can_be_queued_again(workspace: Workspace) -> None:
    folder = add(workspace, "a")
    assert queue.cancel(workspace, folder.name)
    assert look(folder).status.state == "cancelled" and not queue.entries(workspace)
    queue.add_again(workspace, folder)
    assert look(folder).status.state == "queued" and ids(workspace) == [folder.name]
    with pytest.raises(ConfigError, match="in the queue already"):
        queue.add_again(workspace, folder)
    jobs.stop(folder)
    assert look(folder).status.state == "cancelled" and not queue.entries(workspace)


def test_a_stopped_job_waits_to_go_on_and_a_finished_one_does_not(workspace: Workspace) -> None:
    folder = add(workspace, "a")
    (entry,) = queue.waiting(workspace)
    queue.take(workspace, entry)
    says(folder, state="stopped", step=3, total=9)
    (folder / "control" / "stop").touch()
    queue.add_again(workspace, folder)
    assert look(folder).status.step == 3
    assert not (folder / "control" / "stop").exists(), "an old request does not stop it again"
    queue.cancel(workspace, folder.name)
    assert look(folder).status.state == "stopped", "what it was before"
    says(folder, state="finished", step=9)
    with pytest.raises(ConfigError, match="is finished"):
        queue.add_again(workspace, folder)


def test_what_a_power_cut_leaves_is_put_right(workspace: Workspace) -> None:
    kept = add(workspace, "kept")
    stranded = add(workspace, "stranded")
    fresh = add(workspace, "fresh")
    gone = add(workspace, "gone")
    halfway = add(workspace, "halfway")
    by_id = {entry.id: entry for entry in queue.waiting(workspace)}
    for folder in (stranded, fresh):
        by_id[folder.name].place.unlink()
    says(stranded, heartbeat=time.time() - 3600)
    (gone / "config.yaml").unlink()
    (workspace.queue / "00000000000000000001-torn.json").write_text("")
    queue.take(workspace, by_id[halfway.name])
    says(halfway, state="running", pid=2**22 + 1, started=1.0, heartbeat=time.time(), step=4, total=9)
    assert ids(workspace) == [kept.name], "and none of it is in the way of readers"

    assert queue.is_free(workspace)
    queue.reconcile(workspace)
    assert [entry.id for entry in queue.entries(workspace)] == [kept.name]
    assert len(list(workspace.queue.rglob("*.json"))) == 1
    assert look(halfway).status.state == "crashed"
    assert look(stranded).status.state == "cancelled"
    assert look(fresh).status.state == "queued", "somebody may be about to add it"
    queue.add_again(workspace, halfway)
    assert ids(workspace) == [kept.name, halfway.name]


def test_who_works_is_alone_and_known_to_others(workspace: Workspace) -> None:
    workspace.create()
    with queue.working(workspace, patience_s=0):
        assert not queue.is_free(workspace)
        add(workspace, "a")
        (entry,) = queue.waiting(workspace)
        queue.take(workspace, entry)
        assert not queue.is_free(workspace) and queue.entries(workspace), "asking takes nothing away"
    assert queue.is_free(workspace)
    assert not list((workspace.queue / "running").iterdir())


def test_results_may_move_with_their_workspace(workspace: Workspace, tmp_path: Path) -> None:
    folder = add(workspace, "a")
    picture, file = workspace.pictures / "a.png", folder / "b.txt"
    picture.touch()
    file.touch()
    jobs.save_result(folder, jobs.Result([picture, file], {"path": picture, "loss": 0.5}))
    workspace.root.rename(tmp_path / "moved")
    made = jobs.result(tmp_path / "moved" / "jobs" / folder.name)
    assert made is not None and made.facts["loss"] == 0.5
    assert made.files == [
        tmp_path / "moved" / "pictures" / "a.png",
        tmp_path / "moved" / "jobs" / folder.name / "b.txt",
    ]
    made.files[0].unlink()
    assert jobs.result(tmp_path / "moved" / "jobs" / folder.name).files == made.files[1:]  # type: ignore[union-attr]


def test_the_command_line_adds_to_the_workspace_of_the_environment(workspace: Workspace, tmp_path: Path) -> None:
    workspace.create()
    environment = {**os.environ, "STUDIO_HOME": str(workspace.root)}

    def studio(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "studio", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    with queue.working(workspace, patience_s=0):  # so that nobody begins
        done = studio("train-sd", "--queue", "--steps", "3", "--json")
        assert done.returncode == 0, done.stderr
        folder = Path(json.loads(done.stdout)["folder"])
        assert folder.parent == workspace.runs and look(folder).status.state == "queued"
        elsewhere = studio("train-sd", "--queue", "--output-dir", str(tmp_path / "elsewhere"))
        assert elsewhere.returncode == 2 and "leave out --output-dir" in elsewhere.stderr
        listed = json.loads(studio("queue", "list", "--json").stdout)["jobs"]
        assert [(job["id"], job["kind"], job["state"]) for job in listed] == [(folder.name, "train-sd", "waiting")]
        assert "cancelled" in studio("queue", "cancel", folder.name).stdout
        assert studio("queue").stdout == "The queue is empty.\n"
    assert look(folder).status.state == "cancelled"
    assert folder.name in studio("runs").stdout
