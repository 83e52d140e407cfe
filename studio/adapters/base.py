"""The adapter contract, and the only place that tells Linear, Conv and Embedding layers apart.

A method is defined by `delta_weight`: dW from W. Everything else (forward, merge, blend, export)
follows from it, and a method overrides `forward` only where an equal path is cheaper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio.errors import ConfigError, nearest


@dataclass(frozen=True)
class LayerSpec:
    """The geometry of one target layer, enough to apply any weight of its shape to an input.

    `weight_shape` is (out, in) for Linear, (out, in / groups, *kernel) for Conv, and
    (vocabulary, width) for Embedding. `dims` is the number of spatial dimensions (0 without).
    """

    kind: str  # "linear" | "conv" | "embedding"
    weight_shape: tuple[int, ...]
    dims: int = 0
    options: dict[str, Any] = field(default_factory=dict)  # of F.conv / F.embedding

    @property
    def in_features(self) -> int:
        return self.weight_shape[0] if self.kind == "embedding" else self.weight_shape[1]

    @property
    def out_features(self) -> int:
        return self.weight_shape[1] if self.kind == "embedding" else self.weight_shape[0]

    @property
    def groups(self) -> int:
        return self.options.get("groups", 1)

    def pointwise(self, h: Tensor, weight: Tensor) -> Tensor:
        """A 1x1 operation behind a bottleneck: `weight` is (out, rank / groups[, 1...])."""
        if self.kind == "conv":
            return _CONV[self.dims](h, weight, groups=self.groups)
        return F.linear(h, weight)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's operation without its bias: `weight` has `weight_shape`."""
        if self.kind == "linear":
            return F.linear(x, weight)
        if self.kind == "embedding":
            return F.embedding(x, weight, **self.options)
        return _CONV[self.dims](_padded(x, self.options), weight, None, **_without_mode(self.options))


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TYPES = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def _padded(x: Tensor, options: dict[str, Any]) -> Tensor:
    """`x` with the padding that F.conv cannot do itself (reflect, replicate, circular)."""
    if options["padding_mode"] == "zeros":
        return x
    return F.pad(x, options["reversed_padding"], mode=options["padding_mode"])


def _without_mode(options: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in options.items() if key not in ("padding_mode", "reversed_padding")}
    if options["padding_mode"] != "zeros":
        rest["padding"] = 0
    return rest


def describe(layer: nn.Module) -> LayerSpec | None:
    """The geometry of `layer`, or None when no adapter can sit on it."""
    if isinstance(layer, nn.Linear):
        return LayerSpec("linear", (layer.out_features, layer.in_features))
    if isinstance(layer, nn.Embedding):
        options = {
            "padding_idx": layer.padding_idx,
            "max_norm": layer.max_norm,
            "norm_type": layer.norm_type,
            "scale_grad_by_freq": layer.scale_grad_by_freq,
            "sparse": layer.sparse,
        }
        return LayerSpec("embedding", (layer.num_embeddings, layer.embedding_dim), 0, options)
    for kind, dims in _CONV_TYPES.items():
        if isinstance(layer, kind):
            options = {
                "stride": layer.stride,
                "padding": layer.padding,
                "dilation": layer.dilation,
                "groups": layer.groups,
                "padding_mode": layer.padding_mode,
                "reversed_padding": layer._reversed_padding_repeated_twice,
            }
            return LayerSpec("conv", tuple(layer.weight.shape), dims, options)
    return None


