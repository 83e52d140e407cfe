"""LoRAs named on the command line and in prompts: found, applied with their strength, and taken off."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from studio.adapters import AdapterConfig, AdapterPlan, inject
from studio.diffusion.generate import GenerateRequest, generate
from studio.diffusion.lora import apply_loras, loras, parse_lora, wanted_loras
from studio.errors import ConfigError
from studio.families.loading import load_base
from studio.formats import read_adapter, write_adapter
from studio.formats.state import AdapterState

REQUEST = GenerateRequest("a cat", steps=2, seed=1)


@pytest.fixture(scope="module")
def base():
    return load_base(str(tiny.folder("sd15")))


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """Two LoRAs with random factors, "ink" and, one folder deeper, "wash"."""
    family, models = base
    place = tmp_path_factory.mktemp("loras")
    (place / "deep").mkdir()
    for seed, path in enumerate([place / "ink.safetensors", place / "deep" / "wash.safetensors"]):
        plan = AdapterPlan(("attention", "text-encoder"), config=AdapterConfig(rank=2, alpha=1.0))
        adapters = inject(family.prefixes(models), plan, family.roles, seed)
        for place_, parameter in enumerate(adapters.parameters()):
            generator = torch.Generator().manual_seed(100 * seed + place_)
            parameter.data.normal_(0, 0.5, generator=generator)
        write_adapter(AdapterState(family.name, adapters.state()), path)
        adapters.detach()
    return place


def draw(base) -> np.ndarray:
    return np.asarray(generate(*base, REQUEST)[0]).astype(int)


def test_file_and_strength():
    assert parse_lora("ink.safetensors:0.8") == ("ink.safetensors", 0.8)
    assert parse_lora("ink.safetensors:-1") == ("ink.safetensors", -1.0)
    assert parse_lora("ink.safetensors") == ("ink.safetensors", 1.0)
    assert parse_lora(r"C:\loras\ink.safetensors") == (r"C:\loras\ink.safetensors", 1.0)
    assert parse_lora(r"C:\loras\ink.safetensors:.5") == (r"C:\loras\ink.safetensors", 0.5)
    assert parse_lora("user/repo:0.5") == ("user/repo", 0.5)
    with pytest.raises(ConfigError, match=r"'much'.*is not a strength"):
        parse_lora("ink.safetensors:much")


def test_a_path_with_a_colon_and_a_number_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("take:2").mkdir()
    assert parse_lora("take:2") == ("take:2", 1.0)


def test_prompt_names_are_found_in_folders_and_among_the_given_files(folder):
    ink, wash = str(folder / "ink.safetensors"), str(folder / "deep" / "wash.safetensors")
    assert wanted_loras("a <lora:ink:0.5> <lora:wash>", [], [folder]) == ("a", [(ink, 0.5), (wash, 1.0)])
    assert wanted_loras("a", [f"{ink}:0.3"], []) == ("a", [(ink, 0.3)])
    assert wanted_loras("a <lora:ink:0.5>", [f"{ink}:0.3"], [folder]) == ("a", [(ink, 0.5)])


def test_unknown_and_ambiguous_names_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"LoRA 'inc' in the prompt.*Did you mean ink"):
        wanted_loras("a <lora:inc:0.5>", [], [folder])
    with pytest.raises(ConfigError, match="'ink' is named twice"):
        wanted_loras("a <lora:ink:0.5><lora:ink:0.2>", [], [folder])
    with pytest.raises(ConfigError, match="is named twice"):
        wanted_loras("a", ["ink.safetensors:0.5", "ink.safetensors"], [folder])
    (tmp_path / "ink.safetensors").touch()
    with pytest.raises(ConfigError, match=r"could be any of.*Give the file with --lora"):
        wanted_loras("a <lora:ink:0.5>", [], [folder, tmp_path])


def test_loras_act_add_up_and_come_off(base, folder):
    ink, wash = str(folder / "ink.safetensors"), str(folder / "deep" / "wash.safetensors")
    plain = draw(base)
    with loras(*base, [(ink, 0.8), (wash, 0.0)]) as applied:
        changed = draw(base)
    state = read_adapter(ink)
    (lora,) = applied
    assert (lora.name, lora.source, lora.strength, lora.layers) == ("ink", ink, 0.8, len(state.tensors))
    assert len(lora.sha) == 12 and int(lora.sha, 16)
    assert np.abs(changed - plain).max() > 2
    with loras(*base, [(ink, 0.5), (ink, 0.3)]):
        assert np.abs(draw(base) - changed).max() <= 1
    assert np.array_equal(draw(base), plain)


def test_a_file_for_another_family_is_told_apart(folder):
    ink = str(folder / "ink.safetensors")
    with pytest.raises(ConfigError, match=r"ink\.safetensors: the file is for sd, the base is sdxl"):
        apply_loras(*load_base(str(tiny.folder("sdxl"))), [(ink, 1.0)])


def test_a_failure_leaves_nothing_attached(base, folder, tmp_path):
    plain = draw(base)
    ink = str(folder / "ink.safetensors")
    with pytest.raises(ConfigError):
        apply_loras(*base, [(ink, 1.0), (str(tmp_path / "missing.safetensors"), 1.0)])
    with pytest.raises(ZeroDivisionError), loras(*base, [(ink, 1.0)]):
        1 / 0  # noqa: B018
    assert np.array_equal(draw(base), plain)


def test_hash_is_of_the_tensors_alone(base, folder, tmp_path):
    state = read_adapter(folder / "ink.safetensors")
    shas = set()
    for name in ("a", "b"):
        renamed = dataclasses.replace(state, metadata={"ss_output_name": name})
        path = write_adapter(renamed, tmp_path / f"{name}.safetensors")
        with loras(*base, [(str(path), 1.0)]) as (lora,):
            shas.add(lora.sha)
    assert len(shas) == 1
