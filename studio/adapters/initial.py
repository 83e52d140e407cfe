"""How LoRA's factors start: random, or from the base's own weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from studio.adapters.base import AdapterConfig
from studio.adapters.layers import LayerSpec, WeightView
from studio.adapters.lowrank import down_shape, up_shape

Factors = tuple[Tensor, Tensor]  # up, down


@dataclass(frozen=True)
class Init:
    """`compute(spec, config, generator, weight)` gives (up, down). `anchored`: dW is not zero there, so
    the starting point is subtracted."""

    compute: Callable[[LayerSpec, AdapterConfig, torch.Generator, WeightView], Factors]
    anchored: bool = False


def initial_factors(
    init: str, spec: LayerSpec, config: AdapterConfig, generator: torch.Generator, weight: WeightView
) -> Factors:
    """(up, down) in fp32, of `up_shape` and `down_shape`."""
    up, down = INITS[init].compute(spec, config, generator, weight)
    return up.reshape(up_shape(spec, config.rank)).float(), down.reshape(down_shape(spec, config.rank)).float()


def _kaiming(spec: LayerSpec, config: AdapterConfig, generator: torch.Generator, weight: WeightView) -> Factors:
    """Kaiming-uniform down and zero up; for Embedding the roles are exchanged, as in peft."""
    up, down = torch.zeros(up_shape(spec, config.rank)), torch.zeros(down_shape(spec, config.rank))
    if spec.kind == "embedding":
        return up.normal_(generator=generator), down
    return up, nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)


INITS: dict[str, Init] = {
    "kaiming": Init(_kaiming),
}
