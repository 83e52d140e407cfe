"""What is killed, and what goes on: the server, the trainer, a run of the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from app_server import ENVIRONMENT, AppServer, at_step, ended, studio, wait_for
from looks import shoot
from safetensors.torch import load_file

from studio.runs import look

LONG = 20_000  # steps that nobody waits for
SHOWN_S = 10.0  # 3 s on a machine that does nothing else


def open_runs(page: Any, server: AppServer) -> None:
    page.goto(server.url)
    page.locator("#tab-runs-button").click()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_a_run_outlives_the_server_and_stops_with_a_checkpoint(serve: Callable[..., AppServer], page: Any) -> None:
    server = serve()
    folder = server.train("outlives", steps=LONG, checkpoint_every=LONG)
    pid = at_step(folder, 2)
    server.kill()
    step = look(folder).status.step
    server = serve()
    page.goto(server.url, wait_until="commit")
    before = time.monotonic()
    page.locator("#tab-runs-button").click()
    page.locator("#runs-state[data-state=running]").wait_for()
    seconds = time.monotonic() - before
    print(f"a new server shows the run {seconds:.1f} s after the page began to load")
    assert seconds < SHOWN_S
    at_step(folder, step + 1)
    assert look(folder).status.pid == pid
    page.locator("#runs-stop").click()
    assert ended(folder) == "stopped"
    page.locator("#runs-state[data-state=stopped]").wait_for()
    assert list(folder.glob("checkpoints/*")), "nothing was saved"
    shoot(page, "robust-stopped")


def test_a_killed_trainer_is_told_of_and_goes_on_to_the_same_weights(
    serve: Callable[..., AppServer], page: Any
) -> None:
    server = serve()
    killed = server.train("killed", checkpoint_every=3)
    open_runs(page, server)
    os.kill(at_step(killed, 4), signal.SIGKILL)
    before = time.monotonic()
    page.locator("#runs-state[data-state=crashed]").wait_for()
    seconds = time.monotonic() - before
    print(f"the page tells of the killed trainer after {seconds:.1f} s")
    assert seconds < 10
    shoot(page, "robust-crashed")
    page.locator("#runs-resume").click()
    page.locator("#runs-state[data-state=finished]").wait_for(timeout=90_000)
    undisturbed = server.train("undisturbed", checkpoint_every=3)
    assert ended(undisturbed) == "finished"
    resumed, straight = weights(killed), weights(undisturbed)
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_a_run_of_the_terminal_is_live_in_the_app_and_the_app_s_in_the_terminal(
    serve: Callable[..., AppServer], page: Any
) -> None:
    server = serve()
    open_runs(page, server)
    settings = (
        "--steps",
        str(LONG),
        "--set",
        "train.batch_size=2",
        "--set",
        "train.sample_every=1000",
        "--set",
        "data.resolution=64",
    )
    runs = server.workspace / "runs"
    command = studio("train-sd", "--name", "terminal", "--output-dir", runs, *settings)
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        page.locator("#runs-table tr[data-state=running]").wait_for(timeout=60_000)
        (folder,) = runs.iterdir()
        step = at_step(folder, 1) and look(folder).status.step
        page.wait_for_function(
            "(step) => parseInt(document.querySelector('#runs-table tr[data-id] td:nth-child(3)').innerText) > step",
            arg=step,
        )
        waits = server.train("waits", steps=2)
        page.locator(f'#runs-table tr[data-id="{waits.name}"][data-state=queued]').wait_for()
        listed = subprocess.run(studio("runs", "list", "--output-dir", runs), capture_output=True, text=True)
        assert waits.name in listed.stdout, listed.stdout + listed.stderr
        page.locator(f'#runs-table tr[data-id="{folder.name}"] button').click()
        page.locator("#runs-stop").click()
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert ended(waits) == "finished"


def test_of_ten_queued_runs_one_broken_nine_finish(serve: Callable[..., AppServer]) -> None:
    server = serve()
    folders = [server.train(f"run {place}", steps=1) for place in range(10)]
    (folders[3] / "config.yaml").write_text("train: {steps: none}\n")
    states = [ended(folder, 200) for folder in folders]
    assert states.count("finished") == 9 and states[3] == "failed"
    wait_for(lambda: not server.api("jobs")["queue"], 10, "empty queue")
