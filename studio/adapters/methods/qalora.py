"""QA-LoRA: dW = scale * up @ down @ P, where P pools groups of consecutive inputs (Xu et al. 2023, arXiv:2309.14717).

P takes the mean (or the sum) of each group of `group_size` inputs, so that dW is constant inside a
(row, group). In a base of W = scales * (q - zeros) with such groups, only the zero points change by it:
zeros - dW / scales merges exactly, without rounding q anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio.adapters.base import AdapterConfig
from studio.adapters.layers import LayerSpec, WeightView
from studio.adapters.lowrank import LowRank, up_shape
from studio.errors import ConfigError

_GROUP = 32


@dataclass(frozen=True)
class QALoRAOptions:
    """`group_size`: None means that of the quantised base, and elsewhere the largest divisor of the inputs
    up to 32. `pool`: "mean" or "sum" over a group, which differ by the factor `group_size`."""

    group_size: int | None = None
    pool: str = "mean"

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"group_size is {self.group_size}; it must be 1 or more")
        if self.pool not in ("mean", "sum"):
            raise ConfigError(f"pool is '{self.pool}'; it is 'mean' or 'sum'")


class QALoRA(LowRank):
    """`lora_down` (rank, in / group_size) on the pooled input. Written to files exactly as a LoRA.

    Such a LoRA still merges exactly: `LowRank.terms` looks at the values, not at the method.
    """

    method = "qalora"
    kinds = frozenset({"linear"})
    Options = QALoRAOptions

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        group = self.options.group_size or next(one for one in range(_GROUP, 0, -1) if spec.in_features % one == 0)
        self.lora_down = nn.Parameter(torch.zeros(config.rank, spec.in_features // group))
        self.lora_up = nn.Parameter(torch.zeros(up_shape(spec, config.rank)))

    @classmethod
    def check(cls, spec: LayerSpec, config: AdapterConfig) -> None:
        super().check(spec, config)
        group = config.options.get("group_size")
        if group is not None and spec.in_features % group:
            raise ConfigError(f"group_size {group} does not divide the layer's {spec.in_features} inputs")

    @property
    def group_size(self) -> int:
        """How many inputs are pooled."""
        return self.spec.in_features // self.lora_down.shape[1]

    @torch.no_grad()
    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        """As LoRA's, on the base's own groups. Raises ConfigError where those are no parts of the option's."""
        own = getattr(weight.target.layer, "group_size", None) or 1
        if own > 1 and self.options.group_size is None:
            self.lora_down.data = self.lora_down.new_zeros(self.config.rank, self.spec.in_features // own)
        elif own > 1 and self.group_size % own:
            raise ConfigError(
                f"{weight.target.name}: group_size {self.group_size} is no multiple of the quantised layer's {own}, "
                "so it could not be merged exactly: leave the option out, or choose a multiple"
            )
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5), generator=generator)
        self.lora_up.zero_()

    def down_weight(self) -> Tensor:
        down = self.lora_down / self.group_size if self.options.pool == "mean" else self.lora_down
        return down.repeat_interleave(self.group_size, dim=1)  # (rank, in)

    def up_weight(self) -> Tensor:
        return self.lora_up

    def read(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The pooled input is all that is read and kept: nothing is left to share between layers."""
        groups = self.dropped(x).to(dtype).unflatten(-1, (-1, self.group_size))  # (..., in / group_size, group_size)
        pooled = groups.mean(-1) if self.options.pool == "mean" else groups.sum(-1)
        return F.linear(pooled, self.lora_down.to(dtype))
