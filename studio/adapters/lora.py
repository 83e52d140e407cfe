"""LoRA: dW = scale * up @ down (Hu et al. 2021, arXiv:2106.09685).

On convolutions this is LoCon as LyCORIS and kohya write it: `lora_down` keeps the kernel, `lora_up`
is 1x1. rsLoRA (arXiv:2312.03732) changes the scale from alpha / rank to alpha / sqrt(rank), LoRA+
(arXiv:2402.12354) the learning rate of `lora_up`, LoRA-FA (arXiv:2308.03303) freezes `lora_down`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from studio.adapters.base import AdapterConfig
from studio.adapters.initial import INITS, initial_factors
from studio.adapters.layers import LayerSpec, WeightView
from studio.adapters.lowrank import LowRank, down_shape, up_shape
from studio.errors import ConfigError, nearest


@dataclass(frozen=True)
class LoRAOptions:
    """`init`: one of INITS. `lr_ratio`: the rate of `lora_up` over that of `lora_down`, LoRA+'s lambda
    (about 16 there). `freeze_down`: LoRA-FA."""

    init: str = "kaiming"
    lr_ratio: float = 1.0
    freeze_down: bool = False

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise ConfigError(f"unknown init '{self.init}'.{nearest(self.init, INITS)} Inits: {', '.join(INITS)}")
        if self.lr_ratio <= 0:
            raise ConfigError(f"lr_ratio is {self.lr_ratio}; it must be above 0")


class LoRA(LowRank):
    """`lora_down`, `lora_up` and the scale between them; dropout acts on the input.

    An initialisation that starts from the base's own weight (PiSSA, OLoRA) keeps its starting point as
    an anchor that is subtracted, so that dW is zero at first and the base is never changed.
    """

    method = "lora"
    Options = LoRAOptions
    needed = frozenset({"lora_down.weight", "lora_up.weight"})
    optional = frozenset({"alpha"})

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        self.lora_down = nn.Parameter(torch.zeros(down_shape(spec, config.rank)))
        self.lora_up = nn.Parameter(torch.zeros(up_shape(spec, config.rank)))
        anchored = INITS[self.options.init].anchored
        if anchored and spec.groups > 1:
            raise ConfigError(f"init '{self.options.init}' is not defined for a grouped convolution: use kaiming there")
        self.register_buffer("anchor_down", torch.zeros_like(self.lora_down) if anchored else None)
        self.register_buffer("anchor_up", torch.zeros_like(self.lora_up) if anchored else None)
        self.lora_down.requires_grad_(not self.options.freeze_down)

    @torch.no_grad()
    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        """By `options.init`; Kaiming-uniform `lora_down` and zero `lora_up` as a default, as in peft."""
        up, down = initial_factors(self.options.init, self.spec, self.config, generator, weight)
        self.lora_up.copy_(up)
        self.lora_down.copy_(down)
        if self.anchor_down is not None:
            self.anchor_up.copy_(up)
            self.anchor_down.copy_(down)

    def down_weight(self) -> Tensor:
        return self.lora_down if self.anchor_down is None else torch.cat([self.lora_down, self.anchor_down])

    def up_weight(self) -> Tensor:
        return self.lora_up if self.anchor_up is None else torch.cat([self.lora_up, -self.anchor_up], dim=1)

    def rates(self) -> Iterator[tuple[nn.Parameter, float]]:
        for parameter, factor in ((self.lora_down, 1.0), (self.lora_up, self.options.lr_ratio)):
            if parameter.requires_grad:
                yield parameter, factor

    def export(self) -> dict[str, Tensor]:
        """`alpha` carries the scale, rsLoRA's too: readers compute alpha / rank. An anchored LoRA has rank 2r."""
        down, up = self.down_weight().detach(), self.up_weight().detach()
        return {
            "lora_down.weight": down,
            "lora_up.weight": up,
            "alpha": torch.tensor(self.scale * len(down)),
        }

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> LoRA:
        return cls._of_factors(spec, tensors, {})

    @classmethod
    def _of_factors(cls, spec: LayerSpec, tensors: dict[str, Tensor], options: dict[str, Any]) -> Self:
        """The adapter with a file's factors and alpha; a missing alpha means the rank, as in sd-scripts."""
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        rank = down.shape[0]
        alpha = float(tensors["alpha"]) if "alpha" in tensors else float(rank)
        shapes = down_shape(spec, rank), up_shape(spec, rank)
        if down.numel() != math.prod(shapes[0]) or up.numel() != math.prod(shapes[1]):
            raise ConfigError(
                f"the file's LoRA is {tuple(down.shape)} and {tuple(up.shape)}; "
                f"this layer needs {shapes[0]} and {shapes[1]}: the file is for another base"
            )
        adapter = cls(spec, AdapterConfig(cls.method, rank, alpha, options=options))
        with torch.no_grad():
            # a 1x1 convolution's factors may be stored as matrices, and a Linear's as 1x1 kernels
            adapter.lora_down.copy_(down.reshape(shapes[0]))
            adapter.lora_up.copy_(up.reshape(shapes[1]))
        return adapter
