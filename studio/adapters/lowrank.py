"""What low-rank methods share: dW = scale * up @ down, computed through the rank-sized bottleneck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from studio.adapters.base import Adapter, AdapterConfig
from studio.adapters.layers import LayerSpec, WeightView
from studio.adapters.quantized import ZeroPointLinear
from studio.errors import ConfigError


def down_shape(spec: LayerSpec, rank: int) -> tuple[int, ...]:
    """(rank, in) for Linear and Embedding, (rank, in / groups, *kernel) for Conv, (experts, rank, in) for experts."""
    if spec.kind == "conv":
        return (rank, *spec.weight_shape[1:])
    return (*experts_of(spec), rank, spec.in_features)


def up_shape(spec: LayerSpec, rank: int) -> tuple[int, ...]:
    """(out, rank), with a 1x1 kernel for Conv; a grouped Conv keeps its groups, experts their number, in both."""
    if spec.kind == "conv":
        return (spec.out_features, rank // spec.groups, *(1,) * spec.dims)
    return (*experts_of(spec), spec.out_features, rank)


def experts_of(spec: LayerSpec) -> tuple[int, ...]:
    """(experts,) where each has factors of its own, else ()."""
    return spec.weight_shape[:1] if spec.kind == "experts" else ()


def rank_in(spec: LayerSpec, down: Tensor) -> int:
    """The rank of a `down` of `down_shape`."""
    return down.shape[len(experts_of(spec))]


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` contiguous by rows, or by columns where `like` is: the layout decides how products round."""
    by_columns = like.ndim == 2 and like.stride(0) < like.stride(1)
    return tensor.T.contiguous().T if by_columns else tensor.contiguous()


class LowRank(Adapter):
    """A method whose dW is scale * up @ down: it gives `down_weight`, `up_weight` and `scale`.

    `down_weight` has the shape of `down_shape`, `up_weight` that of `up_shape`; both may be computed.
    Written to files as a LoRA of these, unless a method says otherwise.
    """

    shared: SharedReads | None = None
    rank_dims: ClassVar[Mapping[str, int]] = {}
    """The tensors whose rank changes while training, and the dimension that is it: a loaded state decides it."""

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
        if self.spec.kind == "experts":
            return self.scale * (up @ down)  # (experts, out, in)
        groups = self.spec.groups
        rank = down.shape[0] // groups
        up = up.reshape(groups, self.spec.out_features // groups, rank)
        down = down.reshape(groups, rank, -1)  # (groups, rank / groups, in / groups * kernel)
        return self.scale * (up @ down).reshape(weight.shape)

    @property
    def low_rank(self) -> bool:
        return self.spec.groups == 1 and self.spec.kind != "experts"

    def product(self, weight: WeightView) -> tuple[Tensor, Tensor, float]:
        up, down = self.up_weight(), self.down_weight()
        return (up.flatten(1), down.flatten(1), self.scale) if self.spec.dims else (up, down, self.scale)

    def terms(self, weight: WeightView) -> Mapping[str, Tensor] | None:
        """What to add to a `ZeroPointLinear`'s zeros, where dW is constant inside its groups (QA-LoRA)."""
        layer = weight.target.layer
        if not (isinstance(layer, ZeroPointLinear) and self.low_rank):
            return None
        up, down = self.factors(weight)
        groups = down.unflatten(1, (-1, layer.group_size))  # (rank, groups, group_size)
        if not torch.equal(groups, groups[..., :1].expand_as(groups)):
            return None
        return {"zeros": -(up @ groups[..., 0]) / layer.scales}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """With the saved ranks of `rank_dims`, and the layout that the tensors have."""
        for name, dim in self.rank_dims.items():
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is None or saved.ndim != own.ndim or saved.shape[dim] == own.shape[dim]:
                continue
            shape = list(own.shape)
            shape[dim] = saved.shape[dim]
            own.data = laid_out(own.new_zeros(shape), own)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, y: Tensor, base: Tensor | None, weight: WeightView) -> Tensor:
        """Through the bottleneck, in the dtype of the base's output: weights are cast, not activations."""
        return self.written(self.read(x, y.dtype), y)

    def read(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The bottleneck h = down(x), (..., rank) or (B, rank, *spatial), with dropout; shared where layers share x."""
        if self.spec.kind == "embedding":
            return self.spec.apply(x, self.down_weight().to(dtype).T)
        if self.shared is not None and self.gate.rows is None:  # rows of x are another tensor in each layer
            return self.shared.read(self, x, dtype)
        down = self.down_weight().to(dtype)
        if self.spec.kind == "linear":
            return _linear(self, x.to(dtype), down)
        return self.spec.apply(self.dropped(x.to(dtype)), down)

    def written(self, h: Tensor, y: Tensor) -> Tensor:
        """`y` + strength * scale * up(h), without a temporary of the output's size."""
        return add_product(self.spec, y, h, self.up_weight().to(y.dtype), self.strength * self.scale)

    def passes(self, tokens: int) -> bool:
        """Whether a training step had better go through the weight (see through.py): it then costs less."""
        return type(self).forward is LowRank.forward and self.spec.kind == "linear" and tokens > self.spec.in_features

    @property
    def magnitude(self) -> Tensor | None:
        """The lengths that the rows of W + scale * up @ down are brought to, (out, 1), or None for no such thing."""
        return None

    def export(self) -> dict[str, Tensor]:
        """`alpha` carries the scale, rsLoRA's too: readers compute alpha / rank."""
        down, up = self.down_weight().detach(), self.up_weight().detach()
        return {
            "lora_down.weight": down,
            "lora_up.weight": up.contiguous(),
            "alpha": torch.tensor(self.scale * rank_in(self.spec, down)),
        }


def add_product(spec: LayerSpec, y: Tensor, h: Tensor, up: Tensor, scale: float) -> Tensor:
    """y + scale * up(h) for `h` of the bottleneck and `up` of `up_shape`."""
    if spec.kind != "conv":
        if y.ndim != 3:
            return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), up.T, alpha=scale).view(y.shape)  # (tokens, out)
        batched = up.T[None] if len(y) == 1 else up.T.expand(len(y), -1, -1)  # (B, rank, out)
        if torch.compiler.is_compiling() or y._is_view():
            return torch.baddbmm(y, h, batched, alpha=scale)
        return y.baddbmm_(h, batched, alpha=scale)  # nobody keeps y: it is the output of a layer that does not train
    if spec.groups > 1:
        return y + spec.pointwise(h * scale, up)
    batched = up.flatten(1).expand(len(y), -1, -1)  # (B, out, rank)
    return torch.baddbmm(y.flatten(2), batched, h.flatten(2), alpha=scale).view(y.shape)


