"""`studio check`: its table, its JSON, and what its exit code answers."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from studio.adapters import AdapterConfig, AdapterPlan
from studio.cli import app
from studio.errors import ConfigError
from studio.formats import write_adapter
from studio.formats.state import AdapterState

BASE = ("--base", str(tiny.folder("sd15")))


def check(*arguments):
    """(exit code, standard output); raises what the command raises."""
    result = CliRunner().invoke(app, ["check", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A LoRA and a DoRA for the tiny Stable Diffusion."""
    place, found = tmp_path_factory.mktemp("files"), {}
    for method in ("lora", "dora"):
        plan = AdapterPlan(("attention",), config=AdapterConfig(method, 4, 2.0))
        family, _, adapters = tiny.random_adapter("sd15", plan)
        found[method] = write_adapter(tiny.state_of(family, adapters), place / method)
    return found


def test_the_table_has_one_line_for_each_tool(files):
    code, text = check(files["lora"], *BASE)
    lines = [line for line in text.splitlines() if not line.startswith(" ")]
    assert code == 0
    assert lines[0].split("  ")[0] == "tool" and len(lines) == 9
    assert lines[1].endswith("exact") and len({line.index(" of ") for line in lines[1:]}) == 1
    assert "studio convert FILE --to peft" in text


def test_a_tool_that_is_asked_for_decides(files):
    assert check(files["lora"], *BASE, "--for", "diffusers")[0] == 0
    code, text = check(files["dora"], *BASE, "--for", "diffusers")
    assert code == 1 and "drops dora_scale" in text and "off by" in text and "ComfyUI" not in text
    assert check(files["dora"], *BASE, "--for", "comfyui")[0] == 1, "it uses all, and computes something else"
    assert check(files["dora"], *BASE, "--for", "LyCORIS")[0] == 0
    assert check(files["dora"], *BASE)[0] == 0, "some tool uses all of it"
    with pytest.raises(ConfigError, match="unknown tool 'comfi'"):
        check(files["lora"], "--for", "comfi")


def test_the_json_is_complete(files):
    _, text = check(files["dora"], *BASE, "--json")
    found = json.loads(text)
    assert (found["family"], found["base"]) == ("sd", BASE[1])
    report = found["consumers"]["sd-scripts"]
    assert len(report["unused"]) == report["total"] - report["used"] > 5
    assert report["error"] > 0.01 and report["layer"].startswith("unet.") and report["notes"]


def test_a_file_that_is_not_valid_is_checked_against_a_base(files, tmp_path):
    strange = tmp_path / "strange.safetensors"
    save_file({**load_file(files["lora"]), "lora_unet_conv_in.hada_w1_a": torch.ones(1)}, strange)
    with pytest.raises(ConfigError, match="conv_in"):
        check(strange)
    code, text = check(strange, *BASE)
    assert code == 1 and "not known" in text and "What the file means is not known" in text


def test_a_base_of_another_family_is_refused(files):
    with pytest.raises(ConfigError, match="for the family 'sd', and the base .* of the family 'sdxl'"):
        check(files["lora"], "--base", tiny.folder("sdxl"))


def test_an_embedding_has_no_keys_for_these_tools(tmp_path):
    tokens = {"ink": {"text_encoder": torch.ones(1, 768)}}
    path = write_adapter(AdapterState("sd", {}, embeddings=tokens), tmp_path / "ink", "embedding")
    with pytest.raises(ConfigError, match="trained tokens alone"):
        check(path)
