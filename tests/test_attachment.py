"""What surrounds an adapter's layer: hooks of others, autocast, inference mode, calls that failed, shared reads."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from layers import adapted, cases, close, net_of, randomise
from torch import Tensor, nn

from studio.adapters import AdapterSet, mixed_batch
from studio.errors import ConfigError


class Heads(nn.Module):
    """Three layers that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x) + self.v(x)


class Changing(Heads):
    """Two of them read it after it was changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        q = self.q(x)
        x += 1
        return q + self.k(x) * self.v(x)


class InFp32(nn.Linear):
    """Computes in fp32 whatever autocast says, as bitsandbytes' 4-bit layers give back their input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class Activated(nn.Linear):
    """Keeps its output for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def heads(make: Callable[[], nn.Module] = Heads) -> tuple[nn.Module, AdapterSet, Tensor]:
    torch.manual_seed(0)
    net, x = make().requires_grad_(False), torch.randn(4, 5, 12)
    return net, adapted(net), x


# -- the layer's output ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_what_another_hook_keeps_is_never_written_into(method: str) -> None:
    net, x = net_of("linear without bias")
    kept: list[Tensor] = []
    net.layer.register_forward_hook(lambda layer, args, output: kept.append(output))
    base = net(x)
    adapted(net, method)
    assert not close(net(x), base)
    assert all(torch.equal(one, base) for one in kept)


def test_a_layer_that_keeps_its_output_can_train_in_front() -> None:
    """In place, autograd would refuse: tanh's backward pass needs its output."""
    net = nn.Sequential(Activated(12, 12)).requires_grad_(False)
    adapted(net)
    x = torch.randn(2, 3, 12, requires_grad=True)
    net(x).sum().backward()
    assert x.grad is not None


# -- modes of the pass -------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "qalora", "tokens"])
def test_a_layer_that_does_not_follow_autocast_has_adapters_that_do_not(method: str, dropout: float) -> None:
    net = nn.Sequential(InFp32(12, 8)).requires_grad_(False)
    x = torch.randn(2, 5, 12, requires_grad=True)
    adapters = adapted(net, method, dropout=dropout)
    adapters.set_keys([1, 2])
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = net(x)
    output.sum().backward()
    assert output.dtype == torch.float32
    assert close(output, expected)


@pytest.mark.parametrize(("method", "kind"), [case for case in cases() if case[1] in ("linear", "conv2d", "norm")])
def test_training_goes_on_after_a_pass_in_inference_mode(method: str, kind: str) -> None:
    net, x = net_of(kind)
    adapters = adapted(net, method)
    with torch.inference_mode():
        net(x)
        adapters.merge()
        net(x)
    adapters.unmerge()
    net(x).sum().backward()
    assert any(parameter.grad is not None for parameter in adapters.parameters())


@pytest.mark.parametrize("method", ["lora", "dora", "hira", "lokr"])
def test_what_is_kept_knows_nothing_of_autocast(method: str) -> None:
    """A norm, or a merged weight, that was computed in bf16 would be used in fp32 later."""
    net, x = net_of("linear")
    adapters = adapted(net, method)
    expected = net(x)
    randomise(adapters)  # what is remembered is out of date
    with torch.autocast("cpu", torch.bfloat16):
        net(x)
        adapters.merge()
    assert close(net(x), expected)
    adapters.unmerge()
    assert close(net(x), expected)


def test_a_call_that_failed_leaves_no_input_behind() -> None:
    net, x = net_of("linear")
    rotation, lora = adapted(net, "oftv2"), adapted(net, "lora")
    rotation.enabled = False
    expected = net(x)
    rotation.enabled = True
    failing = net.layer.register_forward_pre_hook(lambda layer, args: (args[0][..., :-1],))
    with pytest.raises(RuntimeError, match="shape"):
        net(x * 2)
    failing.remove()
    rotation.enabled = False
    assert close(net(x), expected)
    lora.enabled = False
    assert not close(net(x), expected)


# -- shared reads ------------------------------------------------------------------------------------


def test_an_input_that_changes_in_place_is_not_read_together() -> None:
    net, adapters, x = heads(Changing)
    with torch.no_grad():
        expected = net(x)
        adapters.check_used(lambda: net(x))
        assert close(net(x), expected)


@pytest.mark.parametrize("case", ["a layer is off", "some rows"])
def test_a_read_that_nobody_takes_is_not_kept(case: str) -> None:
    """It would be taken by a later call, and a graph can't be copied."""
    net, adapters, x = heads()
    adapters.check_used(lambda: net(x))
    if case == "a layer is off":
        adapters.set_strength(1.0, {"*.k": 0.0})
        net(x)
    else:
        with mixed_batch([adapters, None, adapters, None]):
            net(x)
    assert all(not one.shared._parts for one in adapters.adapters)


def test_a_read_under_way_is_not_copied() -> None:
    net, adapters, x = heads()
    adapters.check_used(lambda: net(x))
    net.q(x)  # a pass that went no further
    assert close(copy.deepcopy(net)(x), net(x))


# -- states that do not go together ------------------------------------------------------------------


def test_checking_use_needs_adapters_that_act() -> None:
    net, adapters, x = heads()
    adapters.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        adapters.check_used(lambda: net(x))
    adapters.detach()
    with pytest.raises(RuntimeError, match="attach"):
        adapters.check_used(lambda: net(x))
    adapters.unmerge()
    assert not any(name.startswith("_studio") for name in net.q.__dict__)


def test_a_wrong_pattern_leaves_all_strengths_as_they_were() -> None:
    _, adapters, _ = heads()
    adapters.set_strength(1.0, {"*.q": 0.5})
    with pytest.raises(ConfigError, match=r"\*\.o"):
        adapters.set_strength(2.0, {"*.k": 0.0, "*.o": 1.0})
    assert [one.strength for one in adapters.adapters] == [0.5, 1.0, 1.0]
