"""MoRA, QA-LoRA and Delta-LoRA against float64 references written from their papers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from layers import close, randomise
from torch import Tensor, nn

from studio.adapters import AdapterConfig, AdapterPlan, AdapterSet, attach_adapters, inject
from studio.adapters.quantized import ZeroPointLinear
from studio.errors import ConfigError

# in, out, rank: sizes that divide, that do not, more rows than columns and fewer, a matrix wider than the input
SIZES = [(16, 16, 2), (12, 8, 4), (10, 23, 3), (31, 7, 2), (7, 40, 5), (5, 60, 16), (24, 24, 6)]


def adapted(layer: nn.Module, method: str, rank: int = 4, alpha: float | None = None, **options: Any) -> AdapterSet:
    """Random values on the one layer "net", in float64."""
    config = AdapterConfig(method, rank, alpha, options=options)
    adapters = inject({"net": layer}, AdapterPlan(("re:.*",), config=config), {}).double()
    randomise(adapters)
    return adapters


def linear(in_features: int, out_features: int) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(in_features, out_features).double().requires_grad_(False)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- MoRA (arXiv:2405.12130) ------------------------------------------------------------------


def mora_sharing(matrix: Tensor, in_features: int, out_features: int) -> Tensor:
    """Equation 6: rows and columns of W are tiled with M; the input's last block is filled from its start."""
    size = len(matrix)
    delta = matrix.new_zeros(out_features, in_features)
    for row in range(out_features):
        for column in range(math.ceil(in_features / size) * size):
            delta[row, column % in_features] += matrix[row % size, column % size]
    return delta


def mora_rotary(matrix: Tensor, in_features: int, out_features: int) -> Tensor:
    """Equation 9: block j of the output is M on block j of the input, turned by RoPE at position j."""
    size, half = len(matrix), len(matrix) // 2
    blocks = math.ceil(in_features / size)
    delta = matrix.new_zeros(out_features, in_features)
    for row in range(out_features):
        block = row // size % blocks  # an output with more blocks starts over
        rotation = matrix.new_zeros(size, size)
        for pair in range(half):
            angle = block * 10000 ** (-2 * pair / size)
            rotation[pair, pair] = rotation[pair + half, pair + half] = math.cos(angle)
            rotation[pair, pair + half] = -math.sin(angle)
            rotation[pair + half, pair] = math.sin(angle)
        turned = matrix[row % size] @ rotation
        for place in range(size):
            delta[row, (block * size + place) % in_features] += turned[place]
    return delta


MORA = {1: mora_sharing, 6: mora_rotary}


