"""VeRA: dW = diag(b) B diag(d) A (Kopiczko et al. 2023, arXiv:2310.11454).

A and B are random, frozen and shared by all layers, of which each takes the first columns of A and
the first rows of B. Both are functions of a seed and their shapes, drawn as peft draws them, so that a
file holds b, d and these numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio.adapters.base import AdapterConfig
from studio.adapters.entries import filled
from studio.adapters.layers import LayerSpec, WeightView
from studio.adapters.lowrank import LowRank
from studio.adapters.projections import read_projection, share_projections
from studio.errors import ConfigError


@dataclass(frozen=True)
class VeRAOptions:
    """`d_initial`: the first value of d. `seed`: of A and B (peft's projection_prng_key)."""

    d_initial: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.d_initial == 0:
            raise ConfigError("d_initial is 0: b and d would both start at 0 and never train")


class Projections(nn.Module):
    """A (rank, inputs) and B (outputs, rank), not trained and not stored."""

    def __init__(self, seed: int, rank: int, inputs: int, outputs: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("vera_A", _kaiming(rank, inputs, generator), persistent=False)
        self.register_buffer("vera_B", _kaiming(outputs, rank, generator), persistent=False)


class VeRA(LowRank):
    """`vera_lambda_b` (out,) and `vera_lambda_d` (rank,). There is no scale: alpha plays no part.

    `extent`, the inputs of A and the outputs of B, is the largest among the set's layers, or the file's.
    """

    method = "vera"
    kinds = frozenset({"linear"})
    Options = VeRAOptions
    needed = frozenset({"vera_lambda_b", "vera_lambda_d", "vera_projection"})
    integers = frozenset({"vera_projection"})

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        self.vera_lambda_b = nn.Parameter(torch.zeros(spec.out_features))
        self.vera_lambda_d = nn.Parameter(torch.full((config.rank,), float(self.options.d_initial)))
        self.extent: tuple[int, int] | None = None

    @property
    def scale(self) -> float:
        return 1.0

    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        nn.init.zeros_(self.vera_lambda_b)
        nn.init.constant_(self.vera_lambda_d, self.options.d_initial)

    def down_weight(self) -> Tensor:
        d = self.vera_lambda_d
        return d[:, None] * self.projections.vera_A[:, : self.spec.in_features].to(d.device)

    def up_weight(self) -> Tensor:
        b = self.vera_lambda_b
        return b[:, None] * self.projections.vera_B[: self.spec.out_features].to(b.device)

    def forward(self, x: Tensor, y: Tensor, base: Tensor | None, weight: WeightView) -> Tensor:
        """Through A and B as they are: b and d train on two vectors, without the gradients of two matrices."""
        reads = self.projections.vera_A[:, : self.spec.in_features].to(y)
        writes = self.projections.vera_B[: self.spec.out_features].to(y)
        h = F.linear(self.dropped(x).to(y.dtype), reads) * self.vera_lambda_d.to(y.dtype)
        return torch.addcmul(y, F.linear(h, writes), (self.strength * self.vera_lambda_b).to(y.dtype))

    @classmethod
    def share(cls, adapters: Sequence[VeRA], seed: int) -> nn.Module:
        return share_projections(adapters, lambda one: (one.spec.in_features, one.spec.out_features), Projections)

    def export(self) -> dict[str, Tensor]:
        shared = self.projections
        return {
            "vera_lambda_b": self.vera_lambda_b.detach(),
            "vera_lambda_d": self.vera_lambda_d.detach(),
            "vera_projection": torch.tensor([self.options.seed, shared.vera_A.shape[1], shared.vera_B.shape[0]]),
        }

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> VeRA:
        rank, least = tensors["vera_lambda_d"].numel(), (spec.in_features, spec.out_features)
        seed, inputs, outputs = read_projection(tensors["vera_projection"], rank, least)
        adapter = cls(spec, AdapterConfig(cls.method, rank, options={"seed": seed}))
        adapter.extent = inputs, outputs
        return filled(adapter, tensors, besides=frozenset({"vera_projection"}))


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(rows, columns), Kaiming-uniform for ReLU: within sqrt(3) * sqrt(2 / columns). peft's order of roundings."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
