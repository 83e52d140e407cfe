"""A file can be trained again from itself: its settings are whole, and what they leave out is asked for."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from io import BytesIO
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from studio import cli
from studio.config import TrainSDConfig
from studio.errors import ConfigError
from studio.formats import read_adapter, write_adapter
from studio.formats.metadata import merged
from studio.formats.state import AdapterState
from studio.runs import Run
from studio.settings import load
from trainers.sd_metadata import settings_of

SETTINGS = (
    *("train.steps=2", "train.batch_size=2", "train.sample_every=0", "train.seed=7", "data.resolution=64"),
    *("data.bucket_step=16", "data.flip=true", "adapter.rank=3", "adapter.alpha=2", "adapter.dropout=0.1"),
    *("adapter.rank_schedule={1: 4}", "optimizer.lr=0.002", "optimizer.betas=[0.8, 0.9]", "samples.steps=1"),
    *("loss.min_snr_gamma=5", "loss.caption_dropout=0.2", 'samples.prompts=["a cat"]', "output.name=cats"),
    'adapter.overrides={"*attn1.to_k": {"method": "dora"}}',
)


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "secret" / "pictures"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (64, 64), (70 * i, 90, 200 - 50 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"inkstyle, a cat, number {i}")
    return folder


def studio(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a command run in this process."""
    monkeypatch.setattr(sys, "argv", ["studio", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def trained(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> Path:
    """The file of a run that the command line trains into `folder`."""
    assert studio(monkeypatch, "train-sd", "--output-dir", str(folder), *arguments) == 0
    (run,) = folder.iterdir()
    (file,) = run.glob("*.safetensors")
    return file


def sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture
def first(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = ("--model", str(tiny.folder("sd15")), "--data", str(pictures))
    return trained(monkeypatch, tmp_path / "first", *base, *sets(*SETTINGS))


def test_a_file_trains_again_to_the_same_bits(
    first: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another place: pictures and base are moved, and nothing but the file says how."""
    moved = Path(shutil.copytree(pictures, tmp_path / "elsewhere"))
    base = Path(shutil.copytree(tiny.folder("sd15"), tmp_path / "base"))
    shutil.rmtree(pictures)
    again = trained(monkeypatch, tmp_path / "again", "--config", str(first), "--data", str(moved), "--model", str(base))
    one, two = load_file(first), load_file(again)
    assert one.keys() == two.keys() and any(tensor.any() for key, tensor in one.items() if "lora_up" in key)
    assert all(torch.equal(one[key], two[key]) for key in one)
    told, repeated = (load(TrainSDConfig, file.parent / "config.yaml").model_dump() for file in (first, again))
    for config in (told, repeated):
        del config["model"]["source"], config["data"]["folder"], config["output"]["folder"]
    assert told == repeated


def test_flags_win_over_the_file(first: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = trained(
        *(monkeypatch, tmp_path / "again", "--config", str(first), "--data", str(pictures)),
        *("--model", str(tiny.folder("sd15")), "--steps", "1", *sets("adapter.rank_schedule={}", "adapter.rank=2")),
    )
    config = load(TrainSDConfig, again.parent / "config.yaml")
    assert (config.train.steps, config.adapter.rank, config.adapter.alpha, config.train.seed) == (1, 2, 2, 7)


def test_the_file_names_no_folders_and_asks_for_them(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = read_adapter(first).metadata
    assert "secret" not in str(metadata) and str(tmp_path) not in str(metadata)
    assert json.loads(metadata["studio.config"])["output"]["folder"] == "runs"
    assert studio(monkeypatch, "train-sd", "--config", str(first)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--data FOLDER (there, it was called 'pictures')" in said
    assert "--model FOLDER (there, it was called 'sd15')" in said
    assert studio(monkeypatch, "train-sd", "--config", str(first), "--data", str(tmp_path)) == 2
    assert "--data" not in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))


def test_a_preset_below_a_whole_file_is_refused(
    first: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert studio(monkeypatch, "train-sd", "--config", str(first), "--preset", "sd15-style") == 2
    assert "Leave out --preset" in capsys.readouterr().err


def test_the_demo_needs_nothing_but_the_file(tmp_path: Path) -> None:
    """The built-in base and the demo's pictures are in every installation."""
    from trainers.sd_metadata import _shareable

    config = TrainSDConfig.model_validate({"samples": {"prompts": ["a kite"]}, "output": {"folder": "elsewhere"}})
    settings, left_out = _shareable(config)
    file = write_adapter(
        AdapterState("sd", tensors(), {"studio.config": json.dumps(settings), "studio.config.left_out": "[]"}),
        tmp_path / "demo",
    )
    assert left_out == []
    held = TrainSDConfig.model_validate(settings_of(file, given=()))
    assert held == config.model_copy(update={"output": config.output.model_copy(update={"folder": "runs"})})


def tensors() -> dict[str, dict[str, torch.Tensor]]:
    down, up = torch.ones(2, 16), torch.ones(16, 2)
    entry = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    return {"unet.mid_block.attentions.0.proj_in": entry}


def test_a_file_that_does_not_say_how_it_was_trained(tmp_path: Path) -> None:
    for name, metadata, message in (
        ("stranger", {}, "no valid 'studio.config'"),
        ("broken", {"studio.config": "{"}, "no valid 'studio.config'"),
        ("blend", merged([{}, {}], ["a", "b"], [1, 0.5], "linear"), "made of others: a, b"),
    ):
        file = write_adapter(AdapterState("sd", tensors(), metadata), tmp_path / name)
        with pytest.raises(ConfigError, match=message):
            settings_of(file, given=())
    with pytest.raises(ConfigError, match="there is no adapter"):
        settings_of(tmp_path / "missing.safetensors", given=())


def test_a_setting_of_another_version_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = {"studio.config": json.dumps({"train": {"stpes": 5}})}
    file = write_adapter(AdapterState("sd", tensors(), metadata), tmp_path / "old")
    assert studio(monkeypatch, "train-sd", "--config", str(file)) == 2
    assert "unknown key 'train.stpes'. Did you mean train.steps" in " ".join(capsys.readouterr().err.split())


def test_a_trained_file_shows_itself(first: Path) -> None:
    metadata = read_adapter(first).metadata
    assert metadata["modelspec.trigger_phrase"] == "inkstyle, a cat"
    head, _, content = metadata["modelspec.thumbnail"].partition(",")
    assert head == "data:image/jpeg;base64"
    picture = Image.open(BytesIO(base64.b64decode(content)))
    assert picture.size == (64, 64) and Run.open(first.parent).status.state == "finished"


def test_settings_survive_every_format(first: Path, tmp_path: Path) -> None:
    """In a PEFT folder too, which cannot hold every method: a plain LoRA carries the same metadata."""
    given = ("data.folder", "model.source")
    state = AdapterState("sd", tensors(), read_adapter(first).metadata)
    for format in ("kohya", "diffusers", "peft"):
        assert settings_of(write_adapter(state, tmp_path / format, format), given) == settings_of(first, given)
    save_file({"junk": torch.ones(1)}, tmp_path / "junk.safetensors", {"studio.config": "{}"})
    with pytest.raises(ConfigError):
        settings_of(tmp_path / "junk.safetensors", given)
