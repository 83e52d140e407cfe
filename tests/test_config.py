"""Layers of settings, their errors, and the shipped presets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from studio.config import TrainSDConfig, check_trackers
from studio.errors import ConfigError
from studio.settings import fields, load, presets, resolve


def given(tmp_path: Path, **groups: object) -> Path:
    file = tmp_path / "given.json"
    file.write_text(json.dumps(groups))
    return file


def test_later_layers_win(tmp_path: Path) -> None:
    file = given(tmp_path, train={"steps": 7, "seed": 7, "batch_size": 7})
    flags = {"train.seed": 8, "train.batch_size": 8, "adapter.rank": None}
    config = resolve(TrainSDConfig, None, file, flags, ["train.batch_size=9"])
    train = config.train
    assert (train.steps, train.seed, train.batch_size) == (7, 8, 9)
    assert train.sample_every == 20  # the preset of the built-in base
    assert train.max_grad_norm == 1.0  # the default
    assert config.adapter.rank == 16


def test_every_suffix_says_the_same(tmp_path: Path) -> None:
    texts = {
        "a.yaml": "optimizer: {lr: 1e-3}",
        "a.toml": "[optimizer]\nlr = 1e-3",
        "a.json": '{"optimizer": {"lr": 1e-3}}',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert resolve(TrainSDConfig, file=tmp_path / name).optimizer.lr == 1e-3


def test_values_of_set_are_yaml() -> None:
    sets = ["adapter.targets=[attention, '*.to_q']", "optimizer.lr=2e-4", "data.flip=true", "output.name=12"]
    config = resolve(TrainSDConfig, sets=[*sets, 'adapter.overrides={"*.to_q": {rank: 4}}'])
    assert config.adapter.targets == ["attention", "*.to_q"]
    assert (config.optimizer.lr, config.data.flip, config.output.name) == (2e-4, True, "12")
    assert config.adapter.overrides["*.to_q"].model_dump(exclude_none=True) == {"rank": 4}


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("attention, feed-forward", ["attention", "feed-forward"]),
        (r"re:.*\.to_(q|k){1,2},to_v", [r"re:.*\.to_(q|k){1,2}", "to_v"]),
        ("re:.*[,(],to_v", ["re:.*[,(],to_v"]),  # brackets that do not close hold the rest together
    ],
)
def test_a_comma_outside_brackets_separates_targets(text: str, targets: list[str]) -> None:
    assert resolve(TrainSDConfig, flags={"adapter.targets": text}).adapter.targets == targets


def test_a_single_prompt_is_a_list_of_one() -> None:
    assert resolve(TrainSDConfig, sets=["samples.prompts=a cat, sitting"]).samples.prompts == ["a cat, sitting"]


def test_alpha_is_left_open() -> None:
    """It then follows each layer's own rank, which an override may change."""
    assert resolve(TrainSDConfig, flags={"adapter.rank": 8}).adapter.alpha is None
    assert resolve(TrainSDConfig, flags={"adapter.rank": 8, "adapter.alpha": 1.0}).adapter.alpha == 1


def test_trackers_must_be_installed() -> None:
    check_trackers([])
    check_trackers(["pytest"])
    with pytest.raises(ConfigError, match=r"no-such-tracker.*adapter-studio\[track\]"):
        check_trackers(["no-such-tracker"])


def test_the_preset_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    resolve(TrainSDConfig)
    assert caplog.messages == ["preset: builtin-style"]


def test_an_entry_of_a_table_is_set_by_itself(tmp_path: Path) -> None:
    file = given(tmp_path, adapter={"options": {"init": "olora", "lr_ratio": 2}})
    sets = ["adapter.options.init=pissa", "adapter.overrides.unet.*.to_q={rank: 4}"]
    config = resolve(TrainSDConfig, file=file, sets=sets)
    assert config.adapter.options == {"init": "pissa", "lr_ratio": 2}
    assert config.adapter.overrides["unet.*.to_q"].rank == 4
    whole = resolve(TrainSDConfig, file=file, sets=["adapter.options={freeze_down: true}"])
    assert whole.adapter.options == {"freeze_down": True}


def test_the_builtin_base_has_preset_data_and_name(tmp_path: Path) -> None:
    builtin = resolve(TrainSDConfig)
    assert (builtin.train.steps, builtin.data.resolution, builtin.output.name) == (70, 64, "demo")
    assert "rocket" in builtin.samples.prompts
    own = resolve(TrainSDConfig, flags={"data.folder": str(tmp_path)})
    assert (own.train.steps, own.samples.prompts) == (70, []), "own pictures are drawn by their own captions"
    other = resolve(TrainSDConfig, flags={"model.source": "a/b", "data.folder": str(tmp_path)})
    assert (other.train.steps, other.data.resolution, other.output.name) == (1500, 512, tmp_path.name)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("adapter.rnak=3", "unknown key 'adapter.rnak'. Did you mean adapter.rank?"),
        ("rank=3", "Did you mean adapter.rank?"),
        ("adapter.rank=abc", "adapter.rank is 'abc'"),
        ("adapter.rank=0", "adapter.rank is 0"),
        ("output.format=kohyaa", "'lycoris' or 'onetrainer'"),
        ("schedule.warmup_steps=5", "constant_with_warmup"),
        ("data.resolution=100", "multiple of 8; the nearest is 96"),
        ('adapter.overrides={"*.to_q": {rank: many}}', "adapter.overrides.*.to_q.rank is 'many'"),
        ('adapter.overrides={"*.to_q": {dropout: 1}}', "adapter.overrides.*.to_q.dropout is 1"),
        ('adapter.overrides={"*.to_q": {rnk: 4}}', "unknown setting 'rnk'. Did you mean rank?"),
        ('adapter.overrides={"*.to_q": 4}', "adapter.overrides.*.to_q is 4"),
        ("adapter.rank", "KEY=VALUE"),
        ("model.source=a/b", "--data FOLDER"),
    ],
)
def test_bad_settings_say_what_and_where(sets: str, message: str) -> None:
    with pytest.raises(ConfigError) as problem:
        resolve(TrainSDConfig, sets=[sets])
    assert message in str(problem.value)


def test_a_warmup_must_end() -> None:
    with pytest.raises(ConfigError, match=r"warmup_steps is 20; .* train\.steps, which is 20"):
        resolve(TrainSDConfig, sets=["schedule.name=cosine", "schedule.warmup_steps=20", "train.steps=20"])


def test_an_unknown_key_of_a_file_names_file_and_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"given\.json.*'train\.stpes'.*train\.steps"):
        resolve(TrainSDConfig, file=given(tmp_path, train={"stpes": 3}))
    with pytest.raises(ConfigError, match=r"unknown key 'trian'.*train"):
        resolve(TrainSDConfig, file=given(tmp_path, trian={"steps": 3}))


@pytest.mark.parametrize("preset", presets())
def test_every_preset_loads(preset: str, tmp_path: Path) -> None:
    config = resolve(TrainSDConfig, preset=preset, flags={"data.folder": str(tmp_path)})
    assert config.data.folder == str(tmp_path)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="sd15-style"):
        resolve(TrainSDConfig, preset="sd15-stile")


def test_a_saved_config_loads_equal(tmp_path: Path) -> None:
    config = resolve(TrainSDConfig, sets=["adapter.rank=3", "adapter.overrides={to_q: {lr: 1e-3}}"])
    assert load(TrainSDConfig, given(tmp_path, **config.model_dump(mode="json"))) == config


def test_every_field_is_described() -> None:
    assert all(field.description for field in fields(TrainSDConfig).values())
