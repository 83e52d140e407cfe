"""An adapter out of two checkpoints: what it does is what fine-tuning did, from models, folders and single files."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import tiny
import torch
from layers import close, randomise
from torch import Tensor

from studio.adapters import AdapterConfig, AdapterPlan, attach_adapters, inject
from studio.algebra import base_weights, extract, model_weights
from studio.algebra.bases import open_base, write_base
from studio.errors import ConfigError
from studio.families import FAMILIES
from studio.families.base import Models
from studio.families.loading import load_base
from studio.formats import read_adapter, write_adapter

TARGETS = ("to_q", "ff.net.0.proj", "conv1", "q_proj", "token_embedding")


@functools.cache
def base() -> Models:
    return load_base(str(tiny.folder("sd15")))[1]


FAMILY = FAMILIES["sd"]


@functools.cache
def tuned() -> Models:
    """Changed by rank 3 in some layers of every kind."""
    models = copy.deepcopy(base())
    plan = AdapterPlan(TARGETS, config=AdapterConfig("lora", rank=3))
    adapters = inject(FAMILY.prefixes(models), plan, FAMILY.roles)
    randomise(adapters)
    adapters.merge()
    merged = copy.deepcopy(models.parts)
    adapters.unmerge()
    adapters.detach()
    for name, part in merged.items():
        models.parts[name].load_state_dict(part.state_dict())
    return models


def weights(models: Models) -> dict[str, Tensor]:
    return dict(model_weights(FAMILY, models))


def prediction(models: Models) -> Tensor:
    return tiny.predict(FAMILY, models)


@pytest.mark.parametrize("criteria", [{"rank": 3}, {"energy": 0.999999}, {}], ids=str)
def test_it_acts_as_the_fine_tuned_model(criteria: dict[str, float], tmp_path: Path) -> None:
    result = extract(weights(base()), weights(tuned()), "sd", **criteria)
    state = read_adapter(write_adapter(result, tmp_path / "extracted"))
    models = copy.deepcopy(base())
    attach_adapters(FAMILY.prefixes(models), state.tensors)
    assert close(prediction(models), prediction(tuned())) and not close(prediction(models), prediction(base()))
    assert {name.rsplit(".", 1)[-1] for name in result.tensors} == {
        "to_q",
        "proj",
        "conv1",
        "q_proj",
        "token_embedding",
    }
    assert set(result.report.ranks.values()) == ({3} if criteria else set())
    assert result.report.residual < 1e-3 and result.report.left_out == ()


def test_folders_and_single_files_are_read_layer_by_layer(tmp_path: Path) -> None:
    expected = extract(weights(base()), weights(tuned()), "sd", 3)
    folders = [tmp_path / "base", tmp_path / "tuned"]
    for folder, models in zip(folders, (base(), tuned()), strict=True):
        pipeline = tiny.pipeline("sd15")
        for name in FAMILY.components:
            getattr(pipeline, name).load_state_dict(models.parts[name].state_dict())
        pipeline.save_pretrained(folder)
    files = [folder.with_suffix(".safetensors") for folder in folders]
    for folder, file in zip(folders, files, strict=True):
        write_base(open_base(folder), file, None, {})
    for pair in (folders, files):
        result = extract(*(base_weights(open_base(path)) for path in pair), "sd", 3)
        assert set(result.tensors) == set(expected.tensors)
        for name, entry in expected.tensors.items():
            assert close(
                *(
                    one["lora_up.weight"].flatten(1) @ one["lora_down.weight"].flatten(1)
                    for one in (entry, result.tensors[name])
                )
            )


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_single_file_has_the_tensors_of_its_folder(kind: str, tmp_path: Path) -> None:
    folder = open_base(tiny.folder(kind))
    write_base(folder, tmp_path / "base.safetensors", None, {})
    file = base_weights(open_base(tmp_path / "base.safetensors"))
    loaded = model_weights(FAMILIES[folder.family], load_base(str(tiny.folder(kind)))[1])
    assert file.keys() == base_weights(folder).keys() == loaded.keys()
    assert all(torch.equal(file[name], tensor) for name, tensor in loaded.items())


def changed(**tensors: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A layer, a norm and a buffer, and what is added to each of their tensors."""
    before = {
        "net.layer.weight": torch.ones(6, 5),
        "net.layer.bias": torch.ones(6),
        "net.norm.weight": torch.ones(6),
        "net.norm.bias": torch.ones(6),
        "net.ids": torch.arange(3),
    }
    after = {
        name: tensor + tensors.get(name.removeprefix("net.").replace(".", "_"), 0) for name, tensor in before.items()
    }
    return before, after


def test_norms_and_biases_are_taken_on_request_and_named_otherwise() -> None:
    pair = changed(layer_weight=1.0, layer_bias=2.0, norm_weight=3.0)
    plain = extract(*pair, "net", 1)
    assert set(plain.tensors) == {"net.layer"} and set(plain.tensors["net.layer"]) == {
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
    }
    assert plain.report.left_out == ("net.layer.bias", "net.norm.weight")
    assert "left out         2: net.layer.bias, net.norm.weight" in str(plain.report)
    whole = extract(*pair, "net", 1, norms=True, biases=True)
    assert {name: set(entry) for name, entry in whole.tensors.items()} == {
        "net.layer": {"diff", "diff_b"},
        "net.norm": {"w_norm"},
    }
    assert whole.report.left_out == () and whole.tensors["net.norm"]["w_norm"].tolist() == [3.0] * 6
    made = json.loads(whole.metadata["studio.blend"])
    assert made["method"] == "extract" and [one["weight"] for one in made["inputs"]] == [-1.0, 1.0]


def test_targets_and_rounding_choose_what_is_looked_at() -> None:
    before, after = changed(layer_weight=1e-3)
    other = {"net.other.weight": torch.ones(4, 4)}
    result = extract(
        before | other, after | {name: tensor + 1 for name, tensor in other.items()}, "net", 1, min_diff=0.01
    )
    assert set(result.tensors) == {"net.other"}
    pair = before | other, after | {name: tensor + 1 for name, tensor in other.items()}
    assert set(extract(*pair, "net", 1, targets=["layer"]).tensors) == {"net.layer"}
    assert extract(*pair, "net", 1, targets=["layer"]).report.left_out == ("net.other.weight",)


def test_what_cannot_be_extracted_is_one_clear_error() -> None:
    before, after = changed(layer_weight=1.0)
    narrow = {**after, "net.layer.weight": torch.ones(6, 4)}
    fewer = {name: tensor for name, tensor in after.items() if "norm" not in name}
    cases = (
        ((before, before, "net", 1), {}, "tuned changes nothing of base"),
        ((before, narrow, "net", 1), {}, r"net\.layer\.weight is \(6, 5\) in one checkpoint and \(6, 4\) in the other"),
        (
            (before, fewer, "net", 1),
            {},
            r"2 tensors are in one of the two checkpoints only: net\.norm\.bias \(only in base\)",
        ),
        ((before, after, "net", 1), {"targets": ["layr"]}, "'layr' matches none of the 3 layers. Did you mean layer"),
        ((before, after, "net", 0), {}, "rank is 0"),
    )
    for arguments, settings, message in cases:
        with pytest.raises(ConfigError, match=message):
            extract(*arguments, **settings)
