"""Combining adapters: the weighted sum of the true dW of every method, and its best approximation of a rank."""

from __future__ import annotations

import copy

import pytest
import torch
from layers import adapted, cases, close, net_of, randomise
from torch import Tensor, nn

from studio.adapters import AdapterConfig, AdapterPlan, WeightView, attach_adapters, inject, named_targets
from studio.algebra import combine
from studio.errors import ConfigError
from studio.formats.state import AdapterState

WEIGHTS = [0.7, -0.4, 0.3]


def views(net: nn.Module) -> dict[str, WeightView]:
    return {name: WeightView(target) for name, target in named_targets({"net": net}).items()}


@pytest.mark.parametrize(("method", "kind"), cases())
def test_the_sum_of_two_adapters_acts_like_both(method: str, kind: str) -> None:
    net, x = net_of(kind)
    base, bases, states = net(x), views(net), []
    for seed in (1, 2):
        adapters = adapted(net, method)
        randomise(adapters, seed)
        states.append(AdapterState("net", adapters.state()))
        adapters.detach()
    sets = [attach_adapters({"net": net}, one.tensors, weight) for one, weight in zip(states, WEIGHTS, strict=False)]
    both = net(x)
    for one in sets:
        one.detach()
    assert torch.equal(net(x), base)
    combined = combine(states, WEIGHTS[:2], bases=bases)
    attach_adapters({"net": net}, combined.tensors)
    assert close(net(x), both)
    assert combined.residuals == {"net.layer" + name: 0.0 for name in _parameter(kind)}


def _parameter(kind: str) -> list[str]:
    return [{"experts": ".gate_up_proj", "fused": ".in_proj_weight"}.get(kind, "")]


def lora(seed: int, out: int, inner: tuple[int, ...], rank: int, family: str = "net") -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    entry = {
        "lora_down.weight": torch.randn(rank, *inner, generator=generator),
        "lora_up.weight": torch.randn(out, rank, *(1,) * (len(inner) - 1), generator=generator),
        "alpha": torch.tensor(2.0),
    }
    return AdapterState(family, {"net.layer": entry})


def product(state: AdapterState) -> Tensor:
    entry = state.tensors["net.layer"]
    up, down = entry["lora_up.weight"].double().flatten(1), entry["lora_down.weight"].double().flatten(1)
    return float(entry["alpha"]) / len(down) * up @ down


