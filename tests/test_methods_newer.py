"""HiRA, MiSS, C3A, RandLoRA and SHiRA: equal to peft with the same weights, and what they promise."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from layers import Net, adapted, close, net_of
from peft.tuners.randlora.config import RandLoraConfig
from torch import Tensor, nn

from studio.adapters import (
    METHODS,
    AdapterConfig,
    AdapterPlan,
    AdapterSet,
    WeightView,
    attach_adapters,
    describe,
    inject,
    named_targets,
)
from studio.errors import ConfigError

RANK = 4
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "hira": lambda: peft.HiraConfig(r=RANK, target_modules=["layer"]),
    "miss": lambda: peft.MissConfig(r=RANK, target_modules=["layer"]),
    "c3a": lambda: peft.C3AConfig(block_size=4, target_modules=["layer"]),
    "randlora": lambda: RandLoraConfig(r=RANK, randlora_alpha=2, target_modules=["layer"], projection_prng_key=7),
    "shira": lambda: peft.ShiraConfig(r=RANK, target_modules=["layer"]),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 8),
    "linear wide": lambda: nn.Linear(8, 20, bias=False),
    "linear odd": lambda: nn.Linear(14, 10),
    "conv1d": lambda: nn.Conv1d(12, 8, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(12, 8, 3, stride=2),
    "conv3d": lambda: nn.Conv3d(12, 8, 2),
}
CASES = [(method, kind) for method in CONFIGS for kind in LAYERS if kind.startswith("linear") or method == "hira"]
CASES.remove(("c3a", "linear odd"))  # 4 is no divisor there
NEWER = [*CONFIGS, "loha", "lokr", "tucker"]


def case_of(kind: str) -> tuple[Net, Tensor]:
    """A frozen layer, and an input with a gradient; always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = LAYERS[kind]()
        channels = layer.weight.shape[1]
        shape = (2, channels, *(4,) * (layer.weight.ndim - 2)) if layer.weight.ndim > 2 else (2, 5, channels)
        return Net(layer).requires_grad_(False), torch.randn(shape, requires_grad=True)


