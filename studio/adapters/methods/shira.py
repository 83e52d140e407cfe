"""SHiRA: dW is zero but at r * (in + out) random places, whose values are trained (arXiv:2406.13175).

As many parameters as a LoRA of rank r, without its low rank; the places are drawn once, from the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from studio.adapters.base import Adapter, AdapterConfig
from studio.adapters.layers import LayerSpec, WeightView
from studio.errors import ConfigError


class SHiRA(Adapter):
    """`shira_weight` (n,) and its rows and columns `shira_indices` (2, n), as in peft. Alpha has no meaning here."""

    method = "shira"
    kinds = frozenset({"linear"})
    needed = frozenset({"shira_indices", "shira_weight"})
    integers = frozenset({"shira_indices"})

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        count = config.rank * sum(spec.weight_shape)
        self.shira_weight = nn.Parameter(torch.zeros(count))
        self.register_buffer("shira_indices", torch.zeros(2, count, dtype=torch.int32))

    @classmethod
    def check(cls, spec: LayerSpec, config: AdapterConfig) -> None:
        super().check(spec, config)
        out, inputs = spec.weight_shape
        if config.rank * (out + inputs) > out * inputs:
            raise ConfigError(
                f"rank {config.rank} asks for more values than the layer's {out} x {inputs}; "
                f"at most {out * inputs // (out + inputs)} fits"
            )

    @torch.no_grad()
    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        """Random places without repetition, and zeros there."""
        out, inputs = self.spec.weight_shape
        places = torch.randperm(out * inputs, generator=generator)[: len(self.shira_weight)].sort().values
        self.shira_indices.copy_(torch.stack([places // inputs, places % inputs]))

    def delta_weight(self, weight: WeightView) -> Tensor:
        rows, columns = self.shira_indices.long()
        return self.shira_weight.new_zeros(weight.shape).index_put((rows, columns), self.shira_weight)

    def export(self) -> dict[str, Tensor]:
        return {"shira_indices": self.shira_indices, "shira_weight": self.shira_weight.detach()}

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> SHiRA:
        """Any number of places, each named once."""
        values, places = tensors["shira_weight"], tensors["shira_indices"]
        if values.ndim != 1 or places.shape != (2, len(values)):
            raise ConfigError(
                f"the file has values {tuple(values.shape)} at {tuple(places.shape)}; (values) and (2, values) fit"
            )
        if (places < 0).any() or (places.amax(1) >= torch.tensor(spec.weight_shape)).any():
            raise ConfigError(f"the file's shira_indices leave this layer's {spec.weight_shape}: for another base")
        adapter = cls(spec, AdapterConfig(cls.method, max(1, len(values) // sum(spec.weight_shape))))
        adapter.shira_weight = nn.Parameter(values.to(torch.float32))
        adapter.shira_indices = places.to(torch.int32)
        return adapter
