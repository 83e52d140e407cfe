"""Tucker LoCon: dW = scale * up · mid · down, a kernel of rank x rank between two 1x1 convolutions.

LyCORIS's use_tucker (sd-scripts: use_cp) for LoRA, after the Tucker form of a kernel (arXiv:2108.06098,
proposition 3): dW[o, i, *k] = scale * sum_mn up[o, m] mid[m, n, *k] down[n, i]. A layer without a kernel
larger than 1 gets a plain LoRA, and is written as one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from studio.adapters.base import AdapterConfig
from studio.adapters.entries import alpha_of, filled
from studio.adapters.layers import LayerSpec, WeightView
from studio.adapters.lowrank import LowRank, up_shape


class Tucker(LowRank):
    """`lora_down` (r, in[, 1...]), `lora_mid` (r, r, *kernel) or None, `lora_up` (out, r[, 1...])."""

    method = "tucker"
    kinds = frozenset({"linear", "conv"})
    grouped = False
    needed = frozenset({"lora_down.weight", "lora_mid.weight", "lora_up.weight"})
    optional = frozenset({"alpha"})

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        kernel = spec.weight_shape[2:]
        core = (config.rank, config.rank, *kernel) if math.prod(kernel) > 1 else None
        self.lora_down = nn.Parameter(torch.zeros(config.rank, spec.in_features, *(1,) * spec.dims))
        self.lora_mid = None if core is None else nn.Parameter(torch.zeros(core))
        self.lora_up = nn.Parameter(torch.zeros(up_shape(spec, config.rank)))

    @torch.no_grad()
    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        """Kaiming-uniform `lora_down` and `lora_mid`, zero `lora_up`, as in LyCORIS."""
        for parameter in (self.lora_down, self.lora_mid):
            if parameter is not None:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)

    def down_weight(self) -> Tensor:
        """mid · down as one kernel, (r, in, *kernel)."""
        if self.lora_mid is None:
            return self.lora_down
        return torch.einsum("mn...,ni->mi...", self.lora_mid, self.lora_down.flatten(1))

    def up_weight(self) -> Tensor:
        return self.lora_up

    def read(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The kernel acts on the rank channels: cheaper than `down_weight` on all of the input's."""
        if self.lora_mid is None:
            return super().read(x, dtype)
        h = self.spec.pointwise(self.dropped(x).to(dtype), self.lora_down.to(dtype))
        return self.spec.apply(h, self.lora_mid.to(dtype))

    def export(self) -> dict[str, Tensor]:
        """As LyCORIS writes it; `alpha` carries the scale, rsLoRA's too: readers compute alpha / rank."""
        factors = {f"{name}.weight": parameter.detach() for name, parameter in self.named_parameters()}
        return {**factors, "alpha": torch.tensor(self.scale * self.config.rank)}

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> Tucker:
        config = AdapterConfig(cls.method, len(tensors["lora_mid.weight"]), alpha_of(tensors))
        return filled(cls(spec, config), tensors, ".weight")