@pytest.mark.parametrize("mora_type", MORA)
@pytest.mark.parametrize(("in_features", "out_features", "rank"), SIZES)
def test_mora_is_the_papers(mora_type: int, in_features: int, out_features: int, rank: int) -> None:
    layer, x = linear(in_features, out_features), random(2, 3, in_features)
    (adapter,) = adapted(layer, "mora", rank, mora_type=mora_type).adapters
    size = int(math.sqrt((in_features + out_features) * rank) + 0.5)
    assert len(adapter.mora_weight) == (size if mora_type == 1 else size // 2 * 2)
    matrix = adapter.mora_weight.detach().clone().requires_grad_()
    delta = MORA[mora_type](matrix, in_features, out_features)
    expected = x @ (layer.weight + delta).T + layer.bias
    output = layer(x)
    assert torch.allclose(output, expected, rtol=1e-10, atol=1e-12)
    output.sin().sum().backward()
    expected.sin().sum().backward()
    assert torch.allclose(adapter.mora_weight.grad, matrix.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mora_type", MORA)
def test_mora_files_hold_the_scale_and_any_size(mora_type: int) -> None:
    layer, x = linear(31, 7), random(3, 31)
    adapters = adapted(layer, "mora", 16, alpha=5.0, mora_type=mora_type)
    output, state = layer(x), adapters.state()
    adapters.detach()
    assert not close(layer(x), output)
    state["net"]["mora_weight"] = state["net"]["mora_weight"].float()
    attach_adapters({"net": layer}, state)
    assert close(layer(x), output)
    state["net"]["mora_weight"] = state["net"]["mora_weight"][:-1]
    with pytest.raises(ConfigError, match="must be square"):
        attach_adapters({"net": layer}, state)


def test_mora_refuses_other_types() -> None:
    with pytest.raises(ConfigError, match="mora_type is 2"):
        adapted(linear(8, 8), "mora", mora_type=2)


# -- QA-LoRA (arXiv:2309.14717) ---------------------------------------------------------------


def qalora_delta(up: Tensor, down: Tensor, scale: float, group: int, pool: str) -> Tensor:
    """Algorithm 1 of the paper pools by a sum over each group; its text, and the authors' repository, by a mean."""
    pooling = up.new_zeros(down.shape[1], down.shape[1] * group)
    for column in range(pooling.shape[1]):
        pooling[column // group, column] = 1 / group if pool == "mean" else 1
    return scale * up @ down @ pooling


@pytest.mark.parametrize("pool", ["mean", "sum"])
@pytest.mark.parametrize("group_size", [1, 4, 24])
def test_qalora_is_the_papers(pool: str, group_size: int) -> None:
    layer, x = linear(24, 10), random(2, 3, 24)
    (adapter,) = adapted(layer, "qalora", alpha=6.0, group_size=group_size, pool=pool).adapters
    up, down = (one.detach().clone().requires_grad_() for one in (adapter.lora_up, adapter.lora_down))
    assert down.shape == (4, 24 // group_size)
    expected = x @ (layer.weight + qalora_delta(up, down, 1.5, group_size, pool)).T + layer.bias
    output = layer(x)
    assert torch.allclose(output, expected, rtol=1e-10, atol=1e-12)
    output.sin().sum().backward()
    expected.sin().sum().backward()
    assert torch.allclose(adapter.lora_up.grad, up.grad, rtol=1e-10, atol=1e-12)
    assert torch.allclose(adapter.lora_down.grad, down.grad, rtol=1e-10, atol=1e-12)


def test_qalora_takes_the_groups_of_its_base() -> None:
    assert next(iter(adapted(zero_points(), "qalora").adapters)).group_size == 8
    assert next(iter(adapted(linear(72, 8), "qalora").adapters)).group_size == 24
    assert next(iter(adapted(linear(64, 8), "qalora").adapters)).group_size == 32


def zero_points(group_size: int = 8) -> ZeroPointLinear:
    layer = ZeroPointLinear.from_linear(linear(48, 20), group_size=group_size)
    return layer.double()


@pytest.mark.parametrize("pool", ["mean", "sum"])
@pytest.mark.parametrize("group_size", [None, 16, 48])
def test_qalora_merges_exactly_into_zero_points(group_size: int | None, pool: str) -> None:
    layer, x = zero_points(), random(5, 48)
    before, base = copy.deepcopy(layer.state_dict()), layer(x)
    adapters = adapted(layer, "qalora", group_size=group_size, pool=pool)
    adapters.set_strength(0.7)
    beside = layer(x)
    report = adapters.merge()
    assert torch.equal(layer.qweight, before["qweight"])
    assert torch.equal(layer.scales, before["scales"])
    assert not torch.equal(layer.zeros, before["zeros"])
    assert torch.allclose(layer(x), beside, rtol=1e-10, atol=1e-12)
    assert report.lost["net"] < 1e-12
    adapters.unmerge()
    assert all(torch.equal(one, before[name]) for name, one in layer.state_dict().items())
    adapters.detach()
    assert torch.equal(layer(x), base)


def test_a_qalora_file_is_a_lora_that_still_merges_exactly() -> None:
    layer, x = zero_points(), random(5, 48)
    adapters = adapted(layer, "qalora")
    beside, state = layer(x), adapters.state()
    adapters.detach()
    assert set(state["net"]) == {"lora_down.weight", "lora_up.weight", "alpha"}
    loaded = attach_adapters({"net": layer}, state)
    assert close(layer(x), beside)
    qweight = layer.qweight.clone()
    assert loaded.merge().lost["net"] < 1e-6
    assert torch.equal(layer.qweight, qweight)
    loaded.detach()
    other = adapted(layer, "lora")  # constant in no group: it needs new integers
    assert other.merge().lost["net"] > 1e-3


def test_qalora_refuses_groups_that_could_not_be_merged() -> None:
    with pytest.raises(ConfigError, match="net: group_size 12 is no multiple of the quantised layer's 8"):
        adapted(zero_points(), "qalora", group_size=12)
    with pytest.raises(ConfigError, match="does not divide the layer's 48 inputs"):
        adapted(zero_points(), "qalora", group_size=7)
    with pytest.raises(ConfigError, match="pool is 'max'"):
        adapted(zero_points(), "qalora", pool="max")


# -- Delta-LoRA (arXiv:2309.02411) ------------------------------------------------------------


def optimizer_of(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.5, weight_decay=0.01)
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)


def simulated(layer: nn.Linear, up: Tensor, down: Tensor, name: str, scale: float, share: float, start: int) -> Any:
    """Algorithm 1 of the paper, word by word: after step t > K, W moves by lambda * scale * (B' A' - B A)."""
    weight, up, down = layer.weight.clone(), up.clone().requires_grad_(), down.clone().requires_grad_()
    optimizer = optimizer_of(name, [down, up])
    losses, x_gradients = [], []
    for step in range(20):
        x = random(6, 12, seed=step).requires_grad_()
        loss = (x @ weight.T + layer.bias + scale * (x @ down.T) @ up.T).sin().square().mean()
        loss.backward()
        before = (up @ down).detach()
        optimizer.step()
        optimizer.zero_grad()
        if step > start:
            weight = weight + share * scale * ((up @ down).detach() - before)
        losses.append(loss.detach())
        x_gradients.append(x.grad)
    return losses, x_gradients, up, down, weight + scale * up @ down


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(("share", "start"), [(0.5, 4), (2.0, 0), (0.7, 30)])
def test_deltalora_trains_as_if_it_changed_the_weight(name: str, share: float, start: int) -> None:
    layer = linear(12, 9)
    own = layer.weight.clone()
    adapters = adapted(layer, "deltalora", alpha=6.0, lambda_=share, start_step=start)
    (adapter,) = adapters.adapters
    expected = simulated(layer, adapter.lora_up.detach(), adapter.lora_down.detach(), name, 1.5, share, start)
    optimizer = optimizer_of(name, [adapter.lora_down, adapter.lora_up])
    for step in range(20):
        x = random(6, 12, seed=step).requires_grad_()
        loss = layer(x).sin().square().mean()
        loss.backward()
        optimizer.step()
        adapters.after_step(step, optimizer)
        optimizer.zero_grad()
        assert torch.allclose(loss, expected[0][step], rtol=1e-9)
        assert torch.allclose(x.grad, expected[1][step], rtol=1e-9, atol=1e-12)
    assert torch.allclose(adapter.lora_up, expected[2], rtol=1e-9, atol=1e-12)
    assert torch.allclose(adapter.lora_down, expected[3], rtol=1e-9, atol=1e-12)
    assert torch.equal(layer.weight, own)
    x = random(6, 12, seed=99)
    adapters.merge()
    assert torch.allclose(layer.weight, expected[4], rtol=1e-9, atol=1e-12)
    adapters.unmerge()
    state, output = adapters.state(), layer(x)
    assert len(state["net"]["lora_down.weight"]) == (8 if start < 20 else 4)
    adapters.detach()
    attach_adapters({"net": layer}, state)
    assert close(layer(x), output)


def test_deltalora_resumes_after_its_start() -> None:
    layer, other = linear(12, 9), linear(12, 9)
    adapters, resumed = (adapted(one, "deltalora", start_step=1) for one in (layer, other))
    for step in range(3):
        with torch.no_grad():
            adapters.adapters[0].lora_up += 0.1
        adapters.after_step(step)
    resumed.load_state_dict(adapters.state_dict())
    resumed.after_step(3)
    x = random(6, 12)
    assert torch.equal(other(x), layer(x))


def test_deltalora_refuses_dropout() -> None:
    with pytest.raises(ConfigError, match="no dropout"):
        inject({"net": linear(8, 8)}, AdapterPlan(("re:.*",), config=AdapterConfig("deltalora", dropout=0.1)), {})
