"""The layers of a base on disk as adapters see them, each read when it is asked for: no model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from studio.adapters import Target, WeightView, describe
from studio.algebra.bases import Base
from studio.errors import ConfigError


def target_of(name: str, weight: Tensor, bias: Tensor | None) -> Target:
    """A layer that holds these tensors, of the kind that the name and the shape tell."""
    shape = weight.shape
    with torch.device("meta"):
        if weight.ndim == 1:
            layer: nn.Module = nn.LayerNorm(shape)
        elif name.endswith("_embedding"):
            layer = nn.Embedding(*shape)
        elif weight.ndim == 2:
            layer = nn.Linear(shape[1], shape[0])
        else:
            layer = nn.Conv2d(shape[1], shape[0], shape[2:])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    spec = describe(layer)
    assert spec is not None
    return Target(name, layer, spec)


def base_views(base: Base, layers: Iterable[str]) -> Mapping[str, WeightView]:
    """Layer -> its weight in the base, for these full layer names.

    Raises ConfigError for layers that the base does not have, naming the first five.
    """
    names = list(layers)
    missing = [name for name in names if not base.places(f"{name}.weight")]
    if missing:
        raise ConfigError(
            f"{len(missing)} of the {len(names)} layers are not in {base.path}: {', '.join(missing[:5])}. "
            "It is another base than the file's"
        )
    return _Views(base, names)


class _Views(Mapping[str, WeightView]):
    def __init__(self, base: Base, names: list[str]) -> None:
        self._base, self._names = base, dict.fromkeys(names)

    def __getitem__(self, name: str) -> WeightView:
        if name not in self._names:
            raise KeyError(name)
        weight, bias = (self._base.places(f"{name}.{part}") for part in ("weight", "bias"))
        return WeightView(target_of(name, weight[0].read(), bias[0].read() if bias else None))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
