"""What the app's screens are made of: curves of a run, files that may leave, form fields from the schema."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from studio.config import TrainSDConfig
from studio.settings import fields
from studio.ui import form
from studio.ui.files import find
from studio.ui.live import POINTS, Series, smoothed
from studio.workspace import Workspace


def write(file: Path, *lines: dict[str, Any]) -> None:
    with file.open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


def test_curves_take_only_what_is_new_and_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    series = Series(file)
    assert not series.read()
    write(file, {"step": 1, "loss": 0.5, "lr": 1e-4})
    with file.open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert series.read() and series.curves == {"loss": [(1, 0.5)], "lr": [(1, 1e-4)]}
    assert not series.read()
    with file.open("a") as stream:
        stream.write('ss": 0.25}\n')
    assert series.read() and series.curves["loss"] == [(1, 0.5), (2, 0.25)]


def test_a_run_that_was_rewound_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, *({"step": step, "loss": 1.0} for step in range(9)))
    series = Series(file)
    series.read()
    file.write_text('{"step": 0, "loss": 2.0}\n')
    series.read()
    assert series.curves["loss"] == [(0, 2.0)]


def test_long_runs_are_thinned_evenly(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, *({"step": step, "loss": float(step)} for step in range(20_000)))
    series = Series(file)
    series.read()
    curve = series.curves["loss"]
    assert POINTS <= len(curve) <= 2 * POINTS
    steps = [step for step, _ in curve]
    assert steps[0] == 0 and steps[-1] > 19_900
    assert len({later - earlier for earlier, later in itertools.pairwise(steps)}) == 1
    assert all(step == value for step, value in curve)


def test_a_smoothed_constant_is_that_constant() -> None:
    assert [value for _, value in smoothed([(step, 3.0) for step in range(5)])] == pytest.approx([3.0] * 5)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "home")
    (workspace.runs / "one" / "samples").mkdir(parents=True)
    (workspace.runs / "one" / "samples" / "00.png").write_bytes(b"picture")
    (workspace.root / "secret.txt").write_text("secret")
    (tmp_path / "outside.txt").write_text("secret")
    (workspace.runs / ".hidden.txt").write_text("secret")
    (workspace.runs / "link.txt").symlink_to(tmp_path / "outside.txt")
    (workspace.runs / "folder").symlink_to(tmp_path)
    (workspace.runs / "one" / "program.py").write_text("secret")
    return workspace


def test_files_of_the_open_folders_are_found(workspace: Workspace) -> None:
    assert find(workspace, "runs/one/samples/00.png") == (workspace.runs / "one/samples/00.png").resolve()


@pytest.mark.parametrize(
    "asked",
    [
        *("", "runs", "runs/", "secret.txt", "/secret.txt", "runs/../secret.txt", "runs/one/../../secret.txt"),
        *("runs/../../outside.txt", "runs//etc/passwd", "/etc/passwd", "runs/link.txt", "runs/folder/outside.txt"),
        *("runs/.hidden.txt", "runs/one/program.py", "runs/one", "../runs/one/samples/00.png", "runs/..%2fsecret.txt"),
        *("./secret.txt", "queue/x.json", "runs/one/samples/00.png\0.txt", "runs\\..\\secret.txt"),
    ],
)
def test_nothing_else_is(asked: str, workspace: Workspace) -> None:
    assert find(workspace, asked) is None


def test_every_setting_has_a_field_that_gives_its_value_back() -> None:
    pytest.importorskip("gradio")
    import gradio as gr

    config = TrainSDConfig()
    shown = form.flat(config.model_dump(mode="json"))
    with gr.Blocks():
        made = form.form(TrainSDConfig, shown, shown)
    again = form.read(TrainSDConfig, {key: one.value for key, one in made.items()})
    assert TrainSDConfig.model_validate(form.nested({**shown, **again})) == config
    assert all(fields(TrainSDConfig)[key].description in one.info for key, one in made.items())