class WeightView:
    """A base weight that need not be dense: its logical shape, and its values on demand.

    Quantised weights have no usable tensor shape, so methods see this and never a raw tensor.
    """

    def __init__(self, layer: nn.Module, spec: LayerSpec) -> None:
        self._layer = layer
        self.shape = spec.weight_shape

    def dense(self) -> Tensor:
        """The weight as a floating-point tensor of `shape`."""
        return self._layer.weight.detach()


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of one adapter on one layer.

    `rank` >= 1; `alpha` > 0, None meaning the rank; the scale is alpha / rank, or
    alpha / sqrt(rank) with `rslora` (arXiv:2312.03732);
    `dropout` in [0, 1) on the adapter's input; `lr` overrides the run's learning rate.
    """

    method: str = "lora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; it must be 1 or more")
        if self.alpha is not None and self.alpha <= 0:
            raise ConfigError(f"alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if self.method not in METHODS:
            raise ConfigError(f"unknown method '{self.method}'.{nearest(self.method, METHODS)}")

    @property
    def scale(self) -> float:
        """What the product of a low-rank method's factors is multiplied with."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


METHODS: dict[str, type[Adapter]] = {}


class Adapter(nn.Module):
    """One adapter on one layer. Parameters carry the names that kohya and LyCORIS use on disk."""

    method: ClassVar[str]
    strength: float
    dropout_masks: DropoutMasks | None

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__()
        self.spec = spec
        self.config = config
        self.strength = 1.0
        self.dropout_masks = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("method")
        if name is None:
            return
        if name in METHODS:
            raise TypeError(f"method '{name}' is registered twice")
        METHODS[name] = cls

    def delta_weight(self, weight: WeightView) -> Tensor:
        """dW at strength 1, of `weight.shape`: the definition of the method."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, weight: WeightView) -> Tensor:
        """`y` + strength * op(x, dW), where `y` is the base layer's output for `x`."""
        delta = self.delta_weight(weight).to(y.dtype)
        return y + self.strength * self.spec.apply(self.dropped(x), delta)

    def dropped(self, x: Tensor) -> Tensor:
        """`x` with the adapter's input dropout, drawn from data (see `DropoutMasks`) while training."""
        if not self.training or self.config.dropout == 0 or self.dropout_masks is None:
            return x
        return x * self.dropout_masks(x, self.config.dropout)

    def penalty(self) -> Tensor | None:
        """A term of the loss that belongs to the method (AdaLoRA's orthogonality), or None."""
        return None

    def after_step(self, step: int) -> None:
        """Called after each optimizer step (AdaLoRA's budget, Delta-LoRA's base update)."""

    def export(self) -> dict[str, Tensor]:
        """What goes into a file: on-disk suffix -> tensor."""
        raise NotImplementedError

    def reset(self, generator: torch.Generator) -> None:
        """Initialises the parameters from `generator`, so that dW is zero."""
        raise NotImplementedError

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> Adapter:
        """The adapter of one file entry; raises ConfigError where the shapes do not fit `spec`."""
        raise NotImplementedError


class DropoutMasks:
    """Inverted dropout whose masks are a function of (sample key, layer), never of a random stream.

    A recomputed or resumed step draws the same masks, one process and many draw the same, and
    nothing is stored. `keys` holds one integer for each sample of the batch: a hash of run seed,
    sample id and step, set before each forward pass and shared by all layers of an `AdapterSet`.
    """

    def __init__(self, keys: SampleKeys, layer_seed: int) -> None:
        self.keys = keys
        self.layer_seed = layer_seed

    def __call__(self, x: Tensor, rate: float) -> Tensor:
        """A mask of zeros and 1 / (1 - rate), shape of `x`; its first dimension holds whole samples."""
        keys = self.keys.values
        if not keys or x.shape[0] % len(keys):
            raise RuntimeError(f"dropout on {tuple(x.shape)} has {len(keys)} sample keys: call set_keys first")
        rows = (x.shape[0] // len(keys), *x.shape[1:])
        masks = []
        for key in keys:
            generator = torch.Generator(device=x.device).manual_seed((key ^ self.layer_seed) % (1 << 63))
            masks.append(torch.rand(rows, generator=generator, device=x.device) >= rate)
        return torch.cat(masks).to(x.dtype) / (1 - rate)


@dataclass
class SampleKeys:
    """The sample keys of the forward pass under way."""

    values: tuple[int, ...] = ()
