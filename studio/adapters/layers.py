"""Layers as adapters see them: the only place that tells Linear, Conv, Embedding and the others apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from studio.adapters.quantized import dequantize, is_quantized, layer_shape, requantize
from studio.errors import ConfigError


@dataclass(frozen=True)
class LayerSpec:
    """The geometry of one target, enough to apply any weight of its shape to an input.

    `weight_shape` is (out, in) for "linear", (out, in / groups, *kernel) for "conv",
    (vocabulary, width) for "embedding", (width,) for "norm" and (experts, out, in) for "experts".
    `dims` is the number of spatial dimensions (0 without). `called` tells whether the target is a layer
    that is called with an input: an adapter then adds to its output. A norm, or a parameter that its
    module uses itself, is given an effective value instead. `transposed`: the tensor is stored as
    (..., in, out), as in transformers' Conv1D. `scale`: what an embedding multiplies its rows with, as
    in Gemma.
    """

    kind: str
    weight_shape: tuple[int, ...]
    dims: int = 0
    bias: bool = False
    called: bool = True
    transposed: bool = False
    scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)  # of F.conv / F.embedding

    @property
    def in_features(self) -> int:
        return self.weight_shape[{"embedding": 0, "experts": 2}.get(self.kind, 1)]

    @property
    def out_features(self) -> int:
        return self.weight_shape[1 if self.kind in ("embedding", "experts") else 0]

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
            rows = F.embedding(x, weight, **self.options)
            return rows if self.scale == 1 else rows * self.scale
        return _CONV[self.dims](_padded(x, self.options), weight, None, **_without_mode(self.options))

    def over_outputs(self, values: Tensor) -> Tensor:
        """`values` (out,) in the shape that multiplies or adds to the layer's output."""
        return values.reshape(-1, *(1,) * self.dims)

    def rows(self, values: Tensor) -> Tensor:
        """`values` (out,) in the shape that multiplies the rows of the weight; columns for "embedding"."""
        return values if self.kind == "embedding" else values.reshape(-1, *(1,) * (len(self.weight_shape) - 1))


_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
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
    bias = getattr(layer, "bias", None) is not None
    if isinstance(layer, nn.Linear) or is_quantized(layer):
        return LayerSpec("linear", layer_shape(layer), bias=bias)
    if isinstance(layer, nn.Embedding):
        options = {
            "padding_idx": layer.padding_idx,
            "max_norm": layer.max_norm,
            "norm_type": layer.norm_type,
            "scale_grad_by_freq": layer.scale_grad_by_freq,
            "sparse": layer.sparse,
        }
        scale = getattr(layer, "scalar_embed_scale", getattr(layer, "embed_scale", 1.0))
        shape = (layer.num_embeddings, layer.embedding_dim)
        return LayerSpec("embedding", shape, options=options, scale=float(scale))
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
            return LayerSpec("conv", tuple(layer.weight.shape), dims, bias, options=options)
    weight = layer._parameters.get("weight")
    if type(layer).__name__ == "Conv1D" and weight is not None:  # transformers'; not imported for one name
        return LayerSpec("linear", (weight.shape[1], weight.shape[0]), bias=bias, transposed=True)
    if type(layer).__name__.endswith("Norm") and weight is not None and weight.ndim == 1:
        return LayerSpec("norm", tuple(weight.shape), bias=bias, called=False)
    return None


def describe_parameter(layer: nn.Module, name: str) -> LayerSpec | None:
    """The geometry of a parameter that `layer` uses itself: a fused matrix, or the weights of several experts.

    `is_transposed` is transformers' mark of experts that are stored as (experts, in, out).
    """
    parameter = layer._parameters[name]
    if parameter is None or name.endswith("bias") or isinstance(layer, nn.RNNBase | ParametrizationList):
        return None  # a recurrent layer computes with copies, a parametrisation with what its layer shows
    if parameter.ndim == 2:
        return LayerSpec("linear", tuple(parameter.shape), called=False)
    if parameter.ndim == 3 and len(parameter) > 1:  # (1, tokens, width) is no weight
        transposed = bool(getattr(layer, "is_transposed", False))
        stored = parameter.mT if transposed else parameter
        return LayerSpec("experts", tuple(stored.shape), called=False, transposed=transposed)
    return None


@dataclass(frozen=True)
class Target:
    """One place for an adapter: a layer's weight, or a parameter of a module that uses it itself.

    `user` is the module that uses the parameter of a layer which is never called (`nn.MultiheadAttention`, its
    `out_proj`), or None where `layer` does. `tied` names the targets that hold the very same tensor: an adapter
    acts on its own target alone, and merging unties it.
    """

    name: str
    layer: nn.Module
    spec: LayerSpec
    parameter: str = "weight"
    user: nn.Module | None = None
    tied: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        own = (*self.layer._parameters.values(), *self.layer._buffers.values())
        return next(tensor.device for tensor in own if tensor is not None)


