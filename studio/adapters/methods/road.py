"""RoAd: y = R (W x + b), where R turns and scales pairs of outputs (Liao and Monz 2024, arXiv:2409.00119).

A pair (y1, y2) becomes (a1 cos(t1) y1 - a1' sin(t1') y2, a2' sin(t2') y1 + a2 cos(t2) y2): one angle t
and scale a for the pair (road_1), one for each of its elements (road_2), or one for each term (road_4).
Angles and scales are peft's `road_theta` and `road_alpha`, in its order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from studio.adapters.base import AdapterConfig, read_options
from studio.adapters.channel_map import ChannelMap
from studio.adapters.entries import filled, number_of
from studio.adapters.layers import LayerSpec, WeightView, wide
from studio.errors import ConfigError

_HALVES = {"road_1": 1, "road_2": 2, "road_4": 4}  # variant -> parameters for a pair


@dataclass(frozen=True)
class RoAdOptions:
    """`variant`: "road_1", "road_2" or "road_4". `group_size`: outputs in a group, where the first half
    is paired with the second; 2 pairs neighbours as the paper does, 64 is peft's default."""

    variant: str = "road_1"
    group_size: int = 2

    def __post_init__(self) -> None:
        if self.variant not in _HALVES:
            raise ConfigError(f"variant is '{self.variant}'; it is one of {', '.join(_HALVES)}")
        if self.group_size < 2 or self.group_size % 2:
            raise ConfigError(f"group_size is {self.group_size}; it must be even, 2 or more")


class RoAd(ChannelMap):
    """`road_theta` and `road_alpha`, of half, once or twice the outputs; rank and alpha of the plan play no part."""

    method = "road"
    grouped = False
    Options = RoAdOptions
    needed = frozenset({"road_theta", "road_alpha", "group_size"})
    integers = frozenset({"group_size"})
    acts_on_bias = True

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        size = spec.out_features // 2 * _HALVES[self.options.variant]
        self.road_theta = nn.Parameter(torch.zeros(size))
        self.road_alpha = nn.Parameter(torch.ones(size))

    @classmethod
    def check(cls, spec: LayerSpec, config: AdapterConfig) -> None:
        super().check(spec, config)
        size = read_options(cls, config.options).group_size
        if spec.out_features % size:
            raise ConfigError(
                f"{spec.out_features} outputs do not divide into groups of {size}: choose an even group_size that does"
            )

    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        nn.init.zeros_(self.road_theta)
        nn.init.ones_(self.road_alpha)

    def _columns(self) -> tuple[Tensor, Tensor]:
        """(out,) each: what multiplies an output itself, and its partner."""
        half, per_pair = self.options.group_size // 2, _HALVES[self.options.variant]
        shape = (-1, max(per_pair // 2, 1), min(per_pair, 2), half)  # (groups, terms, elements of a pair, pairs)
        theta, alpha = wide(self.road_theta).reshape(shape), wide(self.road_alpha).reshape(shape)
        own, other = alpha[:, 0] * theta[:, 0].cos(), alpha[:, -1] * theta[:, -1].sin()
        return own.expand(-1, 2, -1).flatten(), other.expand(-1, 2, -1).flatten()

    def change(self, dtype: torch.dtype, strength: float = 1, transposed: bool = False) -> Callable[[Tensor], Tensor]:
        own, other = self._columns()
        own, other = (strength * (own - 1)).to(dtype), (strength * other).to(dtype)

        def rotate(values: Tensor) -> Tensor:
            first, second = values.unflatten(-1, (-1, 2, self.options.group_size // 2)).unbind(-2)
            partners = torch.stack([-second, first], -2).flatten(-3)  # from (..., groups, 2, pairs)
            return torch.addcmul(own * values, other, partners)

        return rotate

    def export(self) -> dict[str, Tensor]:
        return {
            "road_theta": self.road_theta.detach(),
            "road_alpha": self.road_alpha.detach(),
            "group_size": torch.tensor(self.options.group_size),
        }

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> RoAd:
        theta, size = tensors["road_theta"], int(number_of(tensors, "group_size"))
        sizes = {spec.out_features // 2 * halves: variant for variant, halves in _HALVES.items()}
        if theta.numel() not in sizes:
            raise ConfigError(
                f"the file has {theta.numel()} angles; a layer of {spec.out_features} outputs has {list(sizes)}"
            )
        options = {"variant": sizes[theta.numel()], "group_size": size}
        return filled(cls(spec, AdapterConfig(cls.method, options=options)), tensors, besides=frozenset({"group_size"}))
