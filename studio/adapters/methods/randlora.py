"""RandLoRA: dW = scale * sum_n B_n Λ_n A Γ_n, full rank from scaled random bases (arXiv:2502.00987).

With s and l the smaller and the larger of in and out, A (r, s) and the B_n (l, r) are random, frozen and
common to all layers; the diagonals Λ_n (r) and Γ_n (s) of the ceil(s / r) terms are trained. A layer
takes its part of the bases, which reach to the largest one; where out is the smaller, dW is the transpose.
The bases are a function of a seed and their shapes, drawn as peft draws them: a file holds these alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from studio.adapters.base import Adapter, AdapterConfig
from studio.adapters.entries import alpha_of, filled
from studio.adapters.layers import LayerSpec, WeightView
from studio.adapters.projections import read_projection, share_projections


@dataclass(frozen=True)
class RandLoRAOptions:
    """`seed`: of the bases (peft's projection_prng_key)."""

    seed: int = 0


class Bases(nn.Module):
    """A (r, 1, small) and B (large, ceil(small / r), r) of standard deviation 1, not trained and not stored."""

    def __init__(self, seed: int, rank: int, small: int, large: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        a = _kaiming((rank, 1, small), generator)
        b = torch.cat([_kaiming((large, 1, rank), generator) for _ in range(math.ceil(small / rank))], dim=1)
        self.register_buffer("A", (a / a.std()).float(), persistent=False)
        self.register_buffer("B", (b / b.std()).float(), persistent=False)


def _bases(seed: int, rank: int, *extent: int) -> Bases:
    return Bases(seed, rank, *sorted(extent))


class RandLoRA(Adapter):
    """`randlora_lambda` (r, n) and `randlora_gamma` (n, s), as in peft.

    `extent`, the sizes of the bases, is (the largest out, the largest in) among the set's layers, or the file's.
    """

    method = "randlora"
    kinds = frozenset({"linear"})
    Options = RandLoRAOptions
    needed = frozenset({"randlora_gamma", "randlora_lambda", "randlora_projection"})
    optional = frozenset({"alpha"})
    integers = frozenset({"randlora_projection"})

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        self.small, self.large = sorted(spec.weight_shape)
        terms = math.ceil(self.small / config.rank)
        self.randlora_lambda = nn.Parameter(torch.zeros(config.rank, terms))
        self.randlora_gamma = nn.Parameter(torch.zeros(terms, self.small))
        self.extent: tuple[int, int] | None = None

    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        """Λ is zero and Γ one over its longer side: nothing is drawn."""
        nn.init.zeros_(self.randlora_lambda)
        nn.init.constant_(self.randlora_gamma, 1 / max(self.randlora_gamma.shape))

    @classmethod
    def share(cls, adapters: Sequence[RandLoRA], seed: int) -> nn.Module:
        return share_projections(adapters, lambda one: one.spec.weight_shape, _bases)

    def delta_weight(self, weight: WeightView) -> Tensor:
        lambdas, gammas = self.randlora_lambda, self.randlora_gamma
        a = self.projections.A[:, :, : self.small].to(lambdas.device)  # (r, 1, s)
        b = self.projections.B[: self.large, : len(gammas)].to(lambdas.device)  # (l, n, r)
        scaled = lambdas[:, :, None] * a * gammas  # (r, n, s)
        # peft pairs B's columns with A's rows in the order of their memory, which are (n, r) and (r, n)
        product = self.config.scale * b.flatten(1) @ scaled.flatten(0, 1)  # (l, s)
        return product if self.small == self.spec.in_features else product.T

    def export(self) -> dict[str, Tensor]:
        """`alpha` carries the scale: readers compute alpha / rank."""
        assert self.extent is not None, "the bases are made together with the set"
        return {
            "randlora_lambda": self.randlora_lambda.detach(),
            "randlora_gamma": self.randlora_gamma.detach(),
            "randlora_projection": torch.tensor([self.options.seed, *sorted(self.extent)]),
            "alpha": torch.tensor(self.config.scale * self.config.rank),
        }

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> RandLoRA:
        rank, least = len(tensors["randlora_lambda"]), (min(spec.weight_shape), max(spec.weight_shape))
        seed, small, large = read_projection(tensors["randlora_projection"], rank, least)
        config = AdapterConfig(cls.method, rank, alpha_of(tensors), options={"seed": seed})
        adapter = filled(cls(spec, config), tensors, besides=frozenset({"alpha", "randlora_projection"}))
        adapter.extent = small, large
        return adapter


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """In bf16: peft draws in it where it finds a machine to have it, else in fp16."""
    return nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)
