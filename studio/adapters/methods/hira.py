"""HiRA: dW = scale * W ∘ (B A), a low-rank modulation of the base's own weight (Huang et al., ICLR 2025).

The Hadamard product with W lets a product of rank r change the weight by up to rank(W) * r.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from studio.adapters.base import Adapter, AdapterConfig
from studio.adapters.entries import alpha_of, filled
from studio.adapters.layers import LayerSpec, WeightView, wide


class HiRA(Adapter):
    """`hira_A` (r, in[, *kernel]) and `hira_B` (out, r[, 1...]), as in peft, whose scale is 1."""

    method = "hira"
    kinds = frozenset({"linear", "conv"})
    needed = frozenset({"hira_A", "hira_B"})
    optional = frozenset({"alpha"})

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        self.hira_A = nn.Parameter(torch.zeros(config.rank, *spec.weight_shape[1:]))
        self.hira_B = nn.Parameter(torch.zeros(spec.out_features, config.rank, *(1,) * spec.dims))

    @torch.no_grad()
    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        """Kaiming-uniform A and zero B."""
        nn.init.kaiming_uniform_(self.hira_A, a=math.sqrt(5), generator=generator)

    def delta_weight(self, weight: WeightView) -> Tensor:
        product = self.hira_B.flatten(1) @ self.hira_A.flatten(1)  # (out, in * kernel)
        return self.config.scale * wide(weight.dense()) * product.reshape(weight.shape)

    def export(self) -> dict[str, Tensor]:
        """`alpha` carries the scale: readers compute alpha / rank."""
        alpha = torch.tensor(self.config.scale * self.config.rank)
        return {"hira_A": self.hira_A.detach(), "hira_B": self.hira_B.detach(), "alpha": alpha}

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> HiRA:
        return filled(cls(spec, AdapterConfig(cls.method, len(tensors["hira_A"]), alpha_of(tensors))), tensors)
