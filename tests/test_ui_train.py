"""The train screen without a browser: presets by goal and base, datasets by name, the check before the start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from studio import paths
from studio.config import TrainSDConfig
from studio.data.images import scan_folder
from studio.errors import ConfigError, DatasetError
from studio.lighter import lighter
from studio.settings import fields, presets
from studio.status import write_atomic
from studio.ui import form, train_preflight
from studio.ui import train_pictures as pictures
from studio.ui import train_settings as settings
from studio.workspace import Workspace

BASES = {"builtin": "builtin", "sd15": "someone/sd-model", "sdxl": "someone/my-SDXL-model"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "home").create()


# -- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", settings.GOALS)
@pytest.mark.parametrize("base", BASES)
def test_every_goal_has_a_preset_for_every_base(goal: str, base: str) -> None:
    preset = settings.preset_for(goal, BASES[base])
    assert preset == f"{base}-{goal}" and preset in presets()
    values = settings.preset_values(preset)
    assert not settings.differences(values, preset) and settings.preset_advice(preset)
    assert (values["model.source"] == "builtin") == (base == "builtin")


def test_every_setting_has_one_field_or_comes_from_elsewhere() -> None:
    assert len(settings.form_keys()) == len(set(settings.form_keys()))
    assert set(settings.form_keys()) | set(settings.ELSEWHERE) == set(fields(TrainSDConfig))
    assert len({settings.label(key) for key in settings.form_keys()}) == len(settings.form_keys())


@pytest.mark.parametrize("preset", presets())
def test_what_the_fields_show_is_the_preset(preset: str) -> None:
    values = settings.preset_values(preset)
    shown = {key: form.show(TrainSDConfig, key, value) for key, value in values.items()}
    assert form.read(TrainSDConfig, shown) == values


def test_settings_that_matter_changed_and_found() -> None:
    values = {**settings.preset_values("builtin-style"), "train.seed": 7, "samples.prompts": ["a dog"]}
    matter = settings.shown(settings.MATTERS, "", "style", values, "builtin-style")
    assert {"train.steps", "loss.caption_dropout"} <= matter and "data.flip" not in matter
    assert settings.differences(values, "builtin-style") == {"train.seed": (7, 0)}, "prompts are content"
    assert settings.shown(settings.CHANGED, "", "style", values, "builtin-style") == {"train.seed"}
    found = settings.shown(settings.MATTERS, "mirror", "style", values, "builtin-style")
    assert found == {"data.flip"}
    assert "train.gradient_checkpointing" in settings.shown("", "less memory", "style", values, "builtin-style")
    assert settings.shown(settings.ALL, "", "face", values, "builtin-style") == set(settings.form_keys())


def test_a_config_is_the_form_the_dataset_and_the_workspace(workspace: Workspace) -> None:
    values = {**settings.preset_values("builtin-style"), "train.steps": 5}
    config = settings.make_config(values, workspace.datasets / "cats", " My cats ", workspace.runs)
    assert (config.data.folder, config.output.folder) == (str(workspace.datasets / "cats"), str(workspace.runs))
    assert (config.output.name, config.train.steps) == ("My cats", 5)
    with pytest.raises(ConfigError, match=r"(?s)train.steps is 0.*optimizer.lr is -1"):
        settings.make_config({**values, "train.steps": 0, "optimizer.lr": -1}, workspace.datasets, "", workspace.runs)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [("adapter.alpha", "much", "no number"), ("adapter.options", "{a", "not a YAML value")],
)
def test_half_typed_fields_say_so(key: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        form.read(TrainSDConfig, {key: text})


def test_fixes_are_settings_that_change_and_end() -> None:
    config = TrainSDConfig.model_validate({"train": {"batch_size": 4}, "data": {"resolution": 1024}})
    for _ in range(40):
        fixes = lighter(config)
        if not fixes:
            break
        flat = form.flat(config.model_dump())
        for fix in fixes:
            assert all(flat[key] != value for key, value in fix.settings.items())
        config = TrainSDConfig.model_validate(form.nested({**flat, **fixes[0].settings}))
    assert not lighter(config) and config.train.gradient_checkpointing and config.train.batch_size == 1
    assert config.train.gradient_accumulation == 4, "the first fix keeps what a step learns from"


# -- datasets ---------------------------------------------------------------------------------


def test_uploads_make_a_dataset_and_add_to_it(workspace: Workspace, tmp_path: Path) -> None:
    demo = sorted((paths.assets() / "demo").glob("*.png"))[:3]
    files = [str(shutil.copy(file, tmp_path)) for file in (*demo, demo[0].with_suffix(".txt"), Path(__file__))]
    name, note = pictures.take_files(workspace, files, "", "")
    assert name == "my-pictures" and note.startswith("3 pictures and 1 captions") and "test_ui_train.py" in note
    more = str(shutil.copy(demo[0], tmp_path / "other.png"))
    assert pictures.take_files(workspace, [more], name, "ignored")[0] == name
    assert len(scan_folder(workspace.datasets / name).items) == 4 and pictures.names(workspace) == [name]
    nothing = str(shutil.copy(__file__, tmp_path / "notes.py"))
    assert pictures.take_files(workspace, [nothing], "", "x")[0] == "" and pictures.names(workspace) == [name]


def test_the_demo_is_copied_once_and_can_be_edited(workspace: Workspace) -> None:
    assert pictures.take_demo(workspace) == pictures.take_demo(workspace) == "demo"
    assert pictures.save_caption(workspace, ["demo", "bear.png", "a bear\nindeed"]) == ""
    assert (workspace.datasets / "demo" / "bear.txt").read_text() == "a bear indeed\n"
    assert (paths.assets() / "demo" / "bear.txt").read_text().strip() == "bear"


HOSTILE: list[Any] = [
    *(["..", "a.png", "x"], ["demo", "../../a.png", "x"], ["/etc", "passwd", "x"], ["demo", "/etc/passwd", "x"]),
    *([".", "demo/bear.png", "x"], ["demo", "nothing.png", "x"], ["demo\0", "bear.png", "x"], [], ["demo"], None, 5),
    *(
        ["demo/../demo", "bear.png", "x"],
        ["", "bear.png", "x"],
        ["demo", "", "x"],
        ["demo", "bear.png/../bear.png/x", "x"],
    ),
]


@pytest.mark.parametrize("given", HOSTILE, ids=str)
def test_a_page_writes_captions_of_pictures_only(given: Any, workspace: Workspace) -> None:
    pictures.take_demo(workspace)
    before = {file: file.read_bytes() for file in workspace.root.parent.rglob("*") if file.is_file()}
    assert pictures.save_caption(workspace, given)
    assert {file: file.read_bytes() for file in workspace.root.parent.rglob("*") if file.is_file()} == before


def test_a_folder_of_this_machine_is_copied(workspace: Workspace, tmp_path: Path) -> None:
    assert pictures.take_folder(workspace, paths.assets() / "demo", "") == "demo"
    with pytest.raises(DatasetError, match="no pictures"):
        pictures.take_folder(workspace, tmp_path / "home" / "queue", "empty")
    with pytest.raises(DatasetError, match="already"):
        pictures.take_folder(workspace, workspace.datasets / "demo", "")
    assert pictures.names(workspace) == ["demo"]


@pytest.mark.parametrize(
    ("client", "headers", "local"),
    [
        ("127.0.0.1", {"host": "127.0.0.1:7860"}, True),
        ("127.0.0.1", {"host": "localhost:7860"}, True),
        ("::1", {"host": "[::1]:7860"}, True),
        ("127.0.0.1", {"host": "localhost:7860", "authorization": "Basic eA=="}, False),
        ("127.0.0.1", {"host": "studio.example:7860"}, False),
        ("127.0.0.1", {"host": "localhost:7860", "x-forwarded-for": "1.2.3.4"}, False),
        ("192.168.0.9", {"host": "localhost:7860"}, False),
        ("127.0.0.1", {}, False),
    ],
)
def test_who_may_name_folders(client: str, headers: dict[str, str], local: bool) -> None:
    assert pictures.is_local(SimpleNamespace(client=SimpleNamespace(host=client), headers=headers)) is local


# -- the check --------------------------------------------------------------------------------


@pytest.fixture
def config(workspace: Workspace) -> TrainSDConfig:
    pictures.take_demo(workspace)
    (workspace.datasets / "demo" / "broken.png").write_bytes(b"no picture")
    values = settings.preset_values("builtin-style")
    return settings.make_config(values, workspace.datasets / "demo", "", workspace.runs)


def test_the_check_counts_without_a_model(config: TrainSDConfig) -> None:
    counts = train_preflight.count(config)
    assert counts.kept == 32 and list(counts.dropped) == ["broken.png"] and counts.epochs == 70
    card = train_preflight.card(counts, None, "loading", True)
    assert "<b>32</b> used" in card and "broken.png" in card and "loading" in card


def test_a_check_is_measured_once(workspace: Workspace, config: TrainSDConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studio.jobs.ensure_supervisor", lambda workspace: False)
    folder = train_preflight.probe(workspace, config)
    assert train_preflight.measured(folder)[0] is None and train_preflight.measured(folder)[2]
    assert train_preflight.probe(workspace, config) == folder, "it waits already"
    renamed = config.model_copy(update={"output": config.output.model_copy(update={"name": "other"})})
    assert train_preflight.probe(workspace, renamed) == folder, "the name changes nothing"
    write_atomic(folder / "result.json", json.dumps({"files": [], "facts": FACTS}))
    plan, _, more = train_preflight.measured(train_preflight.probe(workspace, config))
    assert plan == FACTS and not more
    card = train_preflight.card(train_preflight.count(config), plan, "", False, before=3 * 2**30)
    assert "2.0 GiB</b> at the peak (before: 3.0 GiB), 1.0 GiB are free" in card and "does not fit" in card
    (workspace.datasets / "demo" / "broken.png").unlink()
    other = train_preflight.probe(workspace, config)
    assert other != folder, "other pictures"
    train_preflight.forget(workspace, other)
    assert train_preflight.measured(other)[1:] == ("cancelled", False)
    assert train_preflight.probe(workspace, config) != other


FACTS = {
    "adapter": {"layers": 3, "parameters": 1000, "adapter_bytes": 4000},
    **{"seconds": 60.0, "sample_seconds": 5.0, "device": "cpu", "fits": False},
    **{"memory_bytes": 2 * 2**30, "memory_free_bytes": 2**30, "disk_bytes": 2**20, "disk_free_bytes": 2**30},
}
