"""The command line as a process: exit codes, streams, speed."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from studio import cli
from studio.config import TrainSDConfig
from studio.runs import Run
from studio.settings import fields


def studio(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "studio", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_help_answers_within_half_a_second(tmp_path: Path) -> None:
    """Processor time, so that other work on the machine does not count."""
    times = []
    for _ in range(5):
        before = os.times()
        assert "train-sd" in studio("--help", cwd=tmp_path).stdout
        after = os.times()
        times.append(sum(after[2:4]) - sum(before[2:4]))
    assert statistics.median(times) <= 0.5


def test_the_command_line_loads_no_heavy_library(tmp_path: Path) -> None:
    code = "import sys, studio.cli; print({'torch', 'diffusers', 'transformers', 'accelerate'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"


def test_an_unknown_key_is_bad_usage(tmp_path: Path) -> None:
    process = studio("train-sd", "--set", "adapter.rnak=3", "--json", cwd=tmp_path)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "Error: --set: unknown key 'adapter.rnak'. Did you mean adapter.rank?\n"


def test_a_missing_model_is_bad_usage(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    process = studio("train-sd", "--model", "./nothing", "--data", ".", cwd=tmp_path)
    assert process.returncode == 2
    assert "nothing" in process.stderr
    assert "Traceback" not in process.stderr
    assert not list(tmp_path.glob("runs/*")), "a run that never began leaves nothing"


def test_an_empty_folder_is_a_dataset_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    process = studio("train-sd", "--model", "./nothing", "--data", "empty", cwd=tmp_path)
    assert process.returncode == 3
    assert "empty" in process.stderr
    assert "Traceback" not in process.stderr


def ending(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a command run in this process."""
    monkeypatch.setattr(sys, "argv", ["studio", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (MemoryError("no more"), 4),
        (RuntimeError("MPS backend out of memory"), 4),
        (RuntimeError("a bug"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_of_failures(
    problem: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr("studio.commands.runs.list_runs", fail)
    assert ending(monkeypatch, "runs", "list") == code
    assert "Traceback" not in capsys.readouterr().err


def test_bad_usage_is_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert ending(monkeypatch, "frobnicate") == 2
    assert ending(monkeypatch, "train-sd", "--rank", "many") == 2
    assert ending(monkeypatch, "train-sd", "--resume", str(tmp_path)) == 2
    assert ending(monkeypatch, "runs", "show", "none", "--output-dir", str(tmp_path)) == 2


def test_resume_takes_no_other_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run.create(tmp_path, "a", TrainSDConfig())
    assert ending(monkeypatch, "train-sd", "--resume", str(run.folder), "--rank", "4") == 2


def test_runs_are_listed_as_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run.create("runs", "a", TrainSDConfig())
    assert ending(monkeypatch, "runs", "list", "--output-dir", "runs", "--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)["runs"]
    assert (listed["id"], listed["state"], listed["alive"]) == (run.id, "queued", False)
    assert ending(monkeypatch, "runs") == 0
    assert run.id in capsys.readouterr().out
    assert ending(monkeypatch, "runs", "show", "lst") == 2
    assert f"Did you mean last? The newest are: {run.id}." in " ".join(capsys.readouterr().err.split())
    assert ending(monkeypatch, "runs", "show", "last") == 0
    assert run.id in capsys.readouterr().out


def test_flags_carry_the_schemas_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert ending(monkeypatch, "train-sd", "--help") == 0
    text = capsys.readouterr().out
    assert "Optimizer steps: " in text and "(1 or more; default 1500)" in text
    assert "kohya, diffusers, peft" in text
    assert "sd15-style" in text, "--preset names the presets"
    assert ending(monkeypatch, "train-sd", "--help-all") == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(fields(TrainSDConfig))