@pytest.mark.parametrize("inner", [(40,), (6, 3, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("rank", [1, 5, 12, 13, None])
def test_low_rank_sums_are_exact_or_the_best_of_their_rank(inner: tuple[int, ...], rank: int | None) -> None:
    states = [lora(seed, 30, inner, 3 + seed) for seed in range(3)]  # ranks 3, 4, 5
    combined = combine(states, WEIGHTS, rank)
    exact = sum(weight * product(one) for one, weight in zip(states, WEIGHTS, strict=True))
    up, values, down = torch.linalg.svd(exact, full_matrices=False)
    kept = 12 if rank is None else rank
    best = (up[:, :kept] * values[:kept]) @ down[:kept]
    assert (product(combined) - best).abs().max() <= 1e-5 * best.abs().max()
    entry = combined.tensors["net.layer"]
    assert entry["lora_down.weight"].shape == (min(kept, 12), *inner)
    residual = (exact - best).norm() / exact.norm()
    assert combined.residuals["net.layer"] == pytest.approx(float(residual), abs=1e-5)
    assert combined.energy_kept == pytest.approx(1 - float(residual) ** 2, abs=1e-5)


def test_low_rank_sums_never_form_the_matrix() -> None:
    states = [lora(seed, 2**17, (2**17,), 2) for seed in (1, 2)]  # 64 GiB
    entry = combine(states, [1.0, 1.0], rank=3).tensors["net.layer"]
    assert entry["lora_up.weight"].shape == (2**17, 3)


def test_groups_of_a_convolution_are_approximated_one_by_one() -> None:
    net, _ = net_of("conv2d grouped")
    states = []
    for seed in (1, 2):
        adapters = adapted(net, "lora", rank=8)
        randomise(adapters, seed)
        states.append(AdapterState("net", adapters.state()))
        adapters.detach()
    exact, best = (combine(states, [1.0, 0.5], rank) for rank in (None, 4))
    deltas = []
    for one in (exact, best):
        adapters = attach_adapters({"net": net}, one.tensors)
        (adapter,) = adapters.adapters
        deltas.append(adapter.delta_weight(views(net)["net.layer"]).detach().double())
        adapters.detach()
    groups = [delta.reshape(4, 3, -1) for delta in deltas]  # (groups, out / groups, in / groups * kernel)
    up, values, down = torch.linalg.svd(groups[0], full_matrices=False)
    assert (groups[1] - up[..., :1] * values[:, None, :1] @ down[:, :1]).abs().max() <= 1e-5 * values.max()
    assert best.residuals["net.layer"] == pytest.approx(float((deltas[0] - deltas[1]).norm() / deltas[0].norm()), 1e-4)
    with pytest.raises(ConfigError, match="rank 6 does not divide into the 4 groups"):
        combine(states, [1.0, 0.5], rank=6)


def test_each_expert_is_approximated_by_itself() -> None:
    net, _ = net_of("experts")
    adapters = adapted(net, "lora", rank=6)
    state, exact = AdapterState("net", adapters.state()), adapters.adapters[0].delta_weight(None).detach()
    adapters.detach()
    for bases in (None, views(net)):
        best = combine([state], [1.0], rank=2, bases=bases)
        delta = attach_adapters({"net": net}, best.tensors).adapters[0].delta_weight(None).detach()
        up, values, down = torch.linalg.svd(exact, full_matrices=False)
        assert close(delta, up[..., :2] * values[:, None, :2] @ down[:, :2])


@pytest.mark.parametrize("kind", ["linear without bias", "conv2d", "embedding"])
def test_a_method_without_factors_becomes_the_best_lora_of_a_rank(kind: str) -> None:
    net, x = net_of(kind)
    adapters = adapted(net, "lokr", {"factor": 2}) if kind != "embedding" else adapted(net, "dora")
    state, ours = AdapterState("net", adapters.state()), net(x)
    adapters.detach()
    matrix = views(net)["net.layer"].dense()
    full = combine([state], [1.0], rank=min(matrix.flatten(1).shape), bases=views(net))
    assert set(full.tensors["net.layer"]) == {"lora_down.weight", "lora_up.weight", "alpha"}
    attach_adapters({"net": net}, full.tensors)
    assert close(net(x), ours)
    assert 0 < combine([state], [1.0], rank=2, bases=views(net)).residuals["net.layer"] < 1


def test_the_product_is_that_of_pefts_svd() -> None:
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(*(nn.Linear(64, 48, bias=False) for _ in range(2)))
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["0", "1"], init_lora_weights=False)
    theirs = get_peft_model(copy.deepcopy(model), config, adapter_name="0")
    for name in ("1", "2"):
        theirs.add_adapter(name, config)
    plan, states = AdapterPlan(("re:.*",), config=AdapterConfig(rank=4, alpha=2.0)), []
    for name in ("0", "1", "2"):
        adapters = inject({"net": model}, plan, {})
        randomise(adapters, int(name))
        for layer, adapter in adapters.items():
            module = theirs.base_model.model.get_submodule(layer.removeprefix("net."))
            module.lora_A[name].weight.data.copy_(adapter.lora_down)
            module.lora_B[name].weight.data.copy_(adapter.lora_up)
        states.append(AdapterState("net", adapters.state()))
        adapters.detach()
    theirs.add_weighted_adapter(["0", "1", "2"], WEIGHTS, "sum", combination_type="svd", svd_rank=5)
    combined = combine(states, WEIGHTS, rank=5)
    for layer, entry in combined.tensors.items():
        expected = theirs.base_model.model.get_submodule(layer.removeprefix("net.")).get_delta_weight("sum")
        ours = product(AdapterState("net", {"net.layer": entry}))
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_layers_that_only_some_adapters_have_keep_their_weight() -> None:
    first, second = lora(1, 6, (5,), 2), lora(2, 6, (5,), 2)
    other = AdapterState("net", {"net.other": second.tensors["net.layer"]}, {"ss_v2": "False", "ss_seed": "1"})
    combined = combine([first, other], [2.0, -1.0])
    assert list(combined.tensors) == ["net.layer", "net.other"] and "ss_v2" not in combined.metadata
    assert combined.report.partial == {"net.layer": ("1",), "net.other": ("2",)}
    assert close(product(combined), 2 * product(first))
    again = combine([other, other], [1.0, 1.0]).metadata
    assert again["ss_v2"] == "False" and "ss_seed" not in again


def test_norms_and_biases_are_added_as_they_are() -> None:
    norm = {"w_norm": torch.tensor([1.0, 2.0]), "b_norm": torch.tensor([3.0, 4.0])}
    states = [AdapterState("net", {"net.layer": entry}) for entry in (norm, {"diff_b": torch.tensor([10.0, 20.0])})]
    (entry,) = combine(states, [0.5, 2.0]).tensors.values()
    assert {name: tensor.tolist() for name, tensor in entry.items()} == {"w_norm": [0.5, 1.0], "b_norm": [21.5, 42.0]}


def test_what_cannot_be_combined_is_one_clear_error() -> None:
    net, _ = net_of("linear")
    dora = AdapterState("net", adapted(net, "dora").state())
    one = lora(1, 6, (5,), 2)
    cases = (
        ((["net"], [1.0, 2.0]), "1 adapters and 2 weights"),
        (([one], [1.0], 0), "rank is 0"),
        (([one, lora(1, 6, (5,), 2, "sdxl")], [1.0, 1.0]), "different families cannot be combined: net, sdxl"),
        (([one, lora(1, 6, (7,), 2)], [1.0, 1.0]), r"net\.layer: the adapters have different shapes"),
        (
            ([one], [1.0], None, views(net)),
            r"net\.layer: the file's LoRA is \(6, 2\) and \(2, 5\), the base's weight \(8, 12",
        ),
        (([one], [0.0]), "nothing is left: every weight is 0"),
        (([dora], [1.0]), r"net\.layer: the change of 'dora' is known only with the base: give `bases`"),
    )
    for arguments, message in cases:
        with pytest.raises(ConfigError, match=message):
            combine(*arguments)
