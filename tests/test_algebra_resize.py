"""Other ranks: the smallest that fulfils a criterion, layer by layer, against an SVD in float64."""

from __future__ import annotations

import json

import pytest
import torch
from layers import adapted, close, net_of
from torch import Tensor

from studio.adapters import WeightView, attach_adapters, named_targets
from studio.algebra import resize
from studio.errors import ConfigError
from studio.formats.state import AdapterState


def state(decay: float, inner: tuple[int, ...] = (40,), rank: int = 12, alpha: float = 3.0) -> AdapterState:
    """A LoRA whose singular values fall by `decay` from one to the next, about."""
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(rank, *inner, generator=generator)
    up = torch.randn(30, rank, *(1,) * (len(inner) - 1), generator=generator)
    up = up * (decay ** torch.arange(rank)).reshape(1, rank, *(1,) * (up.ndim - 2))
    entry = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
    return AdapterState("net", {"net.layer": entry}, {"modelspec.trigger_phrase": "ink"})


def product(entry: dict[str, Tensor]) -> Tensor:
    up, down = entry["lora_up.weight"].double().flatten(1), entry["lora_down.weight"].double().flatten(1)
    return float(entry["alpha"]) / len(down) * up @ down


def fulfilled(values: Tensor, kept: int, criterion: str, value: float) -> bool:
    """Whether the first `kept` singular values are enough."""
    squares = values.square()
    if criterion == "energy":
        return bool(squares[:kept].sum() / squares.sum() >= value - 1e-6)
    if criterion == "frobenius":
        return bool(squares[:kept].sum().sqrt() / squares.sum().sqrt() >= value - 1e-6)
    return kept == len(values) or bool(values[kept] < values[0] / value)


CRITERIA = [("energy", 0.5), ("energy", 0.99), ("frobenius", 0.9), ("sv_ratio", 2.0), ("sv_ratio", 20.0)]


@pytest.mark.parametrize("inner", [(40,), (6, 3, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize(("criterion", "value"), CRITERIA)
@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_rank_is_the_smallest_that_is_enough(
    decay: float, criterion: str, value: float, inner: tuple[int, ...]
) -> None:
    before = state(decay, inner)
    exact = product(before.tensors["net.layer"])
    values = torch.linalg.svdvals(exact)[:12]
    result = resize(before, **{criterion: value})
    entry = result.tensors["net.layer"]
    rank = result.report.ranks["net.layer"]
    assert fulfilled(values, rank, criterion, value) and not (
        rank > 1 and fulfilled(values, rank - 1, criterion, value)
    )
    up, all_values, down = torch.linalg.svd(exact, full_matrices=False)
    assert close(product(entry), (up[:, :rank] * all_values[:rank]) @ down[:rank])
    assert entry["lora_down.weight"].shape == (rank, *inner) and float(entry["alpha"]) == rank
    assert resize(before, 2, **{criterion: value}).report.ranks["net.layer"] == min(2, rank)
    kept = float(values[:rank].square().sum() / values.square().sum())
    assert result.energy_kept == pytest.approx(kept, abs=1e-5)
    assert result.residuals["net.layer"] == pytest.approx((1 - kept) ** 0.5, abs=1e-3)


def test_layers_get_ranks_of_their_own() -> None:
    layers = {f"net.{decay}": state(decay).tensors["net.layer"] for decay in (0.3, 0.9)}
    result = resize(AdapterState("net", layers), energy=0.95)
    assert result.report.ranks["net.0.3"] < result.report.ranks["net.0.9"]


def test_what_is_small_enough_stays_as_it_is() -> None:
    norm = {"w_norm": torch.ones(4), "b_norm": torch.ones(4)}
    before = AdapterState("net", {**state(0.5).tensors, "net.norm": norm})
    result = resize(before, 12)
    assert all(result.tensors[name] is entry for name, entry in before.tensors.items())
    assert result.energy_kept == 1 and set(result.residuals.values()) == {0.0}
    assert resize(before, 3).tensors["net.norm"] is norm


def test_metadata_says_what_was_done_and_keeps_the_rest() -> None:
    result = resize(state(0.5), 8, energy=0.9, name="ink")
    made = json.loads(result.metadata["studio.blend"])
    assert (made["method"], made["settings"]) == ("resize", {"rank": 8, "energy": 0.9})
    assert made["inputs"][0]["name"] == "ink" and result.metadata["modelspec.trigger_phrase"] == "ink"


def test_the_matrix_is_never_formed() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((4, 2**17), (2**17, 4)))  # 64 GiB
    entry = {"lora_down.weight": down.half(), "lora_up.weight": up.half(), "alpha": torch.tensor(4.0)}
    short = resize(AdapterState("net", {"net.layer": entry}), 2, dtype=torch.float16)
    assert short.tensors["net.layer"]["lora_up.weight"].dtype == torch.float16 and 0 < short.report.rounding < 1e-3


def test_a_zero_keeps_one_rank() -> None:
    entry = {key: tensor * (key == "alpha") for key, tensor in state(0.5).tensors["net.layer"].items()}
    for criterion, value in CRITERIA:
        result = resize(AdapterState("net", {"net.layer": entry}), **{criterion: value})
        assert result.report.ranks == {"net.layer": 1} and not product(result.tensors["net.layer"]).any()


def test_groups_of_a_convolution_share_a_rank() -> None:
    net, x = net_of("conv2d grouped")
    adapters = adapted(net, "lora", rank=8)
    ours, before = net(x), AdapterState("net", adapters.state())
    adapters.detach()
    result = resize(before, energy=1.0)
    attach_adapters({"net": net}, result.tensors)
    assert close(net(x), ours) and result.report.ranks == {"net.layer": 8}
    assert resize(before, energy=0.3).report.ranks == {"net.layer": 4}
    with pytest.raises(ConfigError, match="rank 6 does not divide into the 4 groups"):
        resize(before, 6)


def test_other_methods_become_a_lora_with_the_base() -> None:
    net, x = net_of("linear without bias")
    adapters = adapted(net, "dora")
    ours, before = net(x), AdapterState("net", adapters.state())
    adapters.detach()
    bases = {name: WeightView(target) for name, target in named_targets({"net": net}).items()}
    attach_adapters({"net": net}, resize(before, 12, bases=bases).tensors)
    assert close(net(x), ours)
    with pytest.raises(ConfigError, match=r"net\.layer: the change of 'dora' is known only with the base"):
        resize(before, 4)


def test_what_makes_no_sense_is_one_clear_error() -> None:
    cases: tuple[tuple[dict[str, float], str], ...] = (
        ({}, "give a rank, an energy, an sv_ratio or a frobenius"),
        ({"rank": 0}, "rank is 0"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"frobenius": 1.1}, "frobenius is 1.1"),
        ({"sv_ratio": 0.5}, "sv_ratio is 0.5"),
        ({"energy": 0.5, "sv_ratio": 2.0}, "energy and sv_ratio both choose the rank"),
    )
    for arguments, message in cases:
        with pytest.raises(ConfigError, match=message):
            resize(state(0.5), **arguments)
