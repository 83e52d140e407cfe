"""A training in the queue, in a process of its own: killed and resumed, it ends with the weights of a quiet run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_kinds import states, until
from PIL import Image
from safetensors.numpy import load_file

from studio import jobs
from studio.jobs import queue
from studio.runs import Run, list_runs, look
from studio.workspace import Workspace

STEPS = 24


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    workspace = Workspace(tmp_path / "home").create()
    monkeypatch.setenv("STUDIO_HOME", str(workspace.root))
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = workspace.datasets / "cats"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (60 * i, 90, 200 - 30 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a cat, number {i}")
    return workspace


def studio(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "studio", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(folder: Path) -> dict[str, Any]:
    made = jobs.result(folder)
    assert made is not None and made.files[0].suffix == ".safetensors"
    return load_file(made.files[0])


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_run_resumes_to_the_weights_of_an_undisturbed_one(workspace: Workspace) -> None:
    settings = {
        "data": {"folder": str(workspace.datasets / "cats"), "resolution": 64, "bucket_step": 8},
        "adapter": {"rank": 2, "targets": ["attention"]},
        "train": {"steps": STEPS, "batch_size": 2, "checkpoint_every": 4, "sample_every": 0},
        "samples": {"prompts": ["a cat"], "steps": 1},
    }
    killed = queue.add(workspace, jobs.TRAIN_SD, settings, "killed")
    supervisor = subprocess.Popen([sys.executable, "-m", "studio", "queue", "run"], stderr=subprocess.DEVNULL)
    until(lambda: look(killed).status.step >= 6, seconds=100)
    os.kill(look(killed).status.pid or 0, signal.SIGKILL)
    until(lambda: states(killed) == ["crashed"], seconds=2)
    assert supervisor.wait(10) == 0
    assert 6 <= look(killed).status.step < STEPS
    assert "without a word" in look(killed).status.message

    studio("train-sd", "--config", str(killed / "config.yaml"), "--name", "quiet")
    (quiet,) = (view.folder for view in list_runs(workspace.runs) if view.id.endswith("quiet"))
    queue.add_again(workspace, killed)
    studio("queue", "run")
    assert states(killed, quiet) == ["finished", "finished"]
    first, second = weights(quiet), weights(killed)
    assert first.keys() == second.keys() and any(np.abs(tensor).max() > 0 for tensor in first.values())
    assert all(np.array_equal(tensor, second[key]) for key, tensor in first.items())
    assert Run.open(quiet).metrics() == Run.open(killed).metrics()
