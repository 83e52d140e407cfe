"""OFTv2: y = W (R x) with a block-diagonal rotation of the input channels (Qiu et al. 2025, arXiv:2506.19847).

OFT (arXiv:2306.07280) as peft has it. `oft_R` packs the upper triangle of each block's skew-symmetric
Q; R is the Cayley transform (I + Q) (I - Q)^-1 by the first terms of its Neumann series,
I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4, and x a row: x R. An embedding has no channels to read: its output rotates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from studio.adapters.base import AdapterConfig, read_options
from studio.adapters.channel_map import ChannelMap
from studio.adapters.entries import filled, number_of
from studio.adapters.layers import LayerSpec, WeightView, wide
from studio.adapters.methods.oft import cayley, check_block_size, divide, turned
from studio.errors import ConfigError


@dataclass(frozen=True)
class OFTv2Options:
    """`block_size`: the channels of a block, instead of the number of blocks that `rank` gives.
    `block_share`: one rotation for all blocks. `neumann_terms`: 2 to 64 (peft's
    num_cayley_neumann_terms), or 0 for the exact inverse (use_cayley_neumann=False), where peft turns
    the other way round. `coft`: after each step, Q returns to a ball of radius eps / sqrt(blocks)."""

    block_size: int | None = None
    block_share: bool = False
    neumann_terms: int = 5
    coft: bool = False
    eps: float = 6e-5

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        if self.neumann_terms not in (0, *range(2, 65)):
            raise ConfigError(f"neumann_terms is {self.neumann_terms}; it is 2 to 64, or 0 for the exact inverse")
        if self.eps <= 0:
            raise ConfigError(f"eps is {self.eps}; it must be above 0")


class OFTv2(ChannelMap):
    """`oft_R` (blocks, b (b - 1) / 2), or one row with `block_share`. `rank` is the number of blocks, as peft's r;
    alpha plays no part. Convolutions rotate whole channels, as peft does where the kernel is 1x1."""

    method = "oftv2"
    Options = OFTv2Options
    needed = frozenset({"oft_R.weight"})
    optional = frozenset({"neumann_terms"})
    integers = frozenset({"neumann_terms"})

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        self.blocks, self.block_size = self._blocks(spec, config)
        rows = 1 if self.options.block_share else self.blocks
        self.oft_R = nn.Parameter(torch.zeros(rows, math.comb(self.block_size, 2)))

    @classmethod
    def _blocks(cls, spec: LayerSpec, config: AdapterConfig) -> tuple[int, int]:
        return divide(_channels(spec), config.rank, read_options(cls, config.options).block_size)

    @classmethod
    def check(cls, spec: LayerSpec, config: AdapterConfig) -> None:
        super().check(spec, config)
        size = cls._blocks(spec, config)[1]
        if spec.groups > 1 and spec.in_features % size:
            raise ConfigError(
                f"blocks of {size} channels cross the groups of a convolution, which have {spec.in_features}: "
                f"choose a block_size that divides {spec.in_features}"
            )

    @property
    def on_input(self) -> bool:
        return self.spec.kind != "embedding"

    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        nn.init.zeros_(self.oft_R)

    def turns(self) -> Tensor:
        """R - I of every block, (blocks, b, b)."""
        packed = wide(self.oft_R)
        rows, columns = torch.triu_indices(self.block_size, self.block_size, 1, device=packed.device)
        flat = packed.new_zeros(len(packed), self.block_size**2)
        flat = flat.index_copy(1, rows * self.block_size + columns, packed)
        upper = flat.unflatten(1, (self.block_size, self.block_size))  # (blocks, b, b)
        skew = upper - upper.mT
        turns = neumann(skew, self.options.neumann_terms) if self.options.neumann_terms else cayley(-skew)
        return turns.expand(self.blocks, -1, -1)

    def change(self, dtype: torch.dtype, strength: float = 1, transposed: bool = False) -> Callable[[Tensor], Tensor]:
        turns = (strength * self.turns()).to(dtype)
        return partial(turned, turns=turns.mT if transposed else turns)

    @classmethod
    @torch.no_grad()
    def after_step(cls, adapters: Sequence[OFTv2], step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Projects each block of a constrained OFT (section 3.4 of the first paper; peft does so before each use)."""
        for adapter in adapters:
            if adapter.options.coft:
                radius = adapter.options.eps / math.sqrt(len(adapter.oft_R))
                norm = math.sqrt(2) * adapter.oft_R.norm(dim=1, keepdim=True)  # of Q: both triangles
                adapter.oft_R.mul_((radius / norm).clamp(max=1))

    def export(self) -> dict[str, Tensor]:
        return {"oft_R.weight": self.oft_R.detach(), "neumann_terms": torch.tensor(self.options.neumann_terms)}

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> OFTv2:
        """Without `neumann_terms`, 5, peft's default; the shape tells the rest."""
        packed = tensors["oft_R.weight"]
        size = (1 + math.isqrt(1 + 8 * packed.shape[1])) // 2  # b (b - 1) / 2 = columns
        channels = _channels(spec)
        if math.comb(size, 2) != packed.shape[1] or len(packed) not in (1, channels / size):
            raise ConfigError(
                f"the file's oft_R is {tuple(packed.shape)}; this layer has {channels} channels to rotate"
            )
        options: dict[str, Any] = {
            "block_size": size,
            "block_share": len(packed) < channels // size,
            "neumann_terms": int(number_of(tensors, "neumann_terms", 5)),
        }
        adapter = cls(spec, AdapterConfig(cls.method, channels // size, options=options))
        return filled(adapter, tensors, ".weight", besides=cls.optional)


def _channels(spec: LayerSpec) -> int:
    """How many channels rotate: those read, over all groups, and those written by an embedding."""
    return spec.out_features if spec.kind == "embedding" else spec.in_features * spec.groups


def neumann(skew: Tensor, terms: int) -> Tensor:
    """The Cayley transform less I, as 2 Q + ... + 2 Q^(terms - 2) + Q^(terms - 1); 2 Q for two terms.

    Three terms are four, as in peft.
    """
    total, power = 2 * skew, skew
    if terms == 2:
        return total
    for _ in range(max(terms, 4) - 3):
        power = power @ skew
        total = torch.add(total, power, alpha=2)
    return total + power @ skew