class SharedReads:
    """One product x @ [down_1; down_2; ...]^T for the layers of one module that read the same tensor.

    The first layer of the group computes it for all, and each takes its part. It lives from the first
    to the last call of the group, inside one module: kept longer, it would break activation
    checkpointing. A layer that is called with another tensor reads alone. The group drops the same
    elements of its shared input. Copies and files hold no product.
    """

    def __init__(self, adapters: Sequence[LowRank]) -> None:
        self.adapters = list(adapters)
        self._x: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"adapters": self.adapters, "_x": None, "_parts": {}}

    def read(self, adapter: LowRank, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The bottleneck of `adapter` for `x`."""
        place = self.adapters.index(adapter)
        if place == 0:
            acting = [place for place, one in enumerate(self.adapters) if one.factor]  # the others won't ask
            parts = self._read([self.adapters[place] for place in acting], x, dtype)
            self._x, self._parts = x, dict(zip(acting, parts, strict=True))
        if self._x is not x or place not in self._parts:
            return self._read([adapter], x, dtype)[0]
        part = self._parts.pop(place)
        if not self._parts:
            self._x = None
        return part

    def _read(self, adapters: Sequence[LowRank], x: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        downs = [adapter.down_weight().to(dtype) for adapter in adapters]
        if len(downs) == 1:
            return [_linear(adapters[0], x.to(dtype), downs[0])]
        return _linear(adapters[0], x.to(dtype), torch.cat(downs)).split([len(one) for one in downs], dim=-1)


def _linear(adapter: Adapter, x: Tensor, down: Tensor) -> Tensor:
    """F.linear(x, down) under the adapter's dropout."""
    if adapter.drops:
        return adapter.dropout_masks.linear(x, down, adapter.config.dropout)  # type: ignore[union-attr]
    return F.linear(x, down)


def may_share(adapters: Sequence[Adapter]) -> bool:
    """Whether adapters that read the same tensor may read it together."""
    settings = {(type(one), one.config.dropout, one.spec.kind) for one in adapters}
    return (
        len(adapters) > 1
        and len(settings) == 1
        and isinstance(adapters[0], LowRank)
        and (adapters[0].spec.kind == "linear" and adapters[0].spec.called)
    )
