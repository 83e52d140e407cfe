"""Bad input from the command line: one clear message, the documented exit code, and a run that goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image
from test_data_images import picture, png_header

from studio import cli


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def train(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of one step on the tiny base."""
    given = ["--model", str(tiny.folder("sd15")), "--resolution", "64", "--steps", "1", "--batch-size", "2"]
    given += ["--set", "samples.steps=1", "--set", "samples.prompts=[a cat]"]
    monkeypatch.setattr(sys, "argv", ["studio", "train-sd", *given, *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def damaged_folder(folder: Path) -> Path:
    """Two good pictures among everything that goes wrong with pictures."""
    folder.mkdir()
    for seed, name in enumerate(("good", "cropped"), start=7):
        picture(80, 64, seed).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a good one")
    picture(seed=1).save(folder / "whole.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:900])
    (folder / "empty.png").touch()
    png_header(folder / "huge.png", 20_000, 20_000)
    picture(seed=2).convert("CMYK").save(folder / "cmyk.jpg")
    frames = [picture(seed=3), picture(seed=4)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(seed=5).save(folder / "rotated.jpg", exif=exif)
    picture(seed=6).save(folder / "caption.png")
    (folder / "caption.txt").write_bytes("Käfer".encode("cp1252"))
    return folder


def test_damaged_pictures_never_stop_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, "--data", str(damaged_folder(tmp_path / "pictures"))) == 0
    (log,) = (tmp_path / "runs").glob("*/log.txt")
    said = log.read_text()
    for name in ("truncated.jpg", "empty.png", "huge.png", "caption.png", "animated.gif"):
        assert name in said, f"the report does not mention {name}"
    for used in ("cmyk.jpg: ", "rotated.jpg: damaged"):
        assert f"left out: {used}" not in said
    assert "6 pictures" in said
    assert (log.parent / "before_after.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "nothing"], 3, "nothing"),
        (["--data", "empty"], 3, "empty"),
        (["--data", "ruined"], 3, "zero.png"),
        (["--data", "good", "--model", "no/such-model-here"], 2, "no/such-model-here"),
        (["--data", "good", "--model", "./missing.safetensors"], 2, "missing.safetensors"),
        (["--data", "good", "--set", "adapter.rnak=4"], 2, "adapter.rank"),
        (["--data", "good", "--targets", "attnetion"], 2, "attention"),
        (["--data", "good", "--method", "lroa"], 2, "lora"),
        (["--data", "good", "--rank", "0"], 2, "rank"),
        (["--data", "good", "--resolution", "100"], 2, "resolution"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_usage_is_one_clear_message(
    arguments: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for a hub that may be away
    for name in ("good", "empty", "ruined"):
        (tmp_path / name).mkdir()
    picture(80, 64).save(tmp_path / "good" / "a.png")
    (tmp_path / "ruined" / "zero.png").touch()
    assert train(monkeypatch, *arguments) == code
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err and said.out == ""
    assert not list((tmp_path / "runs").glob("*")), "a run that cannot begin leaves no folder"
