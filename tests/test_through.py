"""Training through the weight: the same function and gradients, taken where it pays, and gone when the call ends."""

from __future__ import annotations

import copy

import pytest
import torch
from layers import adapted, close, randomise
from torch import Tensor, nn

from studio.adapters import AdapterSet, WeightView, attachment, named_targets
from studio.adapters.through import Passage


@pytest.fixture
def passages(monkeypatch) -> list[Passage]:
    """The calls that went through the weight, in their order."""
    seen: list[Passage] = []
    leave = attachment.leave

    def noted(layer: nn.Module, passage: Passage, output: Tensor | None) -> Tensor | None:
        seen.append(passage)
        return leave(layer, passage, output)

    monkeypatch.setattr(attachment, "leave", noted)
    return seen


def linear(method: str, bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, AdapterSet]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12, bias=bias, dtype=dtype)).requires_grad_(False)
    adapters = adapted(net, method)
    adapters.to(dtype)
    randomise(adapters, 1)
    return net, adapters


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()


def by_definition(net: nn.Sequential, adapters: AdapterSet, x: Tensor) -> Tensor:
    """The output from W + strength * dW, with autograd's own gradients."""
    (target,) = named_targets({"net": net}).values()
    delta = adapters.adapters[0].delta_weight(WeightView(target))
    return nn.functional.linear(x, net[0].weight + adapters.gate.strength * delta, net[0].bias)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("method", ["lora", "adalora", "dora"])
def test_output_and_gradients_are_those_of_the_definition(method: str, bias: bool, passages) -> None:
    net, adapters = linear(method, bias)
    if method == "lora":
        adapters.set_strength(-0.6)
    weights = torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = []
    for call in (lambda x: net(x), lambda x: by_definition(net, adapters, x)):
        x = tokens(3, 5)
        output = call(x)
        trained = [one for one in adapters.parameters() if one.requires_grad]
        found.append([output, *torch.autograd.grad((weights * output).sum(), [x, *trained])])
    assert len(passages) == 1
    for ours, theirs in zip(*found, strict=True):
        assert close(ours, theirs)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_1x1_convolution_goes_through_as_well(batch: int, passages) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 12, 1, dtype=torch.float64)).requires_grad_(False)
    adapters = adapted(net, "dora")
    adapters.to(torch.float64)
    randomise(adapters, 1)
    (target,) = named_targets({"net": net}).values()
    found = []
    for ours in (True, False):
        x = tokens(batch, 5, 6).detach().movedim(-1, 1).requires_grad_()  # (batch, 8, 5, 6)
        delta = adapters.adapters[0].delta_weight(WeightView(target))
        output = net(x) if ours else nn.functional.conv2d(x, net[0].weight + delta, net[0].bias)
        found.append([output, *torch.autograd.grad(output.sin().sum(), [x, *adapters.parameters()])])
    assert len(passages) == 1
    assert all(close(one, other) for one, other in zip(*found, strict=True))


def test_it_is_taken_where_it_pays(passages) -> None:
    net, adapters = linear("lora")
    net(tokens(8))
    assert not passages  # as many tokens as inputs: beside the weight
    net(tokens(9))
    assert len(passages) == 1
    with torch.no_grad():
        net(tokens(9))
    twin = adapters.clone().attach()
    net(tokens(9))  # two adapters
    twin.detach()
    handle = net[0].register_forward_hook(lambda *_: None)  # which is to see the layer's own output
    net(tokens(9))
    handle.remove()
    with adapters.merged():
        net(tokens(9))
    adapters.enabled = False
    net(tokens(9))
    assert len(passages) == 1


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_layer_is_as_it_was_after_a_call_even_a_failed_one(method: str, passages) -> None:
    net, _ = linear(method)
    own = dict(net[0].__dict__)
    weight = net[0].weight
    with pytest.raises(RuntimeError):
        net(torch.ones(20, 7, dtype=torch.float64))
    assert len(passages) == 1 and torch.is_grad_enabled()
    assert net[0].weight is weight and net[0].__dict__.keys() == own.keys()
    output = net(tokens(20))
    assert output.requires_grad and net[0].weight is weight and net[0].__dict__.keys() == own.keys()


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(passages) -> None:
    net, _ = linear("dora")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        net(tokens(40))
    assert passages
    assert all(one is net[0].weight or one.data_ptr() == net[0].weight.data_ptr() for one in kept if one.numel() == 96)


def test_a_copy_of_the_model_goes_through_its_own_weight(passages) -> None:
    net, _ = linear("lora")
    twin = copy.deepcopy(net)
    twin[0].weight.mul_(2)
    x = tokens(20)
    assert close(twin(x) - net(x), x @ net[0].weight.T)
    assert len(passages) == 2


def test_checkpointing_recomputes_the_same(passages) -> None:
    net, adapters = linear("dora")
    gradients = []
    for run in (net, lambda x: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)):
        x = tokens(20)
        gradients.append(torch.autograd.grad(run(x).square().sum(), [x, *adapters.parameters()]))
    assert len(passages) == 3
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_gradients_of_gradients(passages) -> None:
    net, adapters = linear("lora")
    found = []
    for call in (lambda x: net(x), lambda x: by_definition(net, adapters, x)):
        x = tokens(20)
        (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), list(adapters.parameters())))
    assert passages
    assert all(close(one, other) for one, other in zip(*found, strict=True))


def test_a_magnitude_of_zero_is_no_trap(passages) -> None:
    net, adapters = linear("dora")
    with torch.no_grad():
        adapters.adapters[0].dora_scale[0] = 0
    gradients = torch.autograd.grad(net(tokens(20)).sum(), list(adapters.parameters()))
    assert passages and all(one.isfinite().all() for one in gradients)


def test_a_base_that_trains_keeps_its_gradient(passages) -> None:
    net, _ = linear("lora")
    net.requires_grad_()
    net(tokens(20)).sum().backward()
    assert not passages and net[0].weight.grad is not None
