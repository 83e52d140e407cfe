"""Frozen random matrices that all layers of a set share: a function of a seed and their shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


def share_projections(
    adapters: Sequence[Any], sizes: Callable[[Any], tuple[int, int]], make: Callable[..., nn.Module]
) -> nn.Module:
    """Gives each adapter its `projections`: make(seed, rank, *extent), once for each seed, rank and extent.

    An adapter's `extent` is its file's, or without one the largest of each of the two `sizes` among `adapters`.
    """
    first, second = zip(*map(sizes, adapters), strict=True)
    made: dict[tuple[int, ...], nn.Module] = {}
    for adapter in adapters:
        adapter.extent = adapter.extent or (max(first), max(second))
        key = adapter.options.seed, adapter.config.rank, *adapter.extent
        if key not in made:
            made[key] = make(*key).to(next(adapter.parameters()).device)
        adapter.__dict__["projections"] = made[key]  # the set owns it: no submodule of each adapter
    return nn.ModuleList(made.values())
