"""Hot swapping under torch.compile: no recompilation, and the same as the eager adapter."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from layers import LAYERS, adapted, close, net_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from studio.adapters import AdapterConfig, AdapterPlan, HotSwapSlot, attach_adapters, inject
from studio.errors import ConfigError

State = Mapping[str, Mapping[str, Tensor]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).flatten(2).mT  # (B, pixels, 6)
        return h + self.second(torch.relu(self.first(h)))


def block() -> tuple[Block, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Block().requires_grad_(False), torch.randn(2, 4, 5, 5)


def saved(
    rank: int, seed: int, targets: tuple[str, ...] = ("re:.*",), method: str = "lora", **settings: float
) -> State:
    """The state of a random adapter of its own model."""
    adapters = inject({"net": block()[0]}, AdapterPlan(targets, config=AdapterConfig(method, rank, **settings)), {})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapters.state()


def swaps() -> list[tuple[State, float]]:
    """Different ranks, scales, strengths and layers."""
    return [
        (saved(8, 1, alpha=2.0), 1.0),
        (saved(2, 2, alpha=1.0, targets=("conv", "second")), 0.6),
        (saved(5, 3, alpha=5.0, method="adalora"), -1.3),
    ]


def eager(state: State, strength: float) -> Tensor:
    net, x = block()
    attach_adapters({"net": net}, state, strength)
    return net(x)


def compiled(net: Block, way: str, backend: CompileCounterWithBackend) -> nn.Module:
    """`net` compiled: what to call."""
    torch._dynamo.reset()
    if way == "wrapper":
        return torch.compile(net, backend=backend)
    if way == "in place":
        net.compile(backend=backend)
    elif way == "regional":
        net.first.compile(backend=backend)
        net.second.compile(backend=backend)
    else:
        net.first, net.second = (torch.compile(one, backend=backend) for one in (net.first, net.second))
    return net


@pytest.mark.parametrize("way", ["wrapper", "regional"])
def test_swapping_never_compiles_again(way: str) -> None:
    net, x = block()
    base, adapters = net(x), swaps()
    expected = [eager(*swap) for swap in adapters]  # here, since attaching anywhere makes all compile again
    slot = HotSwapSlot({"net": net}, ["re:.*"], rank=8)
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(net, way, counter)
    assert close(call(x), base)
    before = counter.frame_count
    assert before
    for (state, strength), output in zip(adapters, expected, strict=True):
        slot.load(state, strength)
        assert close(call(x), output)
        assert not close(call(x), base)
    slot.clear()
    assert close(call(x), base)
    assert counter.frame_count == before


@pytest.mark.parametrize("way", ["wrapper", "in place", "regional", "regional wrappers"])
def test_what_is_attached_to_a_compiled_model_acts(way: str) -> None:
    """torch.compile looks at no hooks again: adapters would be ignored without a word, and merges undone by halves."""
    net, x = block()
    state = saved(4, 1)
    base, expected = net(x), eager(state, 1.0)
    call = compiled(net, way, CompileCounterWithBackend("eager"))
    assert close(call(x), base)
    adapters = attach_adapters({"net": call}, state)
    assert close(call(x), expected)
    for _ in range(2):
        with adapters.merged():
            assert close(call(x), expected)
        assert close(call(x), expected)
    adapters.enabled = False
    assert close(call(x), base)
    adapters.enabled = True
    second = attach_adapters({"net": call}, state, -1.0)
    assert close(call(x), base)
    second.detach()
    assert close(call(x), expected)
    adapters.detach()
    assert close(call(x), base)
    adapters.attach()
    assert close(call(x), expected)


def test_merging_while_compiled_compiles_once() -> None:
    net, x = block()
    adapters = attach_adapters({"net": net}, saved(4, 1))
    adapters.merge()
    counter = CompileCounterWithBackend("eager")
    call = compiled(net, "wrapper", counter)
    expected = call(x)
    adapters.unmerge()  # its hooks come back: compiled again
    for _ in range(2):
        assert close(call(x), expected)
        with adapters.merged():
            assert close(call(x), expected)
    known = counter.frame_count
    for _ in range(2):
        assert close(call(x), expected)
        with adapters.merged():
            assert close(call(x), expected)
    assert counter.frame_count == known


def test_swapping_with_inductor() -> None:
    states = [saved(rank, seed, ("first", "second"), alpha=1.0) for seed, rank in ((1, 4), (2, 2))]
    expected = [eager(state, 0.5) for state in states]
    net, x = block()
    slot = HotSwapSlot({"net": net}, ["first", "second"], rank=4)
    counter = CompileCounterWithBackend("inductor")
    call = compiled(net, "wrapper", counter)
    base = call(x)
    for state, output in zip(states, expected, strict=True):
        slot.load(state, 0.5)
        assert close(call(x), output)
    slot.clear()
    assert torch.equal(call(x), base)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "kind", [kind for kind in LAYERS if kind not in ("norm", "group norm", "experts", "conv2d grouped")]
)
def test_a_slot_acts_as_the_adapter_on_every_kind_of_layer(kind: str) -> None:
    net, x = net_of(kind)
    adapters = adapted(net, "lora")
    adapters.set_strength(0.7)
    expected, state = net(x), adapters.state()
    adapters.detach()
    slot = HotSwapSlot({"net": net}, ["re:.*"], rank=8)
    slot.load(state, 0.7)
    assert close(net(x), expected)
    assert not any(parameter.requires_grad for parameter in slot.parameters())


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    net, x = block()
    slot = HotSwapSlot({"net": net}, ["first", "second"], rank=4)
    slot.load(saved(4, 1, ("first",)))
    before = net(x)
    with pytest.raises(ConfigError, match=r"1 of the adapter's 3 layers are not in the slot: net.conv"):
        slot.load(saved(4, 2))
    with pytest.raises(ConfigError, match=r"above the slot's 4: net.first \(6\), net.second \(6\).*rank 6"):
        slot.load(saved(6, 2, ("first", "second")))
    with pytest.raises(ConfigError, match=r"net.first: 'dora' .* no product of two factors"):
        slot.load(saved(4, 2, ("first",), method="dora"))
    assert torch.equal(net(x), before)
