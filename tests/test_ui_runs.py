"""The screen of runs without a browser: the list, a run in words, curves, pictures, and runs beside each other."""

from __future__ import annotations

import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from studio.config import TrainSDConfig
from studio.errors import ConfigError
from studio.jobs import queue
from studio.launch import RUNGS
from studio.runs import Run, look
from studio.status import start_time, write_atomic
from studio.ui import run_compare as compare
from studio.ui import run_view as view
from studio.ui.context import Context
from studio.ui.live import POINTS, Series
from studio.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path).create()


def config(**groups: dict[str, Any]) -> TrainSDConfig:
    return TrainSDConfig.model_validate({"samples": {"prompts": ["a fox", "a boat"]}, **groups})


def make(workspace: Workspace, name: str, state: str = "finished", **status: Any) -> Run:
    run = Run.create(workspace.runs, name, config())
    run.update_status(state=state, **{"step": 6, "total": 6, **status})
    return run


def at_work(run: Run, **status: Any) -> Run:
    run.update_status(state="running", pid=os.getpid(), started=start_time(os.getpid()), **status)
    return run


def draw(run: Run, step: int, count: int = 2) -> None:
    folder = run.samples / f"step-{step:06d}"
    folder.mkdir()
    for place in range(count):
        Image.new("RGB", (8, 8)).save(folder / f"{place:02d}.png")


def long_metrics(file: Path) -> Path:
    """100,000 steps."""
    lines = (json.dumps({"step": step, "loss": 1 / step, "lr": 1e-4}) + "\n" for step in range(1, 100_001))
    file.write_text("".join(lines))
    return file


def row_of(workspace: Workspace, run: Run) -> view.Row:
    return next(row for row in view.rows(workspace) if row.id == run.id)


def words(workspace: Workspace, run: Run) -> view.Words:
    return view.words(row_of(workspace, run), look(run.folder, 40))


# -- the list --------------------------------------------------------------------------------


def test_the_list_has_what_works_then_what_waits_then_the_newest(workspace: Workspace) -> None:
    old = make(workspace, "old")
    os.rename(old.folder, workspace.runs / "20200101-000000-old")
    new = make(workspace, "new")
    waiting = [queue.add(workspace, "train-sd", config(), name).name for name in ("one", "two")]
    drawing = queue.add(workspace, "draw", {"requests": [{"prompt": "a fox"}]}, "a fox").name
    live = at_work(make(workspace, "from-a-terminal"))
    rows = view.rows(workspace)
    assert [row.id for row in rows] == [live.id, *waiting, drawing, new.id, "20200101-000000-old"]
    assert [row.ahead for row in rows] == [None, 0, 1, 2, None, None]
    assert [row.trains for row in rows] == [True, True, True, False, True, True]


def test_without_a_choice_the_run_at_work_is_shown_and_else_the_newest(workspace: Workspace) -> None:
    assert view.choose(view.rows(workspace), "") is None
    first, second = make(workspace, "first"), make(workspace, "second")
    rows = view.rows(workspace)
    assert view.choose(rows, first.id) == row_of(workspace, first)
    assert view.choose(rows, "gone") == view.choose(rows, None) == rows[0]
    at_work(first)
    assert view.choose(view.rows(workspace), "").id == first.id  # type: ignore[union-attr]
    assert second.id in {row.id for row in view.rows(workspace)}


def test_a_run_whose_process_is_gone_is_listed_as_crashed(workspace: Workspace) -> None:
    run = make(workspace, "gone", "running", pid=2**22 + 1, started=1.0)
    assert row_of(workspace, run).status.state == "crashed"


# -- in words --------------------------------------------------------------------------------


def test_each_end_says_why_and_what_to_do(workspace: Workspace) -> None:
    run = make(workspace, "one", "stopped", step=4)
    assert "nothing was saved" in words(workspace, run).next_step
    (run.checkpoints / "step-000003").mkdir()
    assert "step 3" in words(workspace, run).next_step
    run.update_status(state="failed", message="DatasetError: 'x.png' cannot be read")
    failed = words(workspace, run)
    assert failed.detail == "'x.png' cannot be read" and "Train" in failed.next_step
    run.update_status(state="failed", message="KeyError: 'x'")
    assert words(workspace, run).detail == "KeyError: 'x'"
    run.update_status(state="running", pid=2**22 + 1, started=1.0)
    crashed = words(workspace, run)
    assert crashed.headline == "Crashed" and "step 3" in crashed.next_step
    assert not words(workspace, make(workspace, "two")).next_step


