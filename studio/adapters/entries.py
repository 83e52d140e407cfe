"""What methods share in reading a file entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from studio.adapters.base import Adapter
from studio.errors import ConfigError

AnyAdapter = TypeVar("AnyAdapter", bound=Adapter)


def alpha_of(tensors: Mapping[str, Tensor]) -> float | None:
    """The entry's alpha; None, which means the rank, where it has none, as in sd-scripts."""
    return number_of(tensors, "alpha") if "alpha" in tensors else None


def number_of(tensors: Mapping[str, Tensor], name: str, default: float = 0.0) -> float:
    """The entry's number of that name, or `default`. Raises ConfigError for several numbers."""
    if name not in tensors:
        return default
    if tensors[name].numel() != 1:
        raise ConfigError(f"the file's {name} is {tuple(tensors[name].shape)}; it must be one number")
    return float(tensors[name])


@torch.no_grad()
def filled(
    adapter: AnyAdapter, tensors: Mapping[str, Tensor], ending: str = "", besides: frozenset[str] = frozenset({"alpha"})
) -> AnyAdapter:
    """`adapter` with each parameter from the entry's tensor of its name plus `ending`.

    Dimensions of size 1 may be missing, or more: 1x1 kernels are stored as matrices too. Raises
    ConfigError for another shape, and for tensors that are neither parameters nor `besides`.
    """
    parameters = {name + ending: parameter for name, parameter in adapter.named_parameters()}
    for name in parameters.keys() | tensors.keys() - besides:
        found, needed = (tuple(of[name].shape) if name in of else None for of in (tensors, parameters))
        if found is None or needed is None or [n for n in found if n > 1] != [n for n in needed if n > 1]:
            raise ConfigError(
                f"the file's {name} is {found or 'missing'}; this layer needs {needed or 'none'}: "
                "the file is for another base"
            )
        parameters[name].copy_(tensors[name].reshape(needed))
    return adapter
