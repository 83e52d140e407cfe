"""What must hold for every method on every kind of layer: a new method is tested without a new test."""

from __future__ import annotations

import copy

import pytest
import torch
from layers import adapted, cases, close, config_of, home, net_of, randomise
from torch.utils.checkpoint import checkpoint

from studio.adapters import METHODS, AdapterPlan, attach_adapters, inject

CASES = cases()


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_a_new_adapter_changes_nothing(method: str, kind: str) -> None:
    net, x = net_of(kind)
    before = net(x)
    inject({"net": net}, AdapterPlan(("re:.*",), config=config_of(method)), {})
    assert close(net(x), before)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_forward_is_the_base_with_the_merged_weight(method: str, kind: str) -> None:
    net, x = net_of(kind)
    state, base = copy.deepcopy(net.state_dict()), net(x)
    adapters = adapted(net, method)
    adapters.set_strength(0.7)
    beside = net(x)
    assert not close(beside, base)
    report = adapters.merge()
    assert close(net(x), beside)
    assert max(report.lost.values()) < 1e-5
    adapters.unmerge()
    assert torch.equal(net(x), beside)
    adapters.detach()
    assert torch.equal(net(x), base)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert list(net.state_dict()) == list(state)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_strength_zero_is_the_base_and_two_sets_add(method: str, kind: str) -> None:
    net, x = net_of(kind)
    base = net(x)
    first = adapted(net, method)
    first.set_strength(0)
    assert torch.equal(net(x), base)
    first.set_strength(1)
    second = adapted(net, method)
    randomise(second, 2)
    first.enabled = False
    second.enabled = True
    first.enabled = True
    first.set_strength(0.5)
    together = net(x)
    first.merge()
    assert close(net(x), together)
    second.merge()
    assert close(net(x), together)
    first.unmerge()
    assert close(net(x), together)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_a_state_comes_back(method: str, kind: str) -> None:
    net, x = net_of(kind)
    adapters = adapted(net, method)
    output, state = net(x), adapters.state()
    adapters.detach()
    again = attach_adapters({"net": net}, state)
    assert close(net(x), output)
    once_more = again.state()
    assert {name: set(entry) for name, entry in once_more.items()} == {
        name: set(entry) for name, entry in state.items()
    }


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_every_parameter_gets_a_gradient_and_checkpointing_gives_the_same(method: str, kind: str) -> None:
    net, x = net_of(kind)
    adapters = adapted(net, method)
    adapters.train()
    weights = torch.randn(net(x).shape, generator=torch.Generator().manual_seed(3))
    (net(x) * weights).sum().backward()
    plain = {name: parameter.grad for name, parameter in adapters.named_parameters() if parameter.requires_grad}
    assert plain
    assert all(gradient is not None and gradient.any() for gradient in plain.values())
    adapters.zero_grad()
    (checkpoint(net, x, use_reentrant=False) * weights).sum().backward()
    for name, parameter in adapters.named_parameters():
        assert not parameter.requires_grad or close(parameter.grad, plain[name])


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_gradients_are_those_of_the_effective_weight(method: str, kind: str) -> None:
    """In float64, by finite differences of the loss along a random direction."""
    net, x = net_of(kind)
    net, x = net.double(), x.double() if x.is_floating_point() else x
    adapters = adapted(net, method).double()
    trained = [parameter for parameter in adapters.parameters() if parameter.requires_grad]
    if method == "dora":
        trained = [adapter.dora_scale for adapter in adapters.adapters]  # its norm is a constant for the gradient
    generator = torch.Generator().manual_seed(4)
    directions = [torch.randn(parameter.shape, generator=generator).double() for parameter in trained]
    net(x).sin().sum().backward()
    slope = sum((parameter.grad * one).sum() for parameter, one in zip(trained, directions, strict=True))
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for parameter, one in zip(trained, directions, strict=True):
                parameter += step * one
            values.append(net(x).sin().sum())
    assert abs((values[0] - values[1]) / 2e-6 - slope) <= 1e-5 * (1 + abs(slope))


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_a_base_in_bf16_keeps_its_dtype(method: str, kind: str) -> None:
    net, x = net_of(kind)
    adapters = adapted(net, method)
    exact = net(x)
    net.bfloat16()
    output = net(x.bfloat16() if x.is_floating_point() else x)
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).abs().max() <= 0.05 * exact.abs().max()
    output.sum().backward()
    assert all(one.grad.dtype == torch.float32 for one in adapters.parameters() if one.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_model_computes_the_same(method: str) -> None:
    torch._dynamo.reset()
    net, x = net_of(home(method))
    adapters = adapted(net, method)
    expected = net(x)
    compiled = torch.compile(net, backend="aot_eager")
    assert close(compiled(x), expected)
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_the_training_state_comes_back(method: str) -> None:
    net, x = net_of(home(method))
    adapters = adapted(net, method)
    expected, saved = net(x), adapters.state_dict()
    adapters.detach()
    other = adapted(net, method)
    randomise(other, 9)
    assert not close(net(x), expected)
    other.load_state_dict(saved)
    assert torch.equal(net(x), expected)


def test_every_method_sits_on_some_layer() -> None:
    assert {method for method, _ in CASES} == set(METHODS)


def test_toy_names_are_not_registered_twice() -> None:
    with pytest.raises(TypeError, match="registered twice"):
        type("Again", (METHODS["lora"],), {"method": "lora"})
