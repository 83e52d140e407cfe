"""Adapters of fused layers: cutting, putting together, and halves that change places, against the dense changes."""

from __future__ import annotations

import layers
import pytest
import torch
from torch import nn

from studio.adapters import METHODS, WeightView, named_targets
from studio.adapters.base import method_of
from studio.adapters.inject import adapter_of_entry
from studio.errors import ConfigError
from studio.formats.fused import expansion, fuse, reversed_halves, split

QKV, LINEAR1 = (1, 1, 1), (1, 1, 1, 4)
INPUTS = 12
# settings under which the outputs divide into parts of 8, 16, ...
OPTIONS = {"lokr": {"factor": 3}, "oft": {"block_size": 4}, "c3a": {"block_size": 4}, "oftv2": {"block_size": 4}}
COUPLED = {"boft", "mora", "randlora", "shira", "vera"}  # their outputs depend on each other
LINEAR = [name for name in METHODS if name != "tokens" and layers.supported(name, "linear")]
SEPARABLE = [name for name in LINEAR if name not in COUPLED]
STACKABLE = ("lora", "dora", "hira", "loha")  # products of factors, which may differ in everything


def fused_layer(method, shares, seed=0, rank=4, alpha=2.0, options=None):
    """(entry of a random adapter on the fused layer, the layer)."""
    layer = linear(8 * sum(shares), seed)
    adapters = layers.adapted(layers.Net(layer), method, options or OPTIONS.get(method), rank=rank, alpha=alpha)
    layers.randomise(adapters, seed + 1)
    entry = adapters.state()["net.layer"]
    adapters.detach()
    return entry, layer


def linear(outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(INPUTS, outputs).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def part_of(layer, start, stop):
    part = linear(stop - start)
    part.weight.copy_(layer.weight[start:stop])
    part.bias.copy_(layer.bias[start:stop])
    return part


def bounds(shares):
    ends = torch.tensor((0, *shares)).cumsum(0) * 8
    return list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))


def change(layer, entry):
    """What the entry changes of weight and bias, as one matrix (out, in + 1)."""
    (target,) = named_targets({"net": layers.Net(layer)}).values()
    adapter = adapter_of_entry(target, entry)
    adapter.share([adapter], 0)
    view = WeightView(target)
    with torch.no_grad():
        bias = adapter.delta_bias(view)
        return torch.cat([adapter.delta_weight(view), (0 * layer.bias if bias is None else bias)[:, None]], 1)


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_the_lists_say_of_every_method_whether_its_outputs_can_be_cut():
    assert set(LINEAR) == COUPLED | set(SEPARABLE)
    assert not COUPLED & set(SEPARABLE) and set(METHODS) >= COUPLED


@pytest.mark.parametrize("method", SEPARABLE)
def test_cut_parts_change_what_the_whole_changes_and_make_the_same_whole_again(method):
    entry, layer = fused_layer(method, QKV)
    parts = split(entry, QKV)
    whole = change(layer, entry)
    assert whole.abs().max() > 1e-3
    for part, (start, stop) in zip(parts, bounds(QKV), strict=True):
        assert layers.close(change(part_of(layer, start, stop), part), whole[start:stop])
    assert same(fuse(parts, QKV), entry)
    storages = [tensor.data_ptr() for part in parts for tensor in part.values()]
    assert len(set(storages)) == len(storages)  # safetensors write no tensor twice


@pytest.mark.parametrize("method", [name for name in SEPARABLE if name != "lokr"])  # no factor of 12 fits 8 and 32
def test_parts_of_different_sizes(method):
    entry, layer = fused_layer(method, LINEAR1)
    parts = split(entry, LINEAR1)
    for part, (start, stop) in zip(parts, bounds(LINEAR1), strict=True):
        assert layers.close(change(part_of(layer, start, stop), part), change(layer, entry)[start:stop])
    assert same(fuse(parts, LINEAR1), entry)


@pytest.mark.parametrize("method", sorted(COUPLED))
def test_methods_whose_outputs_depend_on_each_other_are_refused(method):
    entry, _ = fused_layer(method, QKV, rank=6)
    for refused in (lambda: split(entry, QKV), lambda: fuse([entry] * 3, QKV), lambda: reversed_halves(entry)):
        with pytest.raises(ConfigError, match="its outputs depend on each other"):
            refused()


