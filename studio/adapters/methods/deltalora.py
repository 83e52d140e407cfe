"""Delta-LoRA: W learns from the steps of LoRA's product (Zi et al. 2023, arXiv:2309.02411).

After step t > `start_step` the paper adds lambda * scale * (B_{t+1} A_{t+1} - B_t A_t) to W. The sum
telescopes, so W is never touched here: with B_K A_K, the factors after step `start_step`,

    dW = scale * (B A + lambda * (B A - B_K A_K)),

a LoRA of twice the rank. Only the first term has a gradient: W is a constant in the paper's backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from studio.adapters.base import AdapterConfig
from studio.adapters.inits.initial import initial_factors
from studio.adapters.layers import LayerSpec, WeightView
from studio.adapters.lowrank import LowRank, down_shape, up_shape
from studio.errors import ConfigError


@dataclass(frozen=True)
class DeltaLoRAOptions:
    """`lambda_` >= 0: how much of a step goes into W. `start_step`: the paper's K, counted from 0."""

    lambda_: float = 0.5
    start_step: int = 500

    def __post_init__(self) -> None:
        if self.lambda_ < 0:
            raise ConfigError(f"lambda_ is {self.lambda_}; it must be 0 or more")
        if self.start_step < 0:
            raise ConfigError(f"start_step is {self.start_step}; it must be 0 or more")


class DeltaLoRA(LowRank):
    """LoRA's factors and a copy of them from `start_step`, empty until then. Written to files exactly as a LoRA."""

    method = "deltalora"
    grouped = False
    Options = DeltaLoRAOptions
    rank_dims = {"anchor_down": 0, "anchor_up": 1}

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        self.lora_down = nn.Parameter(torch.zeros(down_shape(spec, config.rank)))
        self.lora_up = nn.Parameter(torch.zeros(up_shape(spec, config.rank)))
        self.register_buffer("anchor_down", torch.zeros(down_shape(spec, 0)))
        self.register_buffer("anchor_up", torch.zeros(up_shape(spec, 0)))

    @classmethod
    def check(cls, spec: LayerSpec, config: AdapterConfig) -> None:
        super().check(spec, config)
        if config.dropout:
            raise ConfigError("Delta-LoRA has no dropout, since W's steps are those of the product: set it to 0")

    @torch.no_grad()
    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        up, down = initial_factors("kaiming", self.spec, self.config, generator, weight)
        self.lora_up.copy_(up)
        self.lora_down.copy_(down)

    @property
    def started(self) -> bool:
        """Whether W has begun to move."""
        return len(self.anchor_down) > 0

    def down_weight(self) -> Tensor:
        """A, with 1 / (1 + lambda) of the gradient that (1 + lambda) B A would give it, over A_K."""
        if not self.started:
            return self.lora_down
        share = self.options.lambda_
        down = (self.lora_down + share * self.lora_down.detach()) / (1 + share)
        return torch.cat([down, self.anchor_down])  # (2 * rank, in[, *kernel])

    def up_weight(self) -> Tensor:
        """(1 + lambda) B, with the gradient of B, beside -lambda B_K."""
        if not self.started:
            return self.lora_up
        share = self.options.lambda_
        up = self.lora_up + share * self.lora_up.detach()
        return torch.cat([up, -share * self.anchor_up], dim=1)  # (out, 2 * rank[, 1...])

    @classmethod
    @torch.no_grad()
    def after_step(cls, adapters: Sequence[DeltaLoRA], step: int, optimizer: Optimizer | None) -> None:
        """Keeps the factors once `start_step` has been taken."""
        for one in adapters:
            if step >= one.options.start_step and not one.started:
                one.anchor_down = one.lora_down.clone()
                one.anchor_up = one.lora_up.clone()
