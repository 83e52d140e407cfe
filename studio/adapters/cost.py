"""What an adapter takes: parameters, and flops of a forward pass, counted without a weight or an activation.

The adapter is built on the meta device and run there on one sample and on two. What grows with the samples is
the cost of a position (a token, an output pixel); the rest is that of a call, whatever its length (DoRA takes its
norm once).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from studio.adapters.base import METHODS, AdapterConfig
from studio.adapters.layers import LayerSpec, Target, WeightView

POSITIONS = 256  # of a sample, about: some methods choose their way by the length of the input


@dataclass(frozen=True)
class Cost:
    """`parameters` train. `position` and `call` are flops, two for a multiply-add, of matrix products and
    convolutions: for each output position, and once a call. `base` is the layer's own for each position,
    0 where its module uses the weight itself."""

    parameters: int
    position: int
    call: int
    base: int


def cost_of(spec: LayerSpec, config: AdapterConfig) -> Cost:
    """The cost of one adapter on such a layer. Raises ConfigError where it cannot sit there."""
    adapter, weight = _on_meta(spec, config)
    parameters = sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)
    if not spec.called:
        return Cost(parameters, 0, _flops(lambda: adapter.delta_weight(weight)), 0)
    x = _input(spec, 1)
    positions = spec.apply(x, weight.dense()).numel() // spec.out_features
    one, two = _added(spec, config, 1), _added(spec, config, 2)
    own = _flops(lambda: spec.apply(x, weight.dense()))
    return Cost(parameters, (two - one) // positions, 2 * one - two, own // positions)


def _on_meta(spec: LayerSpec, config: AdapterConfig) -> tuple[Any, WeightView]:
    """A new adapter, and a weight for it to look at: both without memory."""
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.empty(spec.weight_shape, device="meta"), requires_grad=False)
    layer.bias = nn.Parameter(torch.empty(spec.out_features, device="meta")) if spec.bias else None
    method = METHODS[config.method]
    with torch.device("meta"):
        adapter = method(spec, config)
    method.share([adapter], 0)
    return adapter, WeightView(Target("", layer, replace(spec, transposed=False)))


def _input(spec: LayerSpec, samples: int) -> Tensor:
    """About `POSITIONS` in each sample; a convolution gets what its kernel reaches beyond."""
    if spec.kind == "embedding":
        return torch.empty(samples, POSITIONS, dtype=torch.long, device="meta")
    if spec.kind == "linear":
        return torch.empty(samples, POSITIONS, spec.in_features, device="meta")
    side = round(POSITIONS ** (1 / spec.dims))
    reach = zip(spec.options["dilation"], spec.weight_shape[2:], strict=True)
    sides = (side + dilation * (kernel - 1) for dilation, kernel in reach)
    return torch.empty(samples, spec.in_features * spec.groups, *sides, device="meta")


def _added(spec: LayerSpec, config: AdapterConfig, samples: int) -> int:
    """The flops of the adapter alone in one call of its layer; a new one, which remembers nothing."""
    adapter, weight = _on_meta(spec, config)
    x = _input(spec, samples)
    y = spec.apply(x, weight.dense())
    return _flops(lambda: adapter.input_delta(x) if adapter.on_input else adapter(x, y, y, weight))


def _flops(run: Callable[[], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    in_place = {torch.ops.aten.baddbmm_: _product_flops}  # which the counter does not know
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def _product_flops(_: torch.Size, left: torch.Size, right: torch.Size, **__: Any) -> int:
    """Of (B, m, k) @ (B, k, n)."""
    return 2 * left.numel() * right[-1]