@pytest.mark.parametrize("method", SEPARABLE)
def test_halves_change_places_and_back(method):
    entry, layer = fused_layer(method, (1,) * 6, options={"factor": 6} if method == "lokr" else None)
    turned = reversed_halves(entry)
    swapped = linear(48)
    swapped.weight.copy_(layer.weight.roll(24, 0))
    swapped.bias.copy_(layer.bias.roll(24, 0))
    if method != "oftv2":  # it turns the inputs, whatever the outputs
        assert not same(turned, entry)
    assert layers.close(change(swapped, turned), change(layer, entry).roll(24, 0))
    assert same(reversed_halves(turned), entry)


def own_parts(method, shares, **settings):
    """Adapters of different values on the parts, and their layers."""
    entries = [fused_layer(method, (share,), seed, **settings) for seed, share in enumerate(shares)]
    return [entry for entry, _ in entries], [layer for _, layer in entries]


def joined(parts):
    whole = linear(sum(part.out_features for part in parts))
    whole.weight.copy_(torch.cat([part.weight for part in parts]))
    whole.bias.copy_(torch.cat([part.bias for part in parts]))
    return whole


@pytest.mark.parametrize("shares", [QKV, LINEAR1])
@pytest.mark.parametrize("method", STACKABLE)
def test_parts_of_different_factors_are_put_together_and_come_back(method, shares):
    entries, parts = own_parts(method, shares, alpha=0.3)
    entry = fuse(entries, shares)
    assert layers.close(change(joined(parts), entry), torch.cat(list(map(change, parts, entries))))
    assert all(map(same, split(entry, shares), entries))


# methods without anything besides the outputs' tensors, or with the same of it in all parts
@pytest.mark.parametrize("method", [name for name in SEPARABLE if name not in (*STACKABLE, "lokr", "oftv2")])
def test_parts_of_one_form_are_put_together_and_come_back(method):
    entries, parts = own_parts(method, QKV)
    entry = fuse(entries, QKV)
    assert layers.close(change(joined(parts), entry), torch.cat(list(map(change, parts, entries))))
    assert all(map(same, split(entry, QKV), entries))


@pytest.mark.parametrize("method", ["lokr", "oftv2"])
def test_parts_that_differ_besides_their_outputs_are_refused(method):
    entries, _ = own_parts(method, QKV)
    with pytest.raises(ConfigError, match=f"of {method} differ in its parts"):
        fuse(entries, QKV)


@pytest.mark.parametrize("method", STACKABLE)
def test_ranks_and_scales_of_their_own(method):
    settings = [(4, 2.0), (2, 3.0), (5, 0.5)]
    pairs = [fused_layer(method, (1,), seed, rank, alpha) for seed, (rank, alpha) in enumerate(settings)]
    entries, parts = [entry for entry, _ in pairs], [layer for _, layer in pairs]
    entry = fuse(entries, QKV)
    assert entry["alpha"] == pytest.approx(0.5 * 11)
    wanted = torch.cat(list(map(change, parts, entries)))
    assert layers.close(change(joined(parts), entry), wanted)
    again = split(entry, QKV)
    assert layers.close(torch.cat(list(map(change, parts, again))), wanted)
    assert same(fuse(again, QKV), entry)


NEUTRAL = [name for name in SEPARABLE if name not in ("dora", "oftv2")]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("method", NEUTRAL)
def test_a_part_without_an_adapter_stays_as_it_is(method, place):
    whole, _ = fused_layer(method, QKV)
    entries = split(whole, QKV)
    if method in STACKABLE:
        entries = own_parts(method, QKV)[0]
    parts = [linear(8, seed) for seed in range(3)]
    wanted = torch.cat(
        [torch.zeros(8, INPUTS + 1) if one == place else change(parts[one], entries[one]) for one in range(3)]
    )
    present = [None if one == place else entry for one, entry in enumerate(entries)]
    entry = fuse(present, QKV)
    assert layers.close(change(joined(parts), entry), wanted)
    if method in STACKABLE:
        again = split(entry, QKV)
        assert again[place] is None
        assert all(same(again[one], entries[one]) for one in range(3) if one != place)


