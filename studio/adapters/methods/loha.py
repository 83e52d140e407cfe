"""LoHa: dW = scale * (A1 B1) ∘ (A2 B2), a Hadamard product of two low-rank matrices (FedPara, arXiv:2108.06098).

With LyCORIS's names, A_i is `hada_w<i>_a` and B_i `hada_w<i>_b`; its Tucker form for kernels has a core
`hada_t<i>` (r, r, *kernel) between them: A_i^T · T_i · B_i (their proposition 3).

Such a dW has a rank of up to r^2, and is exactly the product of the row-wise and column-wise Kronecker
(Khatri-Rao) products of the factors, (out, r^2) and (r^2, in). Where r^2 is small against the layer,
that bottleneck costs less than dW.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from studio.adapters.base import Adapter, AdapterConfig
from studio.adapters.entries import alpha_of, filled
from studio.adapters.layers import LayerSpec, WeightView
from studio.adapters.lowrank import add_product


@dataclass(frozen=True)
class LoHaOptions:
    """`tucker`: the Tucker form on convolutions whose kernel is larger than 1 (LyCORIS's use_tucker)."""

    tucker: bool = False


class LoHa(Adapter):
    """(out, r) and (r, in * kernel) twice; in the Tucker form (r, out), (r, in) and (r, r, *kernel) twice."""

    method = "loha"
    kinds = frozenset({"linear", "conv"})
    Options = LoHaOptions
    needed = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    optional = frozenset({"hada_t1", "hada_t2", "alpha"})

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        for name, shape in self._shapes().items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        rank, (out, *rest) = self.config.rank, self.spec.weight_shape
        if self.options.tucker and math.prod(rest[1:]) > 1:
            each = {"hada_w{}_a": (rank, out), "hada_w{}_b": (rank, rest[0]), "hada_t{}": (rank, rank, *rest[1:])}
        else:
            each = {"hada_w{}_a": (out, rank), "hada_w{}_b": (rank, math.prod(rest))}
        return {name.format(one): shape for one in (1, 2) for name, shape in each.items()}

    @torch.no_grad()
    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        """LyCORIS's: standard deviation 1 for the B, 0.1 for A1 and the cores; A2 is zero."""
        for name, parameter in self.named_parameters():
            if name != "hada_w2_a":
                parameter.normal_(std=1.0 if name.endswith("_b") else 0.1, generator=generator)

    def pair(self, number: int) -> tuple[Tensor, Tensor]:
        """Factor 1 or 2 as a product of (out, r) and (r, in * kernel)."""
        a, b = self.get_parameter(f"hada_w{number}_a"), self.get_parameter(f"hada_w{number}_b")
        core = self._parameters.get(f"hada_t{number}")
        return (a, b) if core is None else (a.T, torch.einsum("ij...,jn->in...", core, b).flatten(1))

    def delta_weight(self, weight: WeightView) -> Tensor:
        return self.config.scale * _Hadamard.apply(*self.pair(1), *self.pair(2)).reshape(weight.shape)

    @property
    def low_rank(self) -> bool:
        out, *rest = self.spec.weight_shape
        return self.spec.groups == 1 and self.config.rank**2 * (out + math.prod(rest)) < out * math.prod(rest)

    def product(self, weight: WeightView) -> tuple[Tensor, Tensor, float]:
        (up1, down1), (up2, down2) = self.pair(1), self.pair(2)
        up = torch.einsum("oi,oj->oij", up1, up2).flatten(1)  # (out, r^2)
        down = torch.einsum("in,jn->ijn", down1, down2).flatten(0, 1)  # (r^2, in * kernel)
        return up, down, self.config.scale

    def forward(self, x: Tensor, y: Tensor, base: Tensor | None, weight: WeightView) -> Tensor:
        """Through the bottleneck of r^2 where that is cheaper than dW."""
        if not self.low_rank:
            return super().forward(x, y, base, weight)
        up, down = (factor.to(y.dtype) for factor in self.factors(weight))
        h = self.spec.apply(self.dropped(x).to(y.dtype), down.reshape(-1, *weight.shape[1:]))
        return add_product(self.spec, y, h, up, self.strength)

    def export(self) -> dict[str, Tensor]:
        """As LyCORIS writes it; `alpha` carries the scale, rsLoRA's too: readers compute alpha / rank."""
        tensors = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return {**tensors, "alpha": torch.tensor(self.config.scale * self.config.rank)}

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> LoHa:
        options = {"tucker": "hada_t1" in tensors}
        config = AdapterConfig(cls.method, len(tensors["hada_w1_b"]), alpha_of(tensors), options=options)
        return filled(cls(spec, config), tensors)


class _Hadamard(torch.autograd.Function):
    """(up1 @ down1) ∘ (up2 @ down2), which keeps the factors and not the two products of dW's size."""

    @staticmethod
    def forward(ctx: Any, up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> Tensor:
        ctx.save_for_backward(up1, down1, up2, down2)
        return (up1 @ down1).mul_(up2 @ down2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        up1, down1, up2, down2 = ctx.saved_tensors
        of_first, of_second = gradient * (up2 @ down2), gradient * (up1 @ down1)
        return of_first @ down1.T, up1.T @ of_first, of_second @ down2.T, up2.T @ of_second
