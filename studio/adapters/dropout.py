"""Dropout on an adapter's input, drawn from data: never from a random stream, never stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_GENERATORS: dict[torch.device, torch.Generator] = {}


@dataclass
class SampleKeys:
    """The sample keys of the forward pass under way: one integer for each sample of the batch."""

    values: tuple[int, ...] = ()


class DropoutMasks:
    """Masks that are a function of (sample key, layer).

    A recomputed or resumed step draws the same masks, one process and many draw the same, and the
    backward pass draws them again instead of storing them. A sample's key is a hash of run seed,
    sample id and step, set before each forward pass and shared by all layers of an `AdapterSet`.
    """

    def __init__(self, keys: SampleKeys, layer_seed: int) -> None:
        self.keys = keys
        self.layer_seed = layer_seed

    def __call__(self, x: Tensor, rate: float) -> Tensor:
        """`x` with a share `rate` of its elements zeroed, not rescaled; its first dimension holds whole samples."""
        keys = self.keys.values
        if not keys or x.shape[0] % len(keys):
            raise RuntimeError(f"dropout on {tuple(x.shape)} has {len(keys)} sample keys: call set_keys first")
        return _masked(x, tuple((key ^ self.layer_seed) % (1 << 63) for key in keys), rate)


@torch.compiler.disable  # generators cannot be traced
def _masked(x: Tensor, seeds: tuple[int, ...], rate: float) -> Tensor:
    return _Masked.apply(x, seeds, rate)


class _Masked(torch.autograd.Function):
    """x * mask(seeds), which keeps the seeds alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seeds: tuple[int, ...], rate: float) -> Tensor:
        ctx.seeds, ctx.rate = seeds, rate
        return x * mask(x, seeds, rate)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * mask(gradient, ctx.seeds, ctx.rate), None, None


def mask(like: Tensor, seeds: tuple[int, ...], rate: float) -> Tensor:
    """Zeros (a share `rate`, to 1 / 65536) and ones, of the shape and dtype of `like`.

    16 random bits decide an element: four elements a draw of a 64-bit generator.
    """
    generator = _GENERATORS.setdefault(like.device, torch.Generator(like.device))
    each = like.numel() // len(seeds)
    bits = torch.empty(len(seeds), (each + 3) // 4, dtype=torch.int64, device=like.device)
    for row, seed in zip(bits, seeds, strict=True):
        row.random_(-(1 << 63), None, generator=generator.manual_seed(seed))
    words = bits.view(torch.int16)[:, :each]  # (samples, elements of one)
    kept = torch.ge(words, round(rate * 65536) - 32768, out=torch.empty_like(words))
    return kept.to(like.dtype).view(like.shape)
