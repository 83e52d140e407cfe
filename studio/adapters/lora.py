"""LoRA: dW = scale * up @ down (Hu et al. 2021, arXiv:2106.09685).

On convolutions this is LoCon as LyCORIS and kohya write it: `lora_down` keeps the kernel, `lora_up`
is 1x1. rsLoRA (arXiv:2312.03732) changes the scale from alpha / rank to alpha / sqrt(rank).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio.adapters.base import Adapter, AdapterConfig, LayerSpec, WeightView
from studio.errors import ConfigError


def down_shape(spec: LayerSpec, rank: int) -> tuple[int, ...]:
    """(rank, in) for Linear and Embedding, (rank, in / groups, *kernel) for Conv."""
    if spec.kind == "conv":
        return (rank, *spec.weight_shape[1:])
    return (rank, spec.in_features)


def up_shape(spec: LayerSpec, rank: int) -> tuple[int, ...]:
    """(out, rank), with a 1x1 kernel for Conv; a grouped Conv keeps its groups in both factors."""
    if spec.kind == "conv":
        return (spec.out_features, rank // spec.groups, *(1,) * spec.dims)
    return (spec.out_features, rank)


class LoRA(Adapter):
    """`lora_down`, `lora_up` and the scale between them; dropout acts on the input."""

    method = "lora"

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        if config.rank % spec.groups:
            raise ConfigError(
                f"rank {config.rank} does not divide into the {spec.groups} groups of a convolution; "
                f"choose a multiple of {spec.groups}"
            )
        if config.dropout and spec.kind == "embedding":
            raise ConfigError(
                "dropout acts on a layer's input, and an embedding's input is token ids: set it to 0 there"
            )
        self.lora_down = nn.Parameter(torch.zeros(down_shape(spec, config.rank)))
        self.lora_up = nn.Parameter(torch.zeros(up_shape(spec, config.rank)))

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.config.scale

    def reset(self, generator: torch.Generator) -> None:
        """Kaiming-uniform `lora_down` and zero `lora_up`; for Embedding the roles are exchanged, as in peft."""
        with torch.no_grad():
            if self.spec.kind == "embedding":
                nn.init.normal_(self.lora_up, generator=generator)
                nn.init.zeros_(self.lora_down)
            else:
                nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5), generator=generator)
                nn.init.zeros_(self.lora_up)

    def delta_weight(self, weight: WeightView) -> Tensor:
        if self.spec.kind == "embedding":
            return self.scale * (self.lora_up @ self.lora_down).T  # (vocabulary, width)
        groups, rank = self.spec.groups, self.config.rank
        up = self.lora_up.reshape(groups, self.spec.out_features // groups, rank // groups)
        down = self.lora_down.reshape(groups, rank // groups, -1)  # (groups, rank / groups, in / groups * kernel)
        return self.scale * (up @ down).reshape(weight.shape)

    def forward(self, x: Tensor, y: Tensor, weight: WeightView) -> Tensor:
        """Through the rank-sized bottleneck, in the dtype of the base's output."""
        down, up = self.lora_down.to(y.dtype), self.lora_up.to(y.dtype)
        if self.spec.kind == "embedding":
            h = F.linear(self.spec.apply(x, down.T), up)
        else:
            h = self.spec.apply(self.dropped(x).to(y.dtype), down)
            h = self.spec.pointwise(h, up)
        return y + (self.strength * self.scale) * h

    def export(self) -> dict[str, Tensor]:
        """`alpha` carries the scale, rsLoRA's too: readers compute alpha / rank."""
        return {
            "lora_down.weight": self.lora_down.detach(),
            "lora_up.weight": self.lora_up.detach(),
            "alpha": torch.tensor(self.scale * self.config.rank),
        }

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> LoRA:
        unknown = set(tensors) - {"lora_down.weight", "lora_up.weight", "alpha"}
        if unknown:
            raise ConfigError(f"a LoRA layer does not have {', '.join(sorted(unknown))}")
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        rank = down.shape[0]
        alpha = float(tensors["alpha"]) if "alpha" in tensors else float(rank)
        shapes = down_shape(spec, rank), up_shape(spec, rank)
        if down.numel() != math.prod(shapes[0]) or up.numel() != math.prod(shapes[1]):
            raise ConfigError(
                f"the file's LoRA is {tuple(down.shape)} and {tuple(up.shape)}; "
                f"this layer needs {shapes[0]} and {shapes[1]}: the file is for another base"
            )
        adapter = cls(spec, AdapterConfig(method="lora", rank=rank, alpha=alpha))
        with torch.no_grad():
            # a 1x1 convolution's factors may be stored as matrices, and a Linear's as 1x1 kernels
            adapter.lora_down.copy_(down.reshape(shapes[0]))
            adapter.lora_up.copy_(up.reshape(shapes[1]))
        return adapter
