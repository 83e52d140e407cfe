"""LoRA: dW = scale * up @ down (Hu et al. 2021, arXiv:2106.09685).

On convolutions this is LoCon as LyCORIS and kohya write it: `lora_down` keeps the kernel, `lora_up`
is 1x1. On experts (E, out, in), each has factors of its own: (E, rank, in) and (E, out, rank).
rsLoRA (arXiv:2312.03732) changes the scale from alpha / rank to alpha / sqrt(rank), LoRA+
(arXiv:2402.12354) the learning rate of `lora_up`. LoRA-FA (arXiv:2308.03303) freezes `lora_down`, and
the gradient G of `lora_up` becomes G (A A^T)^-1 / scale^2 with A = `lora_down`: the step of dW that is
closest to full training's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from studio.adapters.base import Adapter, AdapterConfig
from studio.adapters.entries import alpha_of
from studio.adapters.inits.initial import check_init, find_init, initial_factors
from studio.adapters.layers import LayerSpec, WeightView
from studio.adapters.lowrank import LowRank, down_shape, rank_in, up_shape
from studio.errors import ConfigError


@dataclass(frozen=True)
class LoRAOptions:
    """`init`: see initial.py. `lr_ratio`: the rate of `lora_up` over that of `lora_down`, LoRA+'s lambda
    (about 16 there). `freeze_down`: LoRA-FA."""

    init: str = "kaiming"
    lr_ratio: float = 1.0
    freeze_down: bool = False

    def __post_init__(self) -> None:
        find_init(self.init)
        if self.lr_ratio <= 0:
            raise ConfigError(f"lr_ratio is {self.lr_ratio}; it must be above 0")


class LoRA(LowRank):
    """`lora_down`, `lora_up` and the scale between them; dropout acts on the input.

    An initialisation that starts from the base's own weight (PiSSA, OLoRA) keeps its starting point as
    an anchor that is subtracted, so that dW is zero at first and the base is never changed; in a file, it has
    rank 2r.
    """

    method = "lora"
    kinds = Adapter.kinds | {"experts"}
    Options = LoRAOptions
    needed = frozenset({"lora_down.weight", "lora_up.weight"})
    optional = frozenset({"alpha"})
    rank_dims = {"lora_down": 0, "lora_up": 1}  # by rank surgery

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        self.lora_down = nn.Parameter(torch.zeros(down_shape(spec, config.rank)))
        up = torch.zeros(up_shape(spec, config.rank))
        # stored as (rank, out): its gradient then comes out of the faster of two equal products, with no copy
        self.lora_up = nn.Parameter(up if spec.dims else torch.zeros(up.mT.shape).mT)
        # past nn.Module.__setattr__ and found without its __getattr__: every call asks
        anchored = self.__dict__["anchored"] = check_init(self.options.init, spec, config.rank).anchored
        self.register_buffer("anchor_down", torch.zeros_like(self.lora_down) if anchored else None)
        self.register_buffer("anchor_up", torch.zeros_like(self.lora_up) if anchored else None)
        self.lora_down.requires_grad_(not self.options.freeze_down)

    @torch.no_grad()
    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        """By `options.init`; Kaiming-uniform `lora_down` and zero `lora_up` as a default, as in peft."""
        up, down = initial_factors(self.options.init, self.spec, self.config, generator, weight)
        self.lora_up.copy_(up)
        self.lora_down.copy_(down)
        if self.anchored:
            self.anchor_up.copy_(up)
            self.anchor_down.copy_(down)

    def down_weight(self) -> Tensor:
        return torch.cat([self.lora_down, self.anchor_down]) if self.anchored else self.lora_down

    def up_weight(self) -> Tensor:
        up = self.lora_up
        if self.options.freeze_down and torch.is_grad_enabled():
            up = _Projected.apply(up, self._down_matrices(), self.scale)
        return torch.cat([up, -self.anchor_up], dim=1) if self.anchored else up

    def _down_matrices(self) -> Tensor:
        """`lora_down` as (experts, rank, in), or (groups, rank / groups, in / groups * kernel)."""
        if self.spec.kind == "experts":
            return self.lora_down
        return self.lora_down.reshape(self.spec.groups, len(self.lora_down) // self.spec.groups, -1)

    def rates(self) -> Iterator[tuple[nn.Parameter, float]]:
        for parameter, factor in super().rates():
            yield parameter, self.options.lr_ratio if parameter is self.lora_up else factor

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> LoRA:
        return cls._of_factors(spec, tensors, {})

    @classmethod
    def _of_factors(cls, spec: LayerSpec, tensors: dict[str, Tensor], options: dict[str, Any]) -> Self:
        """The adapter with a file's factors and alpha; a missing alpha means the rank, as in sd-scripts."""
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        rank = rank_in(spec, down)
        shapes = down_shape(spec, rank), up_shape(spec, rank)
        if down.numel() != math.prod(shapes[0]) or up.numel() != math.prod(shapes[1]):
            raise ConfigError(
                f"the file's LoRA is {tuple(down.shape)} and {tuple(up.shape)}; "
                f"this layer needs {shapes[0]} and {shapes[1]}: the file is for another base"
            )
        adapter = cls(spec, AdapterConfig(cls.method, rank, alpha_of(tensors), options=options))
        with torch.no_grad():
            # a 1x1 convolution's factors may be stored as matrices, and a Linear's as 1x1 kernels
            adapter.lora_down.copy_(down.reshape(shapes[0]))
            adapter.lora_up.copy_(up.reshape(shapes[1]))
        return adapter


class _Projected(torch.autograd.Function):
    """`up` itself; its gradient G becomes G (A A^T)^-1 / scale^2, for each group or expert: `down` (groups, r, in)."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, down: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(down)
        ctx.scale = scale
        return up.view_as(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (down,) = ctx.saved_tensors
        gram = down @ down.mT + 1e-8 * torch.eye(down.shape[1], dtype=down.dtype, device=down.device)  # peft's ridge
        by_group = gradient.reshape(len(down), -1, down.shape[1])  # (groups, out / groups, rank / groups)
        return (by_group @ torch.linalg.pinv(gram)).reshape(gradient.shape) / ctx.scale**2, None, None
