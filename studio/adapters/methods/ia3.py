"""IA3: y = l * (W x + b), or y = W (l * x) + b, with a gate l on each channel (Liu et al. 2022, arXiv:2205.05638).

The paper gates the outputs of keys and values, and the inputs of a block's last feed-forward layer.
On disk it is LyCORIS's, `weight` = l - 1 (peft's `ia3_l` is l). The bias of an output gate is a trap:
the paper and peft gate it, LyCORIS does not, so `on_bias` in a file says that it is gated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from studio.adapters.base import AdapterConfig, read_options
from studio.adapters.channel_map import ChannelMap
from studio.adapters.entries import filled, number_of
from studio.adapters.layers import LayerSpec, WeightView
from studio.errors import ConfigError


@dataclass(frozen=True)
class IA3Options:
    """`gate`: "output" or "input" channels. `gate_bias`: whether an output gate acts on the bias too."""

    gate: str = "output"
    gate_bias: bool = True

    def __post_init__(self) -> None:
        if self.gate not in ("output", "input"):
            raise ConfigError(f"gate is '{self.gate}'; it is 'output' or 'input'")


class IA3(ChannelMap):
    """`weight`, the gate less 1: (channels,), or (1, channels, 1, ...) for Conv; rank and alpha play no part."""

    method = "ia3"
    Options = IA3Options
    needed = frozenset({"weight", "on_input"})
    optional = frozenset({"on_bias"})
    integers = frozenset({"on_input", "on_bias"})
    within_groups = True  # type: ignore[assignment]

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        self.weight = nn.Parameter(torch.zeros(_gate_shape(spec, self.on_input)))

    @classmethod
    def check(cls, spec: LayerSpec, config: AdapterConfig) -> None:
        super().check(spec, config)
        if spec.kind == "embedding" and read_options(cls, config.options).gate == "input":
            raise ConfigError("an embedding has no input channels to gate: set gate to 'output' there")

    @property
    def on_input(self) -> bool:
        return self.options.gate == "input"

    @property
    def acts_on_bias(self) -> bool:  # type: ignore[override]
        return self.options.gate_bias

    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        nn.init.zeros_(self.weight)

    def change(self, dtype: torch.dtype, strength: float = 1, transposed: bool = False) -> Callable[[Tensor], Tensor]:
        gate = (strength * self.weight.flatten()).to(dtype)
        return lambda values: gate * values

    def export(self) -> dict[str, Tensor]:
        entry = {"weight": self.weight.detach(), "on_input": torch.tensor(int(self.on_input))}
        gates_bias = self.spec.bias and self.acts_on_bias and not self.on_input
        return {**entry, "on_bias": torch.tensor(1)} if gates_bias else entry

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> IA3:
        gate = "input" if number_of(tensors, "on_input") else "output"
        options = {"gate": gate, "gate_bias": bool(number_of(tensors, "on_bias"))}
        adapter = cls(spec, AdapterConfig(cls.method, options=options))
        return filled(adapter, tensors, besides=frozenset({"on_input", "on_bias"}))


def _gate_shape(spec: LayerSpec, on_input: bool) -> tuple[int, ...]:
    channels = spec.in_features * spec.groups if on_input else spec.out_features
    return (1, channels, *(1,) * spec.dims) if spec.kind == "conv" else (channels,)