@pytest.mark.parametrize("method", ["dora", "oftv2"])
def test_a_missing_part_is_refused_where_nothing_is_neutral(method):
    first, *rest = split(fused_layer(method, QKV)[0], QKV)
    with pytest.raises(ConfigError, match=f"{method} is on 2 of its 3 parts only"):
        fuse([None, *rest], QKV)
    assert first is not None


def test_settings_that_couple_outputs_are_refused():
    dora, _ = fused_layer("dora", QKV)
    oft, _ = fused_layer("oft", QKV)
    for entry in ({**dora, "dora_scale": torch.ones(1, INPUTS)}, {**oft, "alpha": torch.tensor(0.01)}):
        with pytest.raises(ConfigError, match="depend on each other"):
            split(entry, QKV)


def test_different_methods_and_sizes_are_refused():
    lora, diff = fused_layer("lora", (1,))[0], fused_layer("diff", (1,))[0]
    with pytest.raises(ConfigError, match="different methods: diff, lora"):
        fuse([lora, diff, lora], QKV)
    with pytest.raises(ConfigError, match=r"not in the ratio 1 : 1 : 1"):
        fuse([lora, lora, fused_layer("lora", (2,))[0]], QKV)
    narrow = {**lora, "lora_down.weight": torch.ones(4, 5)}
    with pytest.raises(ConfigError, match="do not fit each other"):
        fuse([lora, narrow, lora], QKV)
    lokr = fused_layer("lokr", QKV)[0]
    with pytest.raises(ConfigError, match=r"lokr_w1 \(3, \d\) does not divide into outputs in the ratio 1 : 1 : 1 : 4"):
        split(lokr, LINEAR1)


def test_dense_factors_keep_their_rank_and_blocks_get_their_own():
    dense, _ = fused_layer("lora", QKV)
    assert all(len(part["lora_down.weight"]) == 4 and part["alpha"] == 2 for part in split(dense, QKV))
    blocks = fuse(own_parts("lora", QKV)[0], QKV)
    assert blocks["lora_down.weight"].shape == (12, INPUTS)
    blocks["lora_up.weight"][:8] = 0  # a part that has not learnt yet has its even share
    assert [len(part["lora_down.weight"]) for part in split(blocks, QKV)] == [4, 4, 4]
    crossed = blocks["lora_up.weight"].clone()
    crossed[0, 11] = 1
    assert [len(part["lora_down.weight"]) for part in split({**blocks, "lora_up.weight": crossed}, QKV)] == [12] * 3
    nothing = {**blocks, "lora_up.weight": torch.zeros(24, 12)}
    assert same(fuse(split(nothing, QKV), QKV), nothing)


@pytest.mark.parametrize("alpha", [1.0, 0.1, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_are_cut_only_where_alpha_can_be(alpha, dtype):
    whole = fuse(own_parts("lora", QKV)[0], QKV)
    whole = {name: tensor.to(dtype) for name, tensor in whole.items()} | {"alpha": torch.tensor(alpha, dtype=dtype)}
    parts = split(whole, QKV)
    assert same(fuse(parts, QKV), whole)
    scale = float(whole["alpha"]) / 12
    assert all(float(part["alpha"]) / len(part["lora_down.weight"]) == pytest.approx(scale, rel=2e-7) for part in parts)


@pytest.mark.parametrize("method", ["lora", "dora", "hira", "loha", "lokr", "diff", "c3a"])
def test_an_entry_shows_how_many_outputs_it_has_for_an_input(method):
    assert expansion(fused_layer(method, QKV)[0]) == 2
    assert expansion(fused_layer("ia3", QKV)[0]) is None


def test_every_separable_method_is_read_back_as_itself():
    for method in SEPARABLE:
        entry, _ = fused_layer(method, QKV)
        for part in split(entry, QKV):
            assert method_of(frozenset(part)) is method_of(frozenset(entry))
