"""LoKr: dW = scale * W1 ⊗ W2, a Kronecker product whose factors may be low-rank themselves (LyCORIS, arXiv:2309.14859).

W1 (a, b) is `lokr_w1` or `lokr_w1_a` @ `lokr_w1_b`. W2 (c, d, *kernel), with a c = out and b d = in, is
`lokr_w2`, or `lokr_w2_a` @ `lokr_w2_b`, or in the Tucker form `lokr_w2_a`^T · `lokr_t2` · `lokr_w2_b`.
The product acts on an input seen as b groups of d channels: W2 on each group, then W1 between the groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio.adapters.base import Adapter, AdapterConfig
from studio.adapters.entries import alpha_of
from studio.adapters.layers import LayerSpec, WeightView
from studio.errors import ConfigError

NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


@dataclass(frozen=True)
class LoKrOptions:
    """`factor`: the size of W1, as square as possible with -1 (`factorization`). `full_matrix`: no low-rank
    factors; W2 has none anyway where the rank is at least half its size. `decompose_both`: low-rank factors for
    W1 too, where the rank is below half its size. `tucker`: the Tucker form for kernels larger than 1."""

    factor: int = -1
    decompose_both: bool = False
    full_matrix: bool = False
    tucker: bool = False

    def __post_init__(self) -> None:
        if self.factor < 1 and self.factor != -1:
            raise ConfigError(f"factor is {self.factor}; it is -1 (as square as possible) or at least 1")


class LoKr(Adapter):
    """The tensors that the options and the layer ask for, under LyCORIS's names; the others are None."""

    method = "lokr"
    kinds = frozenset({"linear", "conv"})
    Options = LoKrOptions
    optional = frozenset({*NAMES, "alpha"})

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        shapes = self._shapes()
        for name in NAMES:
            self.register_parameter(name, nn.Parameter(torch.zeros(shapes[name])) if name in shapes else None)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        rank, options, kernel = self.config.rank, self.options, self.spec.weight_shape[2:]
        (a, c), (b, d) = (factorization(size, options.factor) for size in self.spec.weight_shape[:2])
        if options.decompose_both and rank < max(a, b) / 2 and not options.full_matrix:
            first: dict[str, tuple[int, ...]] = {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, b)}
        else:
            first = {"lokr_w1": (a, b)}
        if rank >= max(c, d) / 2 or options.full_matrix:
            return {**first, "lokr_w2": (c, d, *kernel)}
        if options.tucker and math.prod(kernel) > 1:
            return {**first, "lokr_w2_a": (rank, c), "lokr_w2_b": (rank, d), "lokr_t2": (rank, rank, *kernel)}
        return {**first, "lokr_w2_a": (c, rank), "lokr_w2_b": (rank, d * math.prod(kernel))}

    @torch.no_grad()
    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        """Kaiming-uniform, and zero for W2 or its second factor, as in LyCORIS."""
        for name, parameter in self.named_parameters():
            if name not in ("lokr_w2", "lokr_w2_b"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)

    @property
    def scale(self) -> float:
        """alpha / rank, as configured; 1 where neither factor is low-rank, whatever alpha says."""
        return self.config.scale if self.lokr_w1 is None or self.lokr_w2 is None else 1.0

    def first(self) -> Tensor:
        """W1, (a, b)."""
        return self.lokr_w1_a @ self.lokr_w1_b if self.lokr_w1 is None else self.lokr_w1

    def second(self) -> tuple[Tensor | None, Tensor]:
        """W2 as (up, down): (c, r) and (r, d, *kernel), or None and (c, d, *kernel) where it is full."""
        if self.lokr_w2 is not None:
            return None, self.lokr_w2
        if self.lokr_t2 is not None:
            return self.lokr_w2_a.T, torch.einsum("mn...,nd->md...", self.lokr_t2, self.lokr_w2_b)
        kernel = self.spec.weight_shape[2:]
        return self.lokr_w2_a, self.lokr_w2_b.reshape(len(self.lokr_w2_b), -1, *kernel)

    def delta_weight(self, weight: WeightView) -> Tensor:
        up, second = self.second()
        if up is not None:
            second = (up @ second.flatten(1)).reshape(-1, *second.shape[1:])
        first = self.first()
        return self.scale * torch.kron(first.reshape(*first.shape, *(1,) * self.spec.dims), second)

    def forward(self, x: Tensor, y: Tensor, base: Tensor | None, weight: WeightView) -> Tensor:
        """Without dW: the factors act on the input one after the other."""
        if self.spec.groups > 1:  # the blocks of W1 cross the convolution's groups
            return super().forward(x, y, base, weight)
        first, (up, down) = self.first().to(y.dtype), self.second()
        act = self._on_channels if self.spec.kind == "conv" else self._on_features
        x = self.dropped(x).to(y.dtype)
        return y + self.strength * self.scale * act(x, first, None if up is None else up.to(y.dtype), down.to(y.dtype))

    def _on_features(self, x: Tensor, first: Tensor, up: Tensor | None, down: Tensor) -> Tensor:
        h = F.linear(x.unflatten(-1, (first.shape[1], -1)), down)  # (..., b, r or c)
        h = first @ h  # (..., a, r or c)
        return (h if up is None else F.linear(h, up)).flatten(-2)

    def _on_channels(self, x: Tensor, first: Tensor, up: Tensor | None, down: Tensor) -> Tensor:
        (a, b), batch = first.shape, len(x)
        h = self.spec.apply(x.reshape(batch * b, -1, *x.shape[2:]), down)  # (batch * b, r or c, *places)
        places = h.shape[2:]
        h = first @ h.reshape(batch, b, -1)  # (batch, a, (r or c) * places)
        if up is not None:
            h = up @ h.reshape(batch, a, len(down), -1)  # (batch, a, c, places)
        return h.reshape(batch, -1, *places)

    def export(self) -> dict[str, Tensor]:
        """As LyCORIS writes it; `alpha` carries the scale, rsLoRA's too: readers compute alpha / rank."""
        tensors = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return {**tensors, "alpha": torch.tensor(float(self.scale * self.config.rank))}

    @classmethod
    def owns(cls, suffixes: frozenset[str]) -> bool:
        """Each of W1 and W2 is there once, whole or in factors."""
        second = {"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"}
        first = {"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}
        return suffixes - {"alpha"} in [one | two for one in first for two in second]

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> LoKr:
        """The sizes of W1 and W2 are the file's. Without low-rank factors, the rank shows in `alpha` alone."""
        alpha = alpha_of(tensors)
        down = next((tensors[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in tensors), None)
        rank = max(1, round(alpha or 1)) if down is None else len(down)
        adapter = cls(spec, AdapterConfig(cls.method, rank, alpha))
        for name in NAMES:
            setattr(adapter, name, nn.Parameter(tensors[name].to(torch.float32)) if name in tensors else None)
        if not adapter._fits():
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ConfigError(f"the file's LoKr {shapes} does not fit {spec.weight_shape}: it is for another base")
        return adapter

    def _fits(self) -> bool:
        """Whether the tensors multiply to a weight of the layer's shape."""
        kernels = {"lokr_w2", "lokr_t2"}
        if any(one.ndim != 2 for name, one in self.named_parameters() if name not in kernels):
            return False
        try:
            (a, b), (up, down) = self.first().shape, self.second()
        except RuntimeError:  # they do not even fit each other
            return False
        out = a * len(down if up is None else up)
        if up is not None and up.shape[1] != len(down):
            return False
        return (out, b * down.shape[1], *down.shape[2:]) == self.spec.weight_shape


def factorization(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product, the smaller part first: of `factor` where that divides it, else of the largest
    divisor up to `factor` and sqrt(size); -1 sets no bound. As LyCORIS does it."""
    if factor > 0 and size % factor == 0:
        small = min(factor, size // factor)
    else:
        limit = math.isqrt(size) if factor < 0 else min(math.isqrt(size), factor)
        small = next(one for one in range(limit, 0, -1) if size % one == 0)
    return small, size // small