class WeightView:
    """A base weight that need not be dense: its logical shape, and its values on demand.

    Quantised weights have no usable tensor shape, so methods see this and never a raw tensor. While
    adapters are merged into the layer, it still shows the layer's own weight.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.shape = target.spec.weight_shape
        self.saved: dict[str, Any] = {}  # the layer's own tensors while something is merged into it
        self._memo: dict[str, tuple[Any, Tensor]] = {}

    def dense(self) -> Tensor:
        """The weight as a floating-point tensor of `shape`."""
        with self._as_it_was():
            return self.stored()

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias, (out,), or None."""
        bias = self.saved.get("bias", getattr(self.target.layer, "bias", None))
        return None if bias is None else bias.detach()

    def memo(self, name: str, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """`compute(dense weight)`, computed again only when the weight has changed."""
        stored = self.saved.get(self.target.parameter, getattr(self.target.layer, self.target.parameter, None))
        now = None if stored is None else version(stored)
        found = self._memo.get(name)
        if found is None or found[0] != now:
            with kept(self.target.device):
                found = self._memo[name] = (now, compute(self.dense()))
        return found[1]

    def stored(self) -> Tensor:
        """What the layer computes with now, as a floating-point tensor of `shape`."""
        layer = self.target.layer
        if is_quantized(layer):
            return dequantize(layer)
        weight = getattr(layer, self.target.parameter).detach()
        return weight.mT if self.target.spec.transposed else weight

    def as_stored(self, weight: Tensor) -> Tensor:
        """`weight` in the layout and dtype of the layer's own tensor, where that is not quantised."""
        own = getattr(self.target.layer, self.target.parameter)
        return (weight.mT.contiguous() if self.target.spec.transposed else weight).to(own.dtype)

    def in_format(self, weight: Tensor, bias: Tensor | None) -> Mapping[str, Any]:
        """The layer's tensors by name, in its own format and dtype, with these values."""
        layer, parameter = self.target.layer, self.target.parameter
        if is_quantized(layer):
            tensors = dict(requantize(layer, weight))
        elif parameter in layer._parameters or parameter in layer._buffers:
            tensors = {parameter: nn.Parameter(self.as_stored(weight), requires_grad=False)}
        else:
            raise ConfigError(
                f"{self.target.name}: its {parameter} is computed in each call, so nothing can be merged into it: take "
                "the parametrisation off first (torch.nn.utils.parametrize.remove_parametrizations)"
            )
        if bias is not None:
            like = layer.bias if layer.bias is not None else weight
            tensors["bias"] = nn.Parameter(bias.to(like.dtype), requires_grad=False)
        return tensors

    def put(self, tensors: Mapping[str, Any]) -> None:
        """Gives the layer `tensors`; its own are kept for `restore`."""
        for name in tensors:
            self.saved.setdefault(name, getattr(self.target.layer, name))
        _assign(self.target.layer, tensors)

    def add(self, terms: Sequence[tuple[Mapping[str, Tensor], float]]) -> None:
        """Gives the layer its own tensors plus strength * term, by name; `terms` holds (terms, strength) pairs."""
        for name in terms[0][0]:
            total = getattr(self.target.layer, name).detach().clone()
            for term, strength in terms:
                total += strength * term[name].to(total.dtype)
            self.put({name: total})

    def restore(self) -> None:
        """Gives the layer its own tensors back: the very objects that it had."""
        _assign(self.target.layer, self.saved)
        self.saved.clear()

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        now = {name: getattr(self.target.layer, name) for name in self.saved}
        _assign(self.target.layer, self.saved)
        try:
            yield
        finally:
            _assign(self.target.layer, now)


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """For values that outlive the pass under way: without gradients, and whatever its autocast or inference mode."""
    with ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
        if autocasts(device):
            modes.enter_context(torch.autocast(device.type, enabled=False))
        modes.enter_context(torch.no_grad())
        yield


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on there; it knows no meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in fp32, or in float64 where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


_PLAIN = (Tensor, nn.Parameter)


def version(tensor: Tensor) -> tuple[int, int, torch.Size]:
    """Changes whenever the tensor's values do: by assignment or in place."""
    if type(tensor) not in _PLAIN:
        tensor = getattr(tensor, "qdata", tensor)  # a torchao tensor has no memory of its own
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version, tensor.shape


def _assign(layer: nn.Module, values: Mapping[str, Any]) -> None:
    """Assigns whatever the kind: a tensor as it is, also over a parameter, and a quantisation state."""
    for name, value in values.items():
        store = next((store for store in (layer._buffers, layer._parameters) if name in store), layer.__dict__)
        store[name] = value
