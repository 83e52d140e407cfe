"""MoRA: dW is a square matrix M between a fixed compression and decompression (Jiang et al. 2024, arXiv:2405.12130).

M is (r, r) with r = round(sqrt((in + out) * rank)): as many parameters as a LoRA of that rank, and a dW
of rank r. The input, continued cyclically, is cut into blocks of r, and so is the output:

- type 1, sharing: M acts on the sum of the input's blocks, and every block of the output is the result;
- type 6, rotary: M acts on block j rotated by the angles j * 10000^(-2i / r), and gives block j of the output.

An output of more blocks than the input repeats them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio.adapters.base import Adapter, AdapterConfig
from studio.adapters.entries import number_of
from studio.adapters.layers import LayerSpec, WeightView, wide
from studio.errors import ConfigError


@dataclass(frozen=True)
class MoRAOptions:
    """`mora_type`: 1 (sharing) or 6 (rotary), the authors' numbers."""

    mora_type: int = 6

    def __post_init__(self) -> None:
        if self.mora_type not in (1, 6):
            raise ConfigError(f"mora_type is {self.mora_type}; it is 1 (sharing) or 6 (rotary)")


class MoRA(Adapter):
    """`mora_weight`, the square matrix. Without an alpha the scale is 1, as in the paper; else alpha / rank."""

    method = "mora"
    kinds = frozenset({"linear"})
    Options = MoRAOptions
    needed = frozenset({"mora_weight", "mora_type"})
    integers = frozenset({"mora_type"})

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        size = int(math.sqrt((spec.in_features + spec.out_features) * config.rank) + 0.5)
        if self.options.mora_type == 6:
            size -= size % 2  # rotations act on pairs
        self.mora_weight = nn.Parameter(torch.zeros(size, size))

    @torch.no_grad()
    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        self.mora_weight.zero_()

    def delta_weight(self, weight: WeightView) -> Tensor:
        return self._applied(torch.eye(self.spec.in_features).to(self.mora_weight)).T

    def forward(self, x: Tensor, y: Tensor, base: Tensor | None, weight: WeightView) -> Tensor:
        return y + self._applied(self.dropped(x).to(y.dtype), self.strength)

    def _applied(self, x: Tensor, strength: float = 1.0) -> Tensor:
        """strength * op(x, dW), (..., out), for `x` (..., in)."""
        matrix = (strength * self.config.scale * self.mora_weight).to(x.dtype)
        blocks = self._blocks(x)
        blocks = rotated(blocks) if self.options.mora_type == 6 else blocks.sum(-2, keepdim=True)
        out = F.linear(blocks, matrix).flatten(-2)  # (..., blocks * r)
        return cyclic(out, self.spec.out_features)

    def _blocks(self, x: Tensor) -> Tensor:
        """`x` (..., in), continued cyclically, as (..., blocks, r); without blocks that the output has no room for."""
        size = len(self.mora_weight)
        count = math.ceil(self.spec.in_features / size)
        if self.options.mora_type == 6:
            count = min(count, math.ceil(self.spec.out_features / size))
        return cyclic(x, count * size).unflatten(-1, (count, size))

    def export(self) -> dict[str, Tensor]:
        """The scale is in the matrix."""
        return {
            "mora_weight": self.config.scale * self.mora_weight.detach(),
            "mora_type": torch.tensor(self.options.mora_type),
        }

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> MoRA:
        matrix, kind = tensors["mora_weight"], int(number_of(tensors, "mora_type"))
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or (kind == 6 and len(matrix) % 2):
            raise ConfigError(
                f"the file's mora_weight is {tuple(matrix.shape)}; it must be square, and even for type 6"
            )
        rank = max(1, round(len(matrix) ** 2 / (spec.in_features + spec.out_features)))
        adapter = cls(spec, AdapterConfig(cls.method, rank, options={"mora_type": kind}))
        adapter.mora_weight = nn.Parameter(matrix.to(adapter.mora_weight, copy=True))  # ranks round to sizes
        return adapter


def cyclic(x: Tensor, size: int) -> Tensor:
    """`x` (..., n) cut to `size`, or continued with itself from the start up to there."""
    if size > x.shape[-1]:
        x = torch.cat([x] * (size // x.shape[-1]) + [x[..., : size % x.shape[-1]]], dim=-1)
    return x[..., :size]


def rotated(blocks: Tensor) -> Tensor:
    """Block j of `blocks` (..., blocks, r) with element i and i + r / 2 turned by the angle j * 10000^(-2i / r)."""
    count, size = blocks.shape[-2:]
    steps = wide(torch.arange(count, device=blocks.device, dtype=torch.float64))
    frequencies = 10000 ** (-torch.arange(0, size, 2, device=blocks.device, dtype=torch.float64) / size)
    angles = torch.outer(steps, frequencies)  # (blocks, r / 2)
    cos, sin = angles.cos().to(blocks.dtype), angles.sin().to(blocks.dtype)
    first, second = blocks.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
