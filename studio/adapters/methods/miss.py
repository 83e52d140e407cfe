"""MiSS: dW[o, i] = scale * D[i mod r, o], one block of r input columns shared by all (arXiv:2409.15371).

So the layer's input is summed over its blocks of r, and D acts on the sum: a LoRA whose `lora_down` is
a row of identity matrices that nobody has to store or train.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio.adapters.base import AdapterConfig
from studio.adapters.entries import alpha_of, filled
from studio.adapters.layers import LayerSpec, WeightView
from studio.adapters.lowrank import LowRank
from studio.errors import ConfigError


class MiSS(LowRank):
    """`miss_block` D, (r, out), as in peft, whose scale is 1; r is at most in."""

    method = "miss"
    kinds = frozenset({"linear"})
    needed = frozenset({"miss_block"})
    optional = frozenset({"alpha"})

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        self.miss_block = nn.Parameter(torch.zeros(config.rank, spec.out_features))

    @classmethod
    def check(cls, spec: LayerSpec, config: AdapterConfig) -> None:
        super().check(spec, config)
        if config.rank > spec.in_features:
            raise ConfigError(f"rank {config.rank} is above the layer's {spec.in_features} inputs: lower it")

    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        """D is zero: nothing is drawn."""
        nn.init.zeros_(self.miss_block)

    def down_weight(self) -> Tensor:
        rank, inputs = self.config.rank, self.spec.in_features
        identity = torch.eye(rank, dtype=self.miss_block.dtype, device=self.miss_block.device)
        return identity.repeat(1, -(-inputs // rank))[:, :inputs]  # (r, in)

    def up_weight(self) -> Tensor:
        return self.miss_block.T

    def read(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of the input's blocks: no product."""
        padding = -self.spec.in_features % self.config.rank
        return F.pad(self.dropped(x), (0, padding)).unflatten(-1, (-1, self.config.rank)).sum(-2).to(dtype)

    def export(self) -> dict[str, Tensor]:
        """`alpha` carries the scale: readers compute alpha / rank."""
        return {"miss_block": self.miss_block.detach(), "alpha": torch.tensor(self.scale * self.config.rank)}

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> MiSS:
        return filled(cls(spec, AdapterConfig(cls.method, len(tensors["miss_block"]), alpha_of(tensors))), tensors)
