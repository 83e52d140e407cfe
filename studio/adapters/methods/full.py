"""The values themselves are trained: dW and db are parameters, without any factors.

"diff" is LyCORIS's `full` and kohya's `diff`: as expressive as full fine-tuning, and as large. It serves
modules that are trained in full beside a smaller adapter (a new head, an embedding). "norm" is LyCORIS's
training of norms, "bias" is BitFit (arXiv:2106.10199), which trains the biases alone. All start at zero;
rank and alpha say nothing here.

LyCORIS reads `diff` on layers and `w_norm` on norms, ComfyUI both, and a `diff_b` without a `diff` too.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from studio.adapters.base import Adapter, AdapterConfig
from studio.adapters.layers import LayerSpec, WeightView
from studio.errors import ConfigError


class Full(Adapter):
    """`diff` = dW and, where the layer has a bias, `diff_b` = db. Dropout acts on the input of dW."""

    method = "diff"
    kinds = frozenset({"linear", "conv", "embedding", "experts"})
    needed = frozenset({"diff"})
    optional = frozenset({"diff_b"})
    names: ClassVar[tuple[str, str]] = ("diff", "diff_b")
    """The on-disk suffixes, and parameters, of dW and db."""

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        for name, shape in self.shapes(spec).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    @classmethod
    def shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters on such a layer, by name."""
        of_weight, of_bias = cls.names
        shapes = {of_weight: spec.weight_shape}
        return {**shapes, of_bias: (spec.out_features,)} if spec.bias else shapes

    @torch.no_grad()
    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        for parameter in self.parameters():
            parameter.zero_()

    def delta_weight(self, weight: WeightView) -> Tensor:
        return self.get_parameter(self.names[0])

    def delta_bias(self, weight: WeightView) -> Tensor | None:
        return self._parameters.get(self.names[1])

    def export(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> Full:
        """What a file leaves out stays zero: a `diff` without `diff_b` changes no bias."""
        adapter = cls(spec, AdapterConfig(cls.method))
        for name, tensor in tensors.items():
            own = adapter._parameters.get(name)
            if own is None or own.numel() != tensor.numel():
                needs = "has no bias" if own is None else f"needs {tuple(own.shape)}"
                raise ConfigError(f"the file's {name} is {tuple(tensor.shape)}; this layer {needs}")
            with torch.no_grad():
                own.copy_(tensor.reshape(own.shape))
        return adapter


class NormTuning(Full):
    """The gain and the shift of a norm: `w_norm` and, where it has a shift, `b_norm`."""

    method = "norm"
    kinds = frozenset({"norm"})
    needed = frozenset({"w_norm"})
    optional = frozenset({"b_norm"})
    names = ("w_norm", "b_norm")


class BiasTuning(Full):
    """BitFit: `diff_b` alone, on every layer that has a bias, norms too. One addition is all it costs."""

    method = "bias"
    kinds = frozenset({"linear", "conv", "norm"})
    needed = frozenset({"diff_b"})
    optional = frozenset()

    @classmethod
    def supports(cls, spec: LayerSpec) -> bool:
        return super().supports(spec) and spec.bias

    @classmethod
    def check(cls, spec: LayerSpec, config: AdapterConfig) -> None:
        super().check(spec, config)
        if config.dropout:
            raise ConfigError("dropout acts on a layer's input, which 'bias' does not read: set it to 0 there")

    @classmethod
    def shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        return {cls.names[1]: (spec.out_features,)}

    def delta_weight(self, weight: WeightView) -> Tensor:
        return self.diff_b.new_zeros(weight.shape)

    def forward(self, x: Tensor, y: Tensor, base: Tensor | None, weight: WeightView) -> Tensor:
        return y + self.strength * self.spec.over_outputs(self.diff_b.to(y.dtype))
