"""`studio convert`: any layout to any other, and methods baked into what every tool reads."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import tiny
import torch
from layers import close
from typer.testing import CliRunner

from studio.adapters import AdapterConfig, AdapterPlan, AdapterSet, WeightView, attach_adapters, named_targets
from studio.algebra.bake import bake_diff, bake_lora
from studio.cli import app
from studio.commands import files
from studio.config import Layout, TrainSDConfig
from studio.errors import ConfigError
from studio.families import FAMILIES
from studio.formats import FORMATS, format_of, read_adapter, write_adapter
from studio.formats.state import AdapterState

TARGETS = ("attention", "convolutions", "text-encoder")


def adapted(method: str) -> tuple[AdapterState, dict[str, WeightView]]:
    """An adapter of random factors for the tiny base, and the weights of its layers."""
    plan = AdapterPlan(TARGETS, config=AdapterConfig(method, 4, 2.0))
    family, models, adapters = tiny.random_adapter("sd15", plan)
    state = tiny.state_of(family, adapters)
    adapters.detach()
    targets = named_targets(family.prefixes(models))
    return state, {name: WeightView(targets[name]) for name in state.tensors}


def prediction(tensors) -> torch.Tensor:
    family, models = FAMILIES["sd"], tiny.random_adapter("sd15")
    models[2].detach()
    attached: AdapterSet = attach_adapters(family.prefixes(models[1]), tensors)
    predicted = tiny.predict(models[0], models[1])
    attached.detach()
    return predicted


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("to", [name for name in FORMATS if name not in ("kohya", "embedding")])
def test_a_file_comes_back_through_every_layout(to, tmp_path):
    state, _ = adapted("lora")
    first = write_adapter(state, tmp_path / "first")
    run(first, "--to", to, "-o", tmp_path / "second")
    second = tmp_path / ("second" if to == "peft" else "second.safetensors")
    assert format_of(second) == ("kohya" if to == "onetrainer" else to)
    run(second, "--to", "kohya", "-o", tmp_path / "third")
    there, back = read_adapter(first).tensors, read_adapter(tmp_path / "third.safetensors").tensors
    assert there.keys() == back.keys()
    assert all(torch.equal(one, back[name][suffix]) for name, entry in there.items() for suffix, one in entry.items())


def test_what_is_unknown_or_plays_no_part_is_refused(tmp_path):
    file = write_adapter(adapted("lora")[0], tmp_path / "file")
    for arguments, message in {
        ("--to", "cumfyui"): "Did you mean comfyui",
        ("--to", "peft", "--rank", "4"): "--rank is for --bake lora",
        ("--to", "peft", "--base", "builtin"): "--base for --bake",
        ("--to", "kohya", "--bake", "diff", "--rank", "4"): "--rank is for --bake lora",
        ("--to", "kohya", "-o", str(file)): "exists already",
    }.items():
        with pytest.raises(ConfigError, match=message):
            CliRunner().invoke(app, ["convert", str(file), *arguments], catch_exceptions=False)


def test_the_help_and_the_schemas_name_every_layout():
    layouts = set(FORMATS)
    assert all(name in files.TO_HELP for name in layouts)
    schema = TrainSDConfig.model_fields["output"].annotation
    assert set(get_args(schema.model_fields["format"].annotation)) == set(get_args(Layout)) == layouts - {"embedding"}


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr", "oft", "diff"])
def test_full_differences_predict_the_same(method):
    state, bases = adapted(method)
    baked = bake_diff(state, bases)
    assert set(baked.methods) == {"diff"}
    assert close(prediction(baked.tensors), prediction(state.tensors))
    assert baked.metadata["ss_output_name"] == "tiny"


def test_low_rank_methods_become_a_lora_exactly():
    state, bases = adapted("tucker")
    baked = bake_lora(state, None, bases)
    assert set(baked.methods) == {"lora"} and set(baked.residuals.values()) == {0.0}
    assert close(prediction(baked.tensors), prediction(state.tensors))


def test_other_methods_need_a_rank_and_state_their_errors():
    state, bases = adapted("oft")
    with pytest.raises(ConfigError, match=r"may have any rank: .*--rank 32"):
        bake_lora(state, None, bases)
    whole, cut = bake_lora(state, 512, bases), bake_lora(state, 2, bases)
    assert set(whole.methods) == {"lora"}
    assert close(prediction(whole.tensors), prediction(state.tensors))
    for name, error in cut.residuals.items():
        delta = bake_diff(AdapterState("sd", {name: state.tensors[name]}), bases).tensors[name]["diff"]
        short = bake_diff(AdapterState("sd", {name: cut.tensors[name]})).tensors[name]["diff"]
        assert error == pytest.approx(float((delta - short.reshape(delta.shape)).norm() / delta.norm()), abs=1e-4)
    assert max(cut.residuals.values()) > 0.1


def test_a_bias_has_no_lora():
    state, bases = adapted("diff")
    with pytest.raises(ConfigError, match="change their bias too"):
        bake_lora(state, 4, bases)


def test_the_command_says_how_far_off_it_is(tmp_path):
    file = write_adapter(adapted("loha")[0], tmp_path / "file")
    base = ("--base", tiny.folder("sd15"))
    with pytest.raises(ConfigError, match=r"cannot hold the method 'loha'.*--bake lora"):
        CliRunner().invoke(app, ["convert", str(file), "--to", "diffusers"], catch_exceptions=False)
    found = json.loads(
        run(file, "--to", "diffusers", "--bake", "lora", "--rank", 8, *base, "--json", "-o", file.parent / "a")
    )
    assert 0 < found["largest_error"] == max(found["errors"].values()) < 1
    text = run(file, "--to", "diffusers", "--bake", "lora", "--rank", 8, *base, "-o", file.parent / "b")
    assert f"largest error {found['largest_error']:.2e} of what a layer changes" in text
    assert set(read_adapter(found["file"]).methods) == {"lora"}
    assert "exact" in run(file, "--to", "comfyui", "--bake", "diff", *base, "-o", file.parent / "c")