def test_a_run_at_work_says_what_it_does(workspace: Workspace) -> None:
    run = at_work(make(workspace, "one"), message="drawing samples", rate=0.5, eta_s=100.0)
    assert words(workspace, run) == view.Words("Drawing samples", "2.0 seconds a step, 1 min 40 s left")
    (run.control / "save").touch()
    assert "checkpoint" in words(workspace, run).detail


def test_a_stop_says_which_rung_it_has_come_to(workspace: Workspace) -> None:
    run = at_work(make(workspace, "one"))
    (run.control / "stop").touch()
    told = []
    for rung in RUNGS:
        with run.log.open("a") as log:
            log.write(f"{rung}\nsomething else\n")
        assert words(workspace, run).headline == "Stopping"
        told.append(words(workspace, run).detail)
    assert len(set(told)) == len(RUNGS) and "SIGTERM" in told[1]
    run.update_status(pid=2**22 + 1)
    assert "killed" in words(workspace, run).detail


def test_waiting_jobs_say_how_many_come_first(workspace: Workspace) -> None:
    runs = [Run(queue.add(workspace, "train-sd", config(), name)) for name in ("one", "two", "three")]
    assert words(workspace, runs[2]).detail.startswith("2 ")
    queue.up(workspace, runs[2].id)
    queue.up(workspace, runs[2].id)
    assert "next" in words(workspace, runs[2]).detail
    queue.cancel(workspace, runs[0].id)
    assert words(workspace, runs[0]).headline == "Taken out of the queue"


# -- curves, pictures, files -----------------------------------------------------------------


def test_a_chart_is_small_and_of_all_that_was_logged(tmp_path: Path) -> None:
    file = long_metrics(tmp_path / "metrics.jsonl")
    series = Series(file)
    series.read()
    points = view.loss_points(series)
    assert 200 < len(points) <= 2 * POINTS and points[-1][0] > 99_000
    assert {name for _, _, name in points} == {"each step", "smoothed"}
    assert view.rates(series) == {"lr": pytest.approx(1e-4)}


def test_a_thinned_curve_keeps_its_last_point() -> None:
    curve = [(step, float(step)) for step in range(1001)]
    points = view.named("a", curve, 100)
    assert len(points) <= 100 and points[-1] == (1000, 1000.0, "a")
    assert len({later[0] - one[0] for one, later in pairwise(points)}) == 1


def test_validation_has_curves_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "validation_loss": 2.0}\n')
    series = Series(file)
    series.read()
    assert (2, 2.0, "validation loss") in view.loss_points(series)


def test_samples_are_by_prompt_and_step(workspace: Workspace) -> None:
    run = make(workspace, "one")
    for step in range(0, 60, 3):
        draw(run, step, count=3)
    (run.samples / ".part").mkdir()
    found = view.samples(run.folder)
    assert found.prompts == ["a fox", "a boat", "Caption 3 of the dataset"]
    steps = found.spread()
    assert len(steps) == view.COLUMNS and steps[0] == 0 and steps[-1] == 57 and steps == sorted(set(steps))
    assert [one.name for one in found.pictures[3]] == ["00.png", "01.png", "02.png"]


def test_the_adapter_is_the_last_file_or_the_newest_checkpoints(workspace: Workspace) -> None:
    run = make(workspace, "one", "stopped")
    assert view.adapter_of(run.folder) is None
    for step in (3, 6):
        (run.checkpoints / f"step-{step:06d}").mkdir()
        (run.checkpoints / f"step-{step:06d}" / f"{step}.safetensors").touch()
    assert view.adapter_of(run.folder).name == "6.safetensors"  # type: ignore[union-attr]
    (run.folder / "one.safetensors").touch()
    assert view.adapter_of(run.folder) == run.folder / "one.safetensors"


