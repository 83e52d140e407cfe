"""Frozen random matrices that all layers of a set share: a function of a seed and their shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from studio.errors import ConfigError

_MOST_VALUES = 1 << 30  # 4 GiB; a vocabulary's head in RandLoRA has half of it


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


def read_projection(numbers: Tensor, rank: int, least: tuple[int, int] = (1, 1)) -> tuple[int, int, int]:
    """(seed, the two sizes) of a file's matrices of a rank, of which a layer reads up to the sizes `least`.

    Raises ConfigError for sizes that are too small for the layer, or for any machine.
    """
    if numbers.shape != (3,):
        raise ConfigError(f"the file's projection is {tuple(numbers.shape)}; it must be a seed and two sizes")
    seed, first, second = numbers.tolist()
    fits = first >= least[0] and second >= least[1]
    if not fits or max(first * second, rank * (first + second)) > _MOST_VALUES:
        raise ConfigError(
            f"the file has projections of {first} and {second} channels; this layer needs {least[0]} and {least[1]}: "
            "the file is for another base"
        )
    return seed, first, second
