"""What methods share that map channels: W' = M W on a layer's outputs, or W' = W M on its inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from studio.adapters.base import Adapter
from studio.adapters.layers import WeightView, wide


class ChannelMap(Adapter):
    """A method with a linear map M of channels: it gives `change`, which is M - I.

    On the output, M acts on what the layer has computed; on the input (`on_input`), on what it reads.
    Neither needs a product with W, or its values.
    """

    acts_on_bias = False
    """Whether an output map takes the layer's bias along: M (W x + b) instead of M W x + b."""

    def change(self, dtype: torch.dtype, strength: float = 1, transposed: bool = False) -> Callable[[Tensor], Tensor]:
        """v -> strength * (M v - v), or with M^T, for `v` of `dtype` with channels last: (..., channels)."""
        raise NotImplementedError

    @property
    def within_groups(self) -> bool:
        """Whether M mixes no channels of different groups of a convolution."""
        return self.spec.groups == 1

    @property
    def _channel_dim(self) -> int:
        """The dimension of an activation that holds the channels: before those of space."""
        return -1 - self.spec.dims

    def delta_weight(self, weight: WeightView) -> Tensor:
        dense, groups = wide(weight.dense()), self.spec.groups
        if not self.on_input:
            rows = 1 if self.spec.kind == "embedding" else 0  # where the outputs are
            return self.change(dense.dtype)(dense.movedim(rows, -1)).movedim(-1, rows)
        split = dense.unflatten(0, (groups, -1))  # (groups, out / groups, in / groups, *kernel)
        last = split.movedim((0, 2), (-2, -1)).flatten(-2)  # (out / groups, *kernel, in)
        changed = self.change(dense.dtype, transposed=True)(last).unflatten(-1, (groups, -1))
        return changed.movedim((-2, -1), (0, 2)).flatten(0, 1)

    def delta_bias(self, weight: WeightView) -> Tensor | None:
        if weight.bias is None or self.on_input or not self.acts_on_bias:
            return None
        bias = wide(weight.bias)
        return self.change(bias.dtype)(bias)

    def forward(self, x: Tensor, y: Tensor, base: Tensor | None, weight: WeightView) -> Tensor:
        """From the layer's own output where it is at hand."""
        if base is None or self.on_input or self.drops or not self.within_groups:
            return super().forward(x, y, base, weight)
        change = self.change(y.dtype, self.strength)
        delta = change(base.movedim(self._channel_dim, -1)).movedim(-1, self._channel_dim)
        if weight.bias is not None and not self.acts_on_bias:
            delta = delta - self.spec.over_outputs(change(weight.bias.to(y.dtype)))
        return y + delta

    def input_delta(self, x: Tensor) -> Tensor:
        return self.change(x.dtype)(x.movedim(self._channel_dim, -1)).movedim(-1, self._channel_dim)