def test_a_clone_waits_with_the_same_settings(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studio.jobs.ensure_supervisor", lambda workspace: True)
    run = make(workspace, "one")
    made = view.clone(workspace, run.folder)
    assert view.settings(made) == view.settings(run.folder) and made != run.folder
    assert [entry.id for entry in queue.waiting(workspace)] == [made.name]
    write_atomic(run.config_file, "train: {stepz: 3}")
    with pytest.raises(ConfigError, match="stepz"):
        view.clone(workspace, run.folder)


# -- beside each other -----------------------------------------------------------------------


def test_runs_are_compared_at_the_last_common_step_by_prompt(workspace: Workspace) -> None:
    one, other = make(workspace, "same"), make(workspace, "same")
    for step in (0, 3, 6):
        draw(one, step)
    for step in (0, 3):
        draw(other, step)
    write_atomic(other.config_file, "samples: {prompts: [a boat, a cat]}\n")
    common, rows = compare.beside([one.folder, other.folder])
    assert common == 3 and [prompt for prompt, _ in rows] == ["a fox", "a boat", "a cat"]
    boat = dict(rows)["a boat"]
    assert [picture.name for picture in boat if picture] == ["01.png", "00.png"]
    assert dict(rows)["a fox"][1] is None and dict(rows)["a cat"][0] is None
    assert len(set(compare.labels([one.folder, other.folder]).values())) == 2


def test_only_what_differs_is_listed(workspace: Workspace) -> None:
    one = Run.create(workspace.runs, "one", config(train={"steps": 6}, adapter={"rank": 4}, output={"name": "one"}))
    two = Run.create(workspace.runs, "two", config(train={"steps": 9}, adapter={"rank": 4}, output={"name": "two"}))
    assert compare.differences([one.folder, two.folder]) == {"train.steps": [6, 9]}
    assert compare.differences([one.folder, one.folder]) == {}


def test_curves_of_many_runs_stay_few_points(tmp_path: Path) -> None:
    series = {}
    for name in ("a", "b", "c"):
        file = tmp_path / name
        file.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(3000)))
        series[name] = Series(file)
        series[name].read()
    points = compare.curves(series)
    assert len(points) <= 2 * POINTS and {name for _, _, name in points} == {"a", "b", "c"}


# -- the page --------------------------------------------------------------------------------


def test_titles_and_logs_are_text_on_the_page(workspace: Workspace) -> None:
    from studio.ui import runs_html as html

    evil = "<script>alert(1)</script>"
    run = make(workspace, "one", "failed", message=f"KeyError: {evil}")
    run.log.write_text(evil)
    write_atomic(run.folder / "job.json", json.dumps({"title": evil, "kind": evil}))
    row, now = row_of(workspace, run), look(run.folder)
    context = Context(workspace)
    pages = [
        html.table_html([row], run.id),
        html.state_html(row, view.words(row, now), {"lr": 1e-4, evil: 1.0}, now.log_tail),
        html.log_html(now),
        html.pictures_html(context, [evil], [(evil, [None])]),
        html.differences_html([evil], {evil: [evil, [evil]]}),
    ]
    assert all("<script" not in page and "&lt;script" in page for page in pages)


def test_the_page_is_sent_only_what_is_new(workspace: Workspace) -> None:
    gr = pytest.importorskip("gradio")
    from studio.ui.runs import Screen, Seen

    context = Context(workspace)
    with gr.Blocks() as context.page:
        screen = Screen(context)
    seen, nothing = Seen(), gr.skip()
    assert screen.tick("", seen)[0] != nothing
    assert screen.tick("", seen) == [nothing] * 17
    run = at_work(make(workspace, "one", step=1))
    run.log_metrics(step=1, loss=1.0, lr=1e-4)
    first = screen.tick("", seen)
    assert seen.of == run.folder and nothing not in first
    assert screen.tick("", seen) == [nothing] * 17
    run.log_metrics(step=2, loss=1.0, lr=1e-4)
    run.update_status(step=2, loss=1.0)
    new = screen.tick("", seen)
    assert [value != nothing for value in new[:7]] == [True, False, False, True, True, False, False]
    assert new[7:] == [nothing] * 10
    assert screen.tick("", Seen())[3] == new[3]  # another page, or a reload


def test_a_tick_costs_little_with_100_000_logged_steps(workspace: Workspace) -> None:
    gr = pytest.importorskip("gradio")
    from studio.ui.runs import Screen, Seen

    context = Context(workspace)
    with gr.Blocks() as context.page:
        screen = Screen(context)
    run = at_work(make(workspace, "one"))
    screen.tick("", Seen())  # imports
    draw(run, 3)
    long_metrics(run.metrics_file)
    seen, costs = Seen(), []
    for step in range(100_001, 100_004):
        began = time.process_time()
        assert screen.tick("", seen)[4] != gr.skip()
        costs.append(time.process_time() - began)
        run.log_metrics(step=step, loss=0.5, lr=1e-4)
        run.update_status(step=step)
    assert costs[0] < 0.4 and max(costs[1:]) < 0.1  # seconds; twice what it takes on a machine that does little else
    print(costs)
