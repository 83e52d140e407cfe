"""Dropout on an adapter's input, drawn from data: never from a random stream."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from studio.seeds import sample_generator


@dataclass
class SampleKeys:
    """The sample keys of the forward pass under way: one integer for each sample of the batch."""

    values: tuple[int, ...] = ()


class DropoutMasks:
    """Masks that are a function of (sample key, layer).

    A recomputed or resumed step draws the same masks, and one process and many draw the same. A
    sample's key is a hash of run seed, sample id and step, set before each forward pass and shared by
    all layers of an `AdapterSet`.
    """

    def __init__(self, keys: SampleKeys, layer_seed: int) -> None:
        self.keys = keys
        self.layer_seed = layer_seed

    def __call__(self, x: Tensor, rate: float) -> Tensor:
        """`x` with a share `rate` of its elements zeroed, not rescaled; its first dimension holds whole samples."""
        return _Masked.apply(x, self._seeds(x), rate)

    def linear(self, x: Tensor, weight: Tensor, rate: float) -> Tensor:
        """F.linear(dropped x, weight) with inverted dropout, (..., in) -> (..., out), which keeps `x` alone."""
        return _MaskedLinear.apply(x, weight, self._seeds(x), rate)

    def _seeds(self, x: Tensor) -> tuple[int, ...]:
        keys = self.keys.values
        if not keys or x.shape[0] % len(keys):
            raise RuntimeError(f"dropout on {tuple(x.shape)} has {len(keys)} sample keys: call set_keys first")
        return tuple((key ^ self.layer_seed) % (1 << 63) for key in keys)


# What torch.compiler.disable sets, without its import of the compiler: traced, the keys would be constants.
DropoutMasks.__call__._torchdynamo_disable = True  # type: ignore[attr-defined]
DropoutMasks.linear._torchdynamo_disable = True  # type: ignore[attr-defined]


class _Masked(torch.autograd.Function):
    """x * mask, which keeps the seeds alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seeds: tuple[int, ...], rate: float) -> Tensor:
        ctx.seeds, ctx.rate = seeds, rate
        return mask(x, seeds, rate).mul_(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return mask(gradient, ctx.seeds, ctx.rate).mul_(gradient), None, None


class _MaskedLinear(torch.autograd.Function):
    """(x * mask) @ weight^T / (1 - rate), which keeps x. The masked x is made again for the backward pass:
    x is often kept by its neighbours too, the masked one never."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seeds: tuple[int, ...], rate: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.seeds, ctx.rate = seeds, rate
        return F.linear(mask(x, seeds, rate).mul_(x), weight).div_(1 - rate)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        kept = mask(x, ctx.seeds, ctx.rate)
        flat = (gradient / (1 - ctx.rate)).flatten(0, -2)  # (tokens, rank)
        of_x = (flat @ weight).view(x.shape).mul_(kept)
        of_weight = flat.T @ kept.mul_(x).flatten(0, -2)
        return of_x, of_weight, None, None


def mask(x: Tensor, seeds: tuple[int, ...], rate: float) -> Tensor:
    """Zeros (a share `rate`) and ones in the shape and dtype of `x`, a new tensor.

    Each sample takes a window of one long random sequence, at a place that its seed decides: drawing
    anew would be most of what dropout costs on a CPU, and windows are the same on every device.
    """
    each = x.numel() // len(seeds)
    pool = _pool(rate, max(1 << 22, 1 << (2 * each - 1).bit_length()), x.device)
    places = [seed % (len(pool) - each) for seed in seeds]
    windows = [pool[place : place + each] for place in places]
    return (windows[0] if len(windows) == 1 else torch.cat(windows)).to(x.dtype).view(x.shape)


@cache
def _pool(rate: float, size: int, device: torch.device) -> Tensor:
    """`size` random zeros (a share `rate`) and ones, uint8: a function of `rate` and `size`."""
    pool = torch.empty(size, dtype=torch.uint8)
    return pool.bernoulli_(1 - rate, generator=sample_generator("dropout", size)).to(device)
