"""OFT: W' = R W with a block-diagonal rotation R of the output channels (Qiu et al. 2023, arXiv:2306.07280).

Each block is a Cayley transform, R = (I + Q) (I - Q)^-1 with Q = B - B^T, here as kohya and LyCORIS
(`diag-oft`) have it: `oft_blocks` holds B, and R acts transposed. peft's form is in `oftv2`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from studio.adapters.base import METHODS, Adapter, AdapterConfig, read_options
from studio.adapters.channel_map import ChannelMap
from studio.adapters.entries import filled, number_of
from studio.adapters.layers import LayerSpec, WeightView, wide
from studio.errors import ConfigError


@dataclass(frozen=True)
class RotationOptions:
    """`constraint`: the largest Frobenius norm of all Q, over the number of outputs; 0 means none.
    `rescaled`: a trained factor on each output besides the rotation."""

    constraint: float = 0.0
    rescaled: bool = False

    def __post_init__(self) -> None:
        if self.constraint < 0:
            raise ConfigError(f"constraint is {self.constraint}; it must be 0 (none) or more")


@dataclass(frozen=True)
class OFTOptions(RotationOptions):
    """`block_size`: the channels of a block, instead of the number of blocks that `rank` gives."""

    block_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_size(self.block_size)


class OFT(ChannelMap):
    """`oft_blocks` (rank, out / rank, out / rank), and `rescale` (out, 1, ...) where it is asked for.

    `rank` is the number of blocks, as in the paper and kohya's scripts (LyCORIS takes the smaller of
    it and out / rank as the block's size). The config's alpha plays no part: a file's alpha is the
    constraint, where LyCORIS and ComfyUI read 0 as none, and kohya's scripts as no rotation at all.
    """

    method = "oft"
    Options: ClassVar[type] = OFTOptions
    needed = frozenset({"oft_blocks"})
    optional = frozenset({"rescale", "alpha"})

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        self.oft_blocks = nn.Parameter(torch.zeros(self.blocks_shape(spec, config)))
        ones = spec.rows(torch.ones(spec.out_features))
        self.rescale = nn.Parameter(ones) if self.options.rescaled else None

    @classmethod
    def blocks_shape(cls, spec: LayerSpec, config: AdapterConfig) -> tuple[int, ...]:
        """The shape of `oft_blocks`; raises ConfigError where the outputs do not divide into such blocks."""
        number, size = divide(spec.out_features, config.rank, read_options(cls, config.options).block_size)
        return number, size, size

    @classmethod
    def check(cls, spec: LayerSpec, config: AdapterConfig) -> None:
        super().check(spec, config)
        cls.blocks_shape(spec, config)

    @property
    def within_groups(self) -> bool:
        return self.spec.out_features // self.spec.groups % self.oft_blocks.shape[-1] == 0

    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        nn.init.zeros_(self.oft_blocks)
        if self.rescale is not None:
            nn.init.ones_(self.rescale)

    def turns(self) -> Tensor:
        """R - I = 2 Q (I - Q)^-1 of every block, of the shape of `oft_blocks`."""
        skew = wide(self.oft_blocks - self.oft_blocks.mT)
        if self.options.constraint:
            limit = self.options.constraint * self.spec.out_features
            skew = skew * (limit / (skew.norm() + 1e-8)).clamp(max=1)
        return cayley(skew)

    def rotation(self, dtype: torch.dtype, strength: float) -> Callable[[Tensor], Tensor]:
        """v -> strength * (R v - v), without `rescale`."""
        return partial(turned, turns=(strength * self.turns()).to(dtype))

    def change(self, dtype: torch.dtype, strength: float = 1, transposed: bool = False) -> Callable[[Tensor], Tensor]:
        rotate = self.rotation(dtype, strength)
        if self.rescale is None:
            return rotate
        factors = self.rescale.flatten().to(dtype)
        return lambda values: factors * rotate(values) + strength * (factors - 1) * values

    def export(self) -> dict[str, Tensor]:
        entry = {"oft_blocks": self.oft_blocks.detach(), "alpha": torch.tensor(float(self.options.constraint))}
        return entry if self.rescale is None else {**entry, "rescale": self.rescale.detach()}

    @classmethod
    def named(cls, tensors: Mapping[str, Tensor]) -> str:
        """Blocks of four dimensions are BOFT's: the number of butterfly stages comes first."""
        return "boft" if tensors["oft_blocks"].ndim == 4 else "oft"

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> Adapter:
        blocks = tensors["oft_blocks"]
        number, size = blocks.shape[-3:-1] if blocks.ndim in (3, 4) else (0, 0)
        if number * size != spec.out_features:
            raise ConfigError(
                f"the file's oft_blocks are {tuple(blocks.shape)}; this layer has {spec.out_features} outputs: "
                "the file is for another base"
            )
        method = cls.named(tensors)
        rank = size if method == "boft" else number
        options: dict[str, Any] = {"constraint": number_of(tensors, "alpha"), "rescaled": "rescale" in tensors}
        return filled(METHODS[method](spec, AdapterConfig(method, rank, options=options)), tensors)


def cayley(skew: Tensor) -> Tensor:
    """(I + Q) (I - Q)^-1 - I for skew-symmetric Q (..., b, b), without the cancellation."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity - skew, 2 * skew, left=False)


def turned(values: Tensor, turns: Tensor) -> Tensor:
    """Row vectors `values` (..., blocks * b), block by block, times `turns` (blocks, b, b)."""
    parts = values.unflatten(-1, turns.shape[:2])  # (..., blocks, b)
    return torch.einsum("...nb,nbc->...nc", parts, turns).flatten(-2)


def divide(channels: int, number: int, size: int | None) -> tuple[int, int]:
    """(blocks, block size) for `number` blocks, or for blocks of `size`; raises ConfigError with sizes that divide."""
    wanted = channels // number if size is None else size
    if channels % (size or number) == 0 and wanted > 1:
        return channels // wanted, wanted
    sizes = sorted((one for one in range(2, channels + 1) if channels % one == 0), key=lambda one: abs(one - wanted))
    choices = ", ".join(f"{one} (rank {channels // one})" for one in sizes[:3])
    asked = f"rank {number}" if size is None else f"block_size {size}"
    raise ConfigError(f"{channels} channels do not divide into blocks by {asked}; block sizes that do: {choices}")


def check_block_size(size: int | None) -> None:
    """Raises ConfigError for blocks that cannot rotate."""
    if size is not None and size < 2:
        raise ConfigError(f"block_size is {size}; it must be 2 or more: a single channel cannot rotate")
