"""One layer of every kind that an adapter can sit on, with an input; and adapters with no zero in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from studio.adapters import (
    METHODS,
    AdapterConfig,
    AdapterPlan,
    AdapterSet,
    attach_adapters,
    inject,
    mixed_batch,
    named_targets,
)
from studio.errors import ConfigError


class Experts(nn.Module):
    """A mixture's experts: one parameter (experts, in, out) that the module multiplies with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 8))
        self.is_transposed = True  # transformers' mark of this order

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,eio->bto", x, self.gate_up_proj)


class Fused(nn.Module):
    """A fused projection, as in `nn.MultiheadAttention`: the weight is a bare parameter (out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(24, 12))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.in_proj_weight)


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(8, 12)


def _sequence() -> Tensor:
    return torch.randn(3, 5, 12)


def _picture() -> Tensor:
    return torch.randn(2, 8, 9, 9)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 8), _sequence),
    "linear without bias": (lambda: nn.Linear(12, 16, bias=False), _sequence),
    "transformers Conv1D": (_conv1d, _sequence),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), lambda: torch.randn(2, 8, 11)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), _picture),
    "conv2d 1x1": (lambda: nn.Conv2d(8, 12, 1), _picture),
    "conv2d dilated": (lambda: nn.Conv2d(8, 12, 3, dilation=2), _picture),
    "conv2d grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), _picture),
    "conv2d reflect": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), _picture),
    "conv3d": (lambda: nn.Conv3d(4, 8, 3, padding=1), lambda: torch.randn(2, 4, 5, 5, 5)),
    # token 0, the padding, gets no gradient
    "embedding": (lambda: nn.Embedding(20, 12, padding_idx=0), lambda: torch.randint(1, 20, (3, 7))),
    "norm": (lambda: nn.LayerNorm(12), _sequence),
    "group norm": (lambda: nn.GroupNorm(2, 8), _picture),
    "experts": (Experts, _sequence),
    "fused": (Fused, _sequence),
}


class Net(nn.Module):
    """A model with one layer, called "net.layer"."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def net_of(kind: str) -> tuple[Net, Tensor]:
    """A frozen random model with a layer of this kind, and an input; always the same."""
    make, make_input = LAYERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = Net(make()), make_input()
        with torch.no_grad():
            for parameter in net.parameters():  # norms too: no ones, no zeros
                parameter.copy_(torch.randn(parameter.shape))
    return net.requires_grad_(False), x


OPTIONS: dict[str, dict[str, Any]] = {"tokens": {"token_ids": (4, 7)}}
"""The options that a method cannot do without; the tokens are in the embedding's input."""


def config_of(method: str, options: Mapping[str, Any] | None = None, **settings: Any) -> AdapterConfig:
    """Rank 4 and alpha 2 unless told."""
    settings = {"rank": 4, "alpha": 2.0, **settings}
    return AdapterConfig(method, options=options or OPTIONS.get(method, {}), **settings)


def adapted(
    net: nn.Module, method: str = "lora", options: Mapping[str, Any] | None = None, **settings: Any
) -> AdapterSet:
    """`net` under an adapter of random values, never zero, on every layer; settings as in `config_of`."""
    adapters = inject({"net": net}, AdapterPlan(("re:.*",), config=config_of(method, options, **settings)), {})
    randomise(adapters)
    return adapters


def randomise(adapters: AdapterSet, seed: int = 1) -> None:
    """Random values in everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def supported(method: str, kind: str) -> bool:
    """Whether the method can sit on this layer kind with rank 4."""
    target = next(iter(named_targets({"net": net_of(kind)[0]}).values()))
    try:
        METHODS[method].check(target.spec, config_of(method))
    except ConfigError:
        return False
    return True


def cases() -> list[tuple[str, str]]:
    """(method, layer kind) for every pair that goes together."""
    return [(method, kind) for method in METHODS for kind in LAYERS if supported(method, kind)]


def home(method: str) -> str:
    """The first layer kind that the method can sit on."""
    return next(kind for kind in LAYERS if supported(method, kind))


def close(a: Tensor, b: Tensor) -> bool:
    """|a - b| <= 1e-6 + 1e-4 max|b|, which an analytically zero gradient passes too."""
    return bool(((a - b).abs() <= 1e-6 + 1e-4 * b.abs().max()).all())


def check_options(method: str, kind: str, options: Mapping[str, Any], **settings: Any) -> None:
    """With these options too: forward = merged, unmerging is exact, and a state comes back."""
    net, x = net_of(kind)
    adapters = adapted(net, method, options, **settings)
    beside = net(x)
    adapters.merge()
    assert close(net(x), beside)
    adapters.unmerge()
    assert torch.equal(net(x), beside)
    state = adapters.state()
    adapters.detach()
    assert not close(net(x), beside)
    again = attach_adapters({"net": net}, state)
    assert close(net(x), beside)
    assert [set(entry) for entry in again.state().values()] == [set(entry) for entry in state.values()]


def check_rows(method: str, options: Mapping[str, Any] | None = None) -> None:
    """In a mixed batch, each sample is what its own adapter, or none, makes of it alone."""
    net, x = net_of("linear")
    alone = [net(x)]
    sets = [adapted(net, method, options), adapted(net, method, options)]
    randomise(sets[1], 2)
    for one, other in (sets, sets[::-1]):
        one.enabled, other.enabled = True, False
        alone.append(net(x))
    sets[0].enabled = sets[1].enabled = True
    with mixed_batch([sets[1], None, sets[0]]):
        mixed = net(x)
    assert close(mixed, torch.stack([alone[2][0], alone[0][1], alone[1][2]]))
