"""How long somebody waits: for the first screen, and for a tick of the live view of a long run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app_server import SETTINGS, AppServer

from studio.config import TrainSDConfig
from studio.runs import Run
from studio.workspace import Workspace

FIRST_SCREEN_S = 12.0  # 4 s on a machine that does nothing else
TICK_S = 0.2
LOGGED = 100_000


def test_the_first_screen_is_soon_there(serve: Callable[..., AppServer], page: Any) -> None:
    server = serve()
    page.goto(server.url, wait_until="commit")
    page.locator("#train-upload").wait_for()
    seconds = time.monotonic() - server.started
    print(f"first useful screen after {seconds:.1f} s")
    assert seconds < FIRST_SCREEN_S


def test_a_tick_of_a_long_run_is_short(tmp_path: Path) -> None:
    """All that a page asks for in a tick, the chart's data included, while the run logs on."""
    import gradio

    from studio.ui import runs
    from studio.ui.context import Context

    workspace = Workspace(tmp_path / "home").create()
    config = TrainSDConfig.model_validate(SETTINGS)
    run = Run.create(workspace.runs, "long", config)
    _log(run, range(LOGGED))
    context = Context(workspace)
    with gradio.Blocks() as context.page, gradio.Tabs() as context.tabs:
        screen = runs.Screen(context)
    seen = runs.Seen()
    seconds = [_time(screen, run, seen)]
    for tick in range(5):
        _log(run, range(LOGGED + tick * 10, LOGGED + tick * 10 + 10))
        seconds.append(_time(screen, run, seen))
    print(f"first tick {1e3 * seconds[0]:.0f} ms, later ones {1e3 * max(seconds[1:]):.0f} ms at most")
    assert max(seconds[1:]) < TICK_S


def _log(run: Run, steps: range) -> None:
    lines = (json.dumps({"step": step, "loss": 1 / (step + 1), "lr": 1e-4}) + "\n" for step in steps)
    with run.metrics_file.open("a") as file:
        file.writelines(lines)
    run.update_status(step=steps.stop - 1, total=2 * LOGGED)


def _time(screen: Any, run: Run, seen: Any) -> float:
    before = time.perf_counter()
    screen.tick(run.id, seen)
    return time.perf_counter() - before