def peft_model(net: Net, method: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """peft's model around a copy of `net` with random weights, and those weights by the last part of their keys."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(copy.deepcopy(net), CONFIGS[method]())
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        with torch.no_grad():
            for parameter in trained.values():
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model, {name.split(".")[-2]: parameter for name, parameter in trained.items()}


def entry_of(net: Net, method: str, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file entry with peft's weights."""
    entry = {name: parameter.detach() for name, parameter in weights.items()}
    if method == "shira":
        entry["shira_indices"] = model.base_model.model.layer.shira_indices["default"]
    if method == "randlora":
        entry["randlora_projection"] = torch.tensor([7, *sorted(net.layer.weight.shape)])
        entry["alpha"] = torch.tensor(2.0)
    return entry


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_outputs_and_gradients_are_those_of_peft(method: str, kind: str) -> None:
    net, x = case_of(kind)
    base = net(x)
    model, theirs = peft_model(net, method)
    expected = model(x)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    gradient, x.grad = x.grad, None
    if method == "c3a":  # peft's backward of the circular convolution gives a wrong gradient for x, a right one for w
        gradient = weights @ (net.layer.weight + model.base_model.model.layer.get_delta_weight("default")).detach()

    adapters = attach_adapters({"net": net}, {"net.layer": entry_of(net, method, model, theirs)})
    output = net(x)
    (output * weights).sum().backward()
    assert not close(output, base)
    assert close(output, expected)
    assert close(x.grad, gradient)
    ours = dict(adapters.adapters[0].named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(close(parameter.grad, theirs[name].grad) for name, parameter in ours.items())


@pytest.mark.parametrize("method", CONFIGS)
def test_a_new_adapter_has_the_tensors_of_peft(method: str) -> None:
    net, _ = case_of("linear")
    _, theirs = peft_model(net, method)
    ours = dict(adapted(net, method).adapters[0].named_parameters())
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: one.shape for name, one in theirs.items()}


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d 1x1", "conv1d"])
@pytest.mark.parametrize("method", NEWER)
def test_dropout_acts_on_the_input_of_the_whole_change(method: str, kind: str) -> None:
    net, x = net_of(kind)
    (target,) = named_targets({"net": net}).values()
    if not METHODS[method].supports(target.spec):
        pytest.skip("not for this layer")
    base = net(x)
    adapters = adapted(net, method, dropout=0.5).train()
    adapters.set_keys([1] * len(x))
    (adapter,) = adapters.adapters
    dropped = adapter.dropped(x)
    assert not torch.equal(dropped, x)
    delta = adapter.delta_weight(WeightView(target))
    assert close(net(x), base + target.spec.apply(dropped, delta))


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1d", "transformers Conv1D"])
@pytest.mark.parametrize("method", NEWER)
def test_factors_are_a_product_of_the_change(method: str, kind: str) -> None:
    net, _ = net_of(kind)
    (target,) = named_targets({"net": net}).values()
    if not METHODS[method].supports(target.spec):
        pytest.skip("not for this layer")
    (adapter,) = adapted(net, method, rank=2).adapters
    if adapter.low_rank:
        up, down = adapter.factors(WeightView(target))
        assert close((up @ down).reshape(target.spec.weight_shape), adapter.delta_weight(WeightView(target)))
    else:
        assert method in ("hira", "c3a", "randlora", "shira", "lokr")


class Layers(nn.Module):
    """Three layers of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 10), nn.Linear(10, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).sin()).sin())


def randlora_set(model: nn.Module, **options: int) -> AdapterSet:
    plan = AdapterPlan(("re:.*",), config=AdapterConfig("randlora", 3, options=options))
    adapters = inject({"net": model}, plan, {})
    with torch.no_grad():
        for adapter in adapters.adapters:
            adapter.randlora_lambda.fill_(0.5)
    return adapters


def test_randlora_layers_share_bases_that_a_part_of_the_file_rebuilds() -> None:
    model, x = Layers().requires_grad_(False), torch.randn(4, 6)
    adapters = randlora_set(model, seed=5)
    assert len({id(adapter.projections) for adapter in adapters.adapters}) == 1
    assert adapters.adapters[0].projections.B.shape == (16, 6, 3)  # at most 16 outputs, and 16 inputs
    assert not any(name.startswith("shared") for name in adapters.state_dict())
    state = {name: entry for name, entry in adapters.state().items() if name != "net.second"}
    (middle,) = (adapter for name, adapter in adapters.items() if name == "net.second")
    middle.factor = 0.0
    output = model(x)
    adapters.detach()
    attach_adapters({"net": model}, state)
    assert close(model(x), output)


def test_randlora_seeds_and_loaded_files_may_mix() -> None:
    model, x = Layers().requires_grad_(False), torch.randn(4, 6)
    outputs, states = [], []
    for seed in (0, 1):
        adapters = randlora_set(model, seed=seed)
        outputs.append(model(x))
        states.append(adapters.state())
        adapters.detach()
    assert not close(outputs[0], outputs[1])
    attach_adapters({"net": model}, states[1])
    assert close(model(x), outputs[1])


def test_shira_draws_places_from_the_seed() -> None:
    net, _ = case_of("linear")
    (target,) = named_targets({"net": net}).values()
    drawn = []
    for seed in (0, 0, 1):
        adapter = METHODS["shira"](target.spec, AdapterConfig("shira", 2))
        adapter.reset(torch.Generator().manual_seed(seed), WeightView(target))
        drawn.append(adapter.shira_indices.clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert len(set(map(tuple, drawn[0].T.tolist()))) == 2 * (12 + 8)


def test_c3a_blocks_are_circulant() -> None:
    """y_k = sum_j x_j w_(j - k), written out."""
    net, _ = net_of("linear")
    (adapter,) = adapted(net, "c3a").adapters
    delta = adapter.delta_weight(WeightView(named_targets({"net": net})["net.layer"]))
    for row in range(8):
        for column in range(12):
            kernel = adapter.c3a_kernel[row // 4, column // 4]
            assert torch.equal(delta[row, column], kernel[(column - row) % 4] / 12)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("miss", {"rank": 13}, "rank 13 is above the layer's 12 inputs"),
        ("shira", {"rank": 5}, "at most 4 fits"),
        ("c3a", {"options": {"block_size": 3}}, "block_size 3 must divide 12 inputs and 8 outputs: 4 does"),
    ],
)
def test_settings_that_do_not_fit_are_refused(method: str, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        METHODS[method](describe(nn.Linear(12, 8)), AdapterConfig(method, **settings))


@pytest.mark.parametrize("method", CONFIGS)
def test_files_for_another_base_are_refused(method: str) -> None:
    net, _ = case_of("linear")
    (entry,) = adapted(net, method).state().values()
    with pytest.raises(ConfigError, match=r"another base|must divide"):
        attach_adapters({"net": Net(nn.Linear(11, 7))}, {"net.layer": entry})
