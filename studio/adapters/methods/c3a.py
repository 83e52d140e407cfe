"""C3A: dW is made of circulant blocks, so that it acts as circular convolutions (arXiv:2407.19342).

Block (m, n) of b x b elements is dW[p, q] = w[m, n, (q - p) mod b] / in: full rank from in * out / b
parameters. Its product with an input is a circular correlation, computed by FFT in O(b log b).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from studio.adapters.base import Adapter, AdapterConfig
from studio.adapters.entries import filled
from studio.adapters.layers import LayerSpec, WeightView
from studio.errors import ConfigError


@dataclass(frozen=True)
class C3AOptions:
    """`block_size` b: a common divisor of the layer's inputs and outputs; None takes the greatest one."""

    block_size: int | None = None


class C3A(Adapter):
    """`c3a_kernel` w, (out / b, in / b, b), as in peft. Rank and alpha have no meaning here."""

    method = "c3a"
    kinds = frozenset({"linear"})
    Options = C3AOptions
    needed = frozenset({"c3a_kernel"})

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        out, inputs = spec.weight_shape
        greatest = math.gcd(out, inputs)
        self.block = greatest if self.options.block_size is None else self.options.block_size
        if self.block < 1 or greatest % self.block:
            raise ConfigError(f"block_size {self.block} must divide {inputs} inputs and {out} outputs: {greatest} does")
        self.c3a_kernel = nn.Parameter(torch.zeros(out // self.block, inputs // self.block, self.block))

    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        """w is zero: dW is linear in it, and nothing is drawn."""
        nn.init.zeros_(self.c3a_kernel)

    def delta_weight(self, weight: WeightView) -> Tensor:
        twice = torch.cat([self.c3a_kernel, self.c3a_kernel], dim=-1)
        rows = twice.unfold(-1, self.block, 1)[:, :, 1:].flip(2)  # (out / b, in / b, b, b): [p, q] = w[(q - p) mod b]
        return (rows / self.spec.in_features).transpose(1, 2).reshape(weight.shape)

    def forward(self, x: Tensor, y: Tensor, base: Tensor | None, weight: WeightView) -> Tensor:
        """By FFT, which there is for fp32 and float64 alone."""
        if y.dtype not in (torch.float32, torch.float64):
            return super().forward(x, y, base, weight)
        x = self.dropped(x).to(y.dtype).unflatten(-1, (-1, self.block))
        inputs, kernel = torch.fft.rfft(x), torch.fft.rfft(self.c3a_kernel.to(y.dtype)).conj()
        output = torch.fft.irfft(torch.einsum("...nf,mnf->...mf", inputs, kernel), n=self.block)  # (..., out / b, b)
        return y + self.strength / self.spec.in_features * output.flatten(-2)

    def export(self) -> dict[str, Tensor]:
        return {"c3a_kernel": self.c3a_kernel.detach()}

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> C3A:
        options = {"block_size": tensors["c3a_kernel"].shape[-1]}
        return filled(cls(spec, AdapterConfig(cls.method, options=options)), tensors)
