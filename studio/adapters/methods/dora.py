"""DoRA: W + dW = m * (W + scale * up @ down) / ||W + scale * up @ down|| (Liu et al. 2024, arXiv:2402.09353).

The norm is a constant for the gradient (their section 4.3). It is never taken of a full matrix:
||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B> row by row, with ||W||^2 kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from studio.adapters.base import Adapter, AdapterConfig
from studio.adapters.layers import LayerSpec, WeightView, kept, version, wide
from studio.adapters.lowrank import add_product
from studio.adapters.methods.lora import LoRA, LoRAOptions
from studio.errors import ConfigError


@dataclass(frozen=True)
class DoRAOptions(LoRAOptions):
    """`norm_axis`: "out" has one magnitude for each row of W (the paper, peft, kohya, LyCORIS's
    wd_on_output), "in" one for each input channel (LyCORIS's older form)."""

    norm_axis: str = "out"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_axis not in ("out", "in"):
            raise ConfigError(f"norm_axis is '{self.norm_axis}'; it is 'out' or 'in'")


class DoRA(LoRA):
    """`dora_scale`, the magnitudes m, beside LoRA's factors: (out, 1, ...) or (1, in, ...)."""

    method = "dora"
    kinds = Adapter.kinds
    grouped = False
    Options = DoRAOptions
    needed = LoRA.needed | {"dora_scale"}

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        self.dora_scale = nn.Parameter(torch.ones(self._magnitude_shape()))
        self._known_norm: tuple[object, Tensor] | None = None

    def _magnitude_shape(self) -> tuple[int, ...]:
        shape = [1] * len(self.spec.weight_shape)
        shape[self._axis] = self.spec.weight_shape[self._axis]
        return tuple(shape)

    @property
    def _axis(self) -> int:
        """The dimension of the weight that keeps its own magnitudes."""
        out = 1 if self.spec.kind == "embedding" else 0
        return out if self.options.norm_axis == "out" else 1 - out

    def _squares(self, matrix: Tensor) -> Tensor:
        """Sums of squares over all dimensions but `_axis`, in `_magnitude_shape`."""
        rest = [dim for dim in range(matrix.ndim) if dim != self._axis]
        return wide(matrix).square().sum(rest, keepdim=True)

    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        super().reset(generator, weight)
        with torch.no_grad():
            self.dora_scale.copy_(weight.memo(f"squares {self._axis}", self._squares).sqrt())

    @torch.no_grad()
    def norm(self, weight: WeightView) -> Tensor:
        """||W + scale * up @ down||, in `_magnitude_shape`, without gradient; kept until a factor or W changes."""
        base = weight.memo(f"squares {self._axis}", self._squares)
        if torch.compiler.is_compiling():
            return self._norm(weight, base)
        now = (version(self.lora_down), version(self.lora_up), version(base), self.scale)
        if self._known_norm is None or self._known_norm[0] != now:
            with kept(base.device):
                self._known_norm = now, self._norm(weight, base)
        return self._known_norm[1]

    def _norm(self, weight: WeightView, base: Tensor) -> Tensor:
        up, down, scale = self.up_weight().flatten(1), self.down_weight().flatten(1), self.scale
        dense = weight.dense()
        matrix = (dense.T if self.spec.kind == "embedding" else dense).flatten(1)  # (out, in * kernel)
        if self.options.norm_axis == "out":
            cross = wide(matrix @ down.to(matrix.dtype).T)  # (out, rank)
            more = torch.addmm(cross, up, down @ down.T, beta=2 * scale, alpha=scale**2).mul_(up).sum(1)
        else:
            cross = wide(up.to(matrix.dtype).T @ matrix)  # (rank, in * kernel)
            more = torch.addmm(cross, up.T @ up, down, beta=2 * scale, alpha=scale**2).mul_(down).sum(0)
            more = more.reshape(self.spec.in_features, -1).sum(1)  # an input channel has all columns of its kernel
        return (base + more.reshape(base.shape)).clamp_min_(0).sqrt_()

    def delta_weight(self, weight: WeightView) -> Tensor:
        dense = wide(weight.dense())
        return self.dora_scale / self.norm(weight) * (dense + super().delta_weight(weight)) - dense

    @property
    def low_rank(self) -> bool:
        return False

    def forward(self, x: Tensor, y: Tensor, base: Tensor | None, weight: WeightView) -> Tensor:
        """From the base's output where it is at hand: no product with W, unless dropout asks for one."""
        if base is None or self.options.norm_axis == "in":
            return Adapter.forward(self, x, y, base, weight)
        gain = self.spec.over_outputs((self.dora_scale / self.norm(weight)).to(y.dtype))
        up, h = self.up_weight().to(y.dtype), self.read(x, y.dtype)
        bias = None if weight.bias is None else self.spec.over_outputs(weight.bias.to(y.dtype))
        if base is y and self.strength == 1 and not self.drops:
            return _Gain.apply(add_product(self.spec, y, h, up, self.scale), gain, bias)
        if self.drops:  # the whole of dW acts on the dropped input, as in the authors' code and peft
            plain = self.spec.apply(self.dropped(x).to(y.dtype), weight.dense().to(y.dtype))
        else:
            plain = base if bias is None else base - bias
        return y + self.strength * (gain * add_product(self.spec, plain.clone(), h, up, self.scale) - plain)

    def passes(self, tokens: int) -> bool:
        return self.options.norm_axis == "out" and self.strength == 1

    @property
    def magnitude(self) -> Tensor:
        return self.dora_scale

    def export(self) -> dict[str, Tensor]:
        return {**super().export(), "dora_scale": self.dora_scale.detach()}

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> DoRA:
        scale = tensors["dora_scale"]
        out = scale.shape[0] == spec.weight_shape[0] and scale.numel() == scale.shape[0]
        options = {"norm_axis": "out" if out != (spec.kind == "embedding") else "in"}
        adapter = cls._of_factors(spec, tensors, options)
        if scale.numel() != adapter.dora_scale.numel():
            raise ConfigError(f"the file's dora_scale is {tuple(scale.shape)}; this layer has {spec.weight_shape}")
        with torch.no_grad():
            adapter.dora_scale.copy_(scale.reshape(adapter.dora_scale.shape))
        return adapter


class _Gain(torch.autograd.Function):
    """(z - bias) * gain + bias in place. Keeps the layer's output, which its neighbours keep anyway, and not z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        out = z.mul_(gain) if bias is None else z.mul_(gain).add_(bias - bias * gain)
        ctx.mark_dirty(out)
        ctx.save_for_backward(out, gain, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        out, gain, bias = ctx.saved_tensors
        product = gradient * out
        of_gain = product.sum_to_size(gain.shape)
        of_z = torch.mul(gradient, gain, out=product)  # into memory that is in the cache
        if bias is not None:  # of_gain is the sum of gradient * (out - bias) = gradient * gain * (z - bias)
            of_gain -= bias * gradient.sum_to_size(gain.shape)
        of_gain /= gain + torch.finfo(gain.dtype).tiny  # a magnitude of exactly zero has lost its direction
        return of_z, of_gain, None
