"""What low-rank methods share: dW = scale * up @ down, computed through the rank-sized bottleneck."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from studio.adapters.base import Adapter, AdapterConfig
from studio.adapters.layers import LayerSpec, WeightView
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


class LowRank(Adapter):
    """A method whose dW is scale * up @ down: it gives `down_weight`, `up_weight` and `scale`.

    `down_weight` has the shape of `down_shape`, `up_weight` that of `up_shape`; both may be computed.
    """

    shared: SharedReads | None = None

    @classmethod
    def check(cls, spec: LayerSpec, config: AdapterConfig) -> None:
        super().check(spec, config)
        if config.rank % spec.groups:
            raise ConfigError(
                f"rank {config.rank} does not divide into the {spec.groups} groups of a convolution; "
                f"choose a multiple of {spec.groups}"
            )

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.config.scale

    def down_weight(self) -> Tensor:
        """What reads the input."""
        raise NotImplementedError

    def up_weight(self) -> Tensor:
        """What writes the output."""
        raise NotImplementedError

    def delta_weight(self, weight: WeightView) -> Tensor:
        up, down = self.up_weight(), self.down_weight()
        if self.spec.kind == "embedding":
            return self.scale * (up @ down).T  # (vocabulary, width)
        groups = self.spec.groups
        rank = down.shape[0] // groups
        up = up.reshape(groups, self.spec.out_features // groups, rank)
        down = down.reshape(groups, rank, -1)  # (groups, rank / groups, in / groups * kernel)
        return self.scale * (up @ down).reshape(weight.shape)

    @property
    def low_rank(self) -> bool:
        return self.spec.groups == 1

    def factors(self, weight: WeightView) -> tuple[Tensor, Tensor]:
        return self.scale * self.up_weight().flatten(1), self.down_weight().flatten(1)

    def forward(self, x: Tensor, y: Tensor, base: Tensor | None, weight: WeightView) -> Tensor:
        """Through the bottleneck, in the dtype of the base's output: weights are cast, not activations."""
        return self.written(self.read(x, y.dtype), y)

    def read(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The bottleneck h = down(x), (..., rank) or (B, rank, *spatial), with dropout; shared where layers share x."""
        if self.spec.kind == "embedding":
            return self.spec.apply(x, self.down_weight().to(dtype).T)
        if self.shared is not None:
            return self.shared.read(self, x, dtype)
        down = self.down_weight()
        if self.drops:
            x, down = self.dropout_masks(x, self.config.dropout), down / (1 - self.config.dropout)  # type: ignore[misc]
        return self.spec.apply(x.to(dtype), down.to(dtype))

    def written(self, h: Tensor, y: Tensor) -> Tensor:
        """`y` + strength * scale * up(h), without a temporary of the output's size."""
        return add_product(self.spec, y, h, self.up_weight().to(y.dtype), self.strength * self.scale)


def add_product(spec: LayerSpec, y: Tensor, h: Tensor, up: Tensor, scale: float) -> Tensor:
    """y + scale * up(h) for `h` of the bottleneck and `up` of `up_shape`."""
    if spec.kind != "conv":
        flat = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), up.T, alpha=scale)  # (tokens, out)
        return flat.view(y.shape)
    if spec.groups > 1:
        return y + spec.pointwise(h * scale, up)
    batched = up.flatten(1).expand(len(y), -1, -1)  # (B, out, rank)
    return torch.baddbmm(y.flatten(2), batched, h.flatten(2), alpha=scale).view(y.shape)


class SharedReads:
    """One product x @ [down_1; down_2; ...]^T for the layers of one module that read the same tensor.

    The first layer of the group computes it for all, and each takes its part. It lives from the first
    to the last call of the group, inside one module: kept longer, it would break activation
    checkpointing. A layer that is called with another tensor reads alone. The group drops the same
    elements of its shared input.
    """

    def __init__(self, adapters: Sequence[LowRank]) -> None:
        self.adapters = list(adapters)
        self._x: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def read(self, adapter: LowRank, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The bottleneck of `adapter` for `x`."""
        place = self.adapters.index(adapter)
        if place == 0:
            self._x, self._parts = x, dict(enumerate(self._read(self.adapters, x, dtype)))
        if self._x is not x or place not in self._parts:
            return self._read([adapter], x, dtype)[0]
        part = self._parts.pop(place)
        if not self._parts:
            self._x = None
        return part

    def _read(self, adapters: Sequence[LowRank], x: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        downs = [adapter.down_weight().to(dtype) for adapter in adapters]
        first = self.adapters[0]
        down = torch.cat(downs) if len(downs) > 1 else downs[0]
        if first.drops:
            x, down = first.dropout_masks(x, first.config.dropout), down / (1 - first.config.dropout)  # type: ignore[misc]
        return F.linear(x.to(dtype), down).split([len(one) for one in downs], dim=-1)


def may_share(adapters: Sequence[Adapter]) -> bool:
    """Whether adapters that read the same tensor may read it together."""
    settings = {(type(one), one.config.dropout, one.spec.kind) for one in adapters}
    return (
        len(adapters) > 1
        and len(settings) == 1
        and isinstance(adapters[0], LowRank)
        and (adapters[0].spec.kind == "linear" and adapters[0].spec.called)
    )
