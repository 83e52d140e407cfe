"""Norms, ranks and shares of energy of every method, against the dense change; the picture and the command."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from studio import cli
from studio.adapters import AdapterConfig, AdapterPlan, WeightView, named_targets
from studio.algebra.statistics import ENERGY, ShapeView, block_of, block_statistics, layer_statistics, roles_of
from studio.families import FAMILIES
from studio.formats import write_adapter
from studio.formats.portrait import UNKNOWN, portrait
from studio.formats.state import AdapterState

METHODS = {
    "lora": {},
    "tucker": {},
    "loha": {},
    "lokr": {},
    "diff": {},
    "dora": {},
    "oft": {"rank": 2},
    "boft": {"rank": 4},
    "ia3": {},
}
OF_THE_BASE = ("dora", "oft", "boft", "ia3")  # what they change is not in their files


@functools.cache
def adapted(method: str) -> tuple[AdapterState, Mapping[str, WeightView], Mapping[str, torch.Tensor]]:
    """(the state of a tiny SD 1.5 adapter with convolutions, its base, layer -> dense dW)."""
    config = AdapterConfig(method, rank=METHODS[method].get("rank", 3), alpha=None if method in OF_THE_BASE else 2.0)
    plan = AdapterPlan(("attention", "convolutions"), config=config)
    family, models, adapters = tiny.random_adapter("sd15", plan)
    views = {name: WeightView(target) for name, target in named_targets(family.prefixes(models)).items()}
    dense = {name: adapter.delta_weight(views[name]).detach() for name, adapter in adapters.items()}
    return tiny.state_of(family, adapters), views, dense


@pytest.mark.parametrize("method", METHODS)
def test_norms_and_spectra_are_those_of_the_dense_change(method: str) -> None:
    state, views, dense = adapted(method)
    layers = layer_statistics(state, FAMILIES["sd"].roles, views)
    assert {layer.name for layer in layers} == set(dense)
    for layer in layers:
        values = torch.linalg.svdvals(dense[layer.name].flatten(1).double())
        assert layer.norm == pytest.approx(float(values.norm()), rel=1e-4), layer.name
        shares = values / values.sum()
        entropy = -torch.special.xlogy(shares, shares).sum()
        assert layer.effective_rank == pytest.approx(float(entropy.exp()), rel=1e-2), layer.name
        kept = values[: layer.directions].square().sum() / values.square().sum()
        before = values[: (layer.directions or 1) - 1].square().sum() / values.square().sum()
        assert before < ENERGY + 1e-4 and kept > ENERGY - 1e-4, layer.name
    if method in ("oft", "boft", "lora", "dora"):  # on kernels, a method may be another's
        assert {layer.method for layer in layers} == {method}


@pytest.mark.parametrize("method", METHODS)
def test_without_a_base_a_norm_is_right_or_unknown(method: str) -> None:
    state, views, dense = adapted(method)
    shapes = {name: ShapeView(view.target) for name, view in views.items()}
    for bases in (None, shapes):
        for layer in layer_statistics(state, FAMILIES["sd"].roles, bases):
            known = layer.method in ("lora", "diff") or (bases is not None and method not in OF_THE_BASE)
            assert (layer.norm is not None) == known, layer
            if layer.norm is not None:
                assert layer.norm == pytest.approx(float(dense[layer.name].norm()), rel=1e-4), layer


def test_shares_add_up_and_blocks_follow_the_model() -> None:
    state, _, dense = adapted("lora")
    layers = layer_statistics(state, FAMILIES["sd"].roles)
    blocks = block_statistics(layers)
    assert [block.block for block in blocks] == [
        *("unet.down_blocks.0", "unet.down_blocks.1", "unet.mid_block", "unet.up_blocks.0", "unet.up_blocks.1")
    ]
    assert sum(block.energy or 0 for block in blocks) == pytest.approx(1)
    assert sum(block.layers for block in blocks) == len(dense)
    for block in blocks:
        own = [delta.norm() for name, delta in dense.items() if name.startswith(f"{block.block}.")]
        assert block.norm == pytest.approx(float(torch.stack(own).norm()), rel=1e-4)
        assert block.ranks == (3,)
    zero = AdapterState("sd", {n: {**e, "lora_up.weight": 0 * e["lora_up.weight"]} for n, e in state.tensors.items()})
    idle = block_statistics(layer_statistics(zero, {}))
    assert {(block.norm, block.energy, block.directions) for block in idle} == {(0.0, 0.0, 0.0)}


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("unet.conv_in", "unet"),
        ("unet.mid_block.resnets.0.conv1", "unet.mid_block"),
        ("unet.up_blocks.2.attentions.1.transformer_blocks.0.attn1.to_q", "unet.up_blocks.2"),
        ("text_encoder.text_model.encoder.layers.11.mlp.fc1", "text_encoder.layers.11"),
        ("text_encoder_3.encoder.block.4.layer.0.SelfAttention.q", "text_encoder_3.block.4"),
        ("transformer.single_transformer_blocks.37.attn.to_q", "transformer.single_transformer_blocks.37"),
    ],
)
def test_the_block_of_a_layer(name: str, block: str) -> None:
    assert block_of(name) == block


@pytest.mark.parametrize("family", FAMILIES)
def test_every_default_layer_has_a_role_that_no_narrower_one_holds(family: str) -> None:
    from studio.adapters import match_targets

    known = FAMILIES[family]
    plan = AdapterPlan((*known.default_targets, "text-encoder"))
    names = match_targets(known.prefixes(known.reference()), plan, known.roles)
    found = roles_of(names, known.roles)
    assert "other" not in found.values() and len(set(found.values())) >= 3
    if family in ("sd", "sdxl"):
        assert {"self-attention", "cross-attention"} < set(found.values()) and "attention" not in found.values()


def test_the_picture_is_labelled_and_darker_where_more_changes() -> None:
    state, _, _ = adapted("lora")
    layers = layer_statistics(state, FAMILIES["sd"].roles)
    picture = portrait(layers, "ink.safetensors", "LoRA")
    assert picture.width > 700 and picture.height > 250
    darkest = min(color for _, color in picture.getcolors(picture.width * picture.height))
    assert darkest[2] > darkest[0] or sum(darkest) < 200
    unknown = layer_statistics(adapted("dora")[0], FAMILIES["sd"].roles)
    colors = {color for _, color in portrait(unknown, "ink", "").getcolors(1 << 20)}
    assert tuple(bytes.fromhex(UNKNOWN[1:])) in colors
    assert tuple(bytes.fromhex(UNKNOWN[1:])) not in {color for _, color in picture.getcolors(1 << 20)}


# -- the command -----------------------------------------------------------------------------


def inspect(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["studio", "inspect", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_inspect_as_text_json_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state, _, dense = adapted("lora")
    metadata = {**state.metadata, "ss_tag_frequency": "x" * 5000}
    file = write_adapter(AdapterState("sd", state.tensors, metadata), tmp_path / "ink")
    picture = tmp_path / "new" / "ink.png"
    assert inspect(monkeypatch, str(file), "--picture", str(picture)) == 0
    text = capsys.readouterr().out
    assert "unet.mid_block" in text and "energy" in text and "5,000 characters" in text
    assert max(map(len, text.splitlines())) < 180
    assert Image.open(picture).format == "PNG"
    assert inspect(monkeypatch, str(file), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(layer["norm"] ** 2 for layer in told["by_layer"]) ** 0.5 == pytest.approx(
        float(torch.stack([delta.norm() for delta in dense.values()]).norm()), rel=1e-4
    )
    assert told["metadata"]["ss_tag_frequency"] == "x" * 5000 and told["method"] == "lora"
    assert inspect(monkeypatch, str(file), "--picture", "ink.jpg") == 2


def test_inspect_with_and_without_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_adapter(adapted("boft")[0], tmp_path / "turned")
    assert inspect(monkeypatch, str(file)) == 0
    text = capsys.readouterr().out
    assert "boft" in text and "--base" in text
    assert inspect(monkeypatch, str(file), "--base", str(tiny.folder("sd15"))) == 0
    assert "--base" not in capsys.readouterr().out
    assert inspect(monkeypatch, str(file), "--base", str(tiny.folder("sdxl"))) == 2
    assert "of the family 'sdxl'" in capsys.readouterr().err
