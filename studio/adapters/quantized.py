"""Reading and writing the weight of a quantised linear layer, each in its own format.

| format | weight (out, in) | written |
|---|---|---|
| bitsandbytes 4-bit (QLoRA, arXiv:2305.14314) | code[q] * absmax of its block | yes |
| bitsandbytes int8 (LLM.int8(), arXiv:2208.07339) | q * row maximum / 127 | yes |
| torchao | the tensor's own `dequantize` | int8 only |
| `ZeroPointLinear` | scales * (q - zeros) | yes |
| GPTQ's packed layout (arXiv:2210.17323) | scales * (q - zeros), integer zeros | no |

A format is told by class names and attributes, so that no library is imported to ask.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio.errors import ConfigError

# the tensors of GPTQ and AWQ, HQQ, AQLM, compressed-tensors, and fp8 with block scales
PACKED_NAMES = frozenset(("qweight", "W_q", "codes", "weight_packed", "weight_scale_inv"))


@dataclass(frozen=True)
class Format:
    """How one library stores a weight: `read(layer)` gives (out, in), `write(layer, weight)` what to assign.

    `read` needs nothing of the layer but what `write` returns.
    """

    matches: Callable[[Any], bool]
    read: Callable[[Any], Tensor]
    write: Callable[[Any, Tensor], dict[str, Any]]


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight is stored in a quantised format, readable here or not."""
    return _format_of(layer) is not None or _is_packed(layer)


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, whatever the shape of its stored weight."""
    return layer.out_features, layer.in_features


@torch.no_grad()
def dequantize(layer: nn.Module) -> Tensor:
    """The weight that the layer computes with, (out, in), as a new floating-point tensor of the format's dtype.

    Raises ConfigError where the format cannot be read.
    """
    return _known_format(layer).read(layer)


@torch.no_grad()
def requantize(layer: nn.Module, weight: Tensor) -> dict[str, Any]:
    """Attribute name -> what to assign on `layer`, so that it computes with `weight` (out, in) in its own format.

    The layer itself stays as it is: assigning the former attributes again restores it bit for bit.
    Raises ConfigError where the format cannot be written.
    """
    return _known_format(layer).write(layer, weight.detach())


def round_trip(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that quantises a weight (out, in) into the layer's own format and reads it back."""
    form = _known_format(layer)

    @torch.no_grad()
    def quantize(weight: Tensor) -> Tensor:
        return form.read(SimpleNamespace(**form.write(layer, weight.detach())))

    return quantize


def allow_gradients(layer: nn.Module) -> None:
    """Makes sure that gradients pass through a quantised layer to its input, before adapters train.

    On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit weight at its first evaluation without
    gradients, and no gradient passes the packed form afterwards; the repacking is switched off.
    Raises ConfigError for torchao weights with quantised activations, which pass no gradient at all.
    """
    if _weight_class(layer) == "Params4bit":
        layer.support_avx512bf16_for_cpu = False
        layer.weight.data, layer.weight.quant_state = _plain_4bit(layer.weight.data, _state_of_4bit(layer))
    if getattr(layer._parameters.get("weight"), "act_quant_kwargs", None) is not None:
        raise ConfigError(
            f"a {type(layer).__name__} with torchao's dynamic int8 activations passes no gradient to the layers "
            "before it: quantise the base with Int8WeightOnlyConfig to train on it"
        )


def _format_of(layer: nn.Module) -> Format | None:
    return next((form for form in FORMATS if form.matches(layer)), None)


def _known_format(layer: nn.Module) -> Format:
    form = _format_of(layer)
    if form is None:
        raise ConfigError(
            f"the weight of a {type(layer).__name__} is in a format that cannot be read here. Load the base in "
            "bitsandbytes 4-bit or 8-bit, torchao or plain GPTQ, or choose a method that needs no base weight (lora)"
        )
    return form


def _is_packed(layer: nn.Module) -> bool:
    """Integers where a linear layer has its weight: a format that no entry of `FORMATS` knows."""
    if not hasattr(layer, "in_features"):
        return False
    weight = layer._parameters.get("weight")
    integers = weight is not None and not weight.is_floating_point()
    return integers or not PACKED_NAMES.isdisjoint([*layer._parameters, *layer._buffers])


# -- bitsandbytes -----------------------------------------------------------------------------


def _weight_class(layer: nn.Module) -> str:
    return type(layer._parameters.get("weight")).__name__


def _state_of_4bit(layer: Any) -> Any:
    """The quantisation state: on the weight, or, after FSDP rebuilt the parameter, on the layer."""
    state = layer.weight.quant_state
    return getattr(layer, "quant_state", None) if state is None else state


def _plain_4bit(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Data and state in the format that a gradient can pass.

    The packed form's own numbers are kept: bitsandbytes' way back would quantise the block maxima once more.
    """
    if not getattr(state, "packing_format_for_cpu", False):
        return data, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    plain = copy.copy(state)
    plain.original_nested = False
    plain.absmax = state.absmax.T.reshape(-1).float()  # (in / block, out) -> (out * in / block,)
    return _convert_weight_packed_for_cpu_inverse(data, plain)


def _read_4bit(layer: Any) -> Tensor:
    if not layer.weight.bnb_quantized:  # not moved to a device yet, which is when bitsandbytes quantises
        return layer.weight.data.clone()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*_plain_4bit(layer.weight.data, _state_of_4bit(layer)))


def _write_4bit(layer: Any, weight: Tensor) -> dict[str, Any]:
    from bitsandbytes.nn import Params4bit

    old, state = layer.weight, _state_of_4bit(layer)
    dtype = old.dtype if state is None else getattr(state, "original_dtype", state.dtype)
    kept = {name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
    new = Params4bit(weight.to(dtype), requires_grad=False, **kept).to(old.device)
    return {"weight": new}


def _read_int8(layer: Any) -> Tensor:
    weight = layer.weight
    if weight.dtype != torch.int8:  # not quantised yet, or kept in floating point with `has_fp16_weights`
        return weight.data.clone()
    from bitsandbytes.functional import int8_vectorwise_dequant

    # the first forward pass moves the row maxima from the weight to the layer's state
    return int8_vectorwise_dequant(weight.data, layer.state.SCB if weight.SCB is None else weight.SCB)


def _write_int8(layer: Any, weight: Tensor) -> dict[str, Any]:
    from bitsandbytes.nn import Int8Params

    old = layer.weight
    state = copy.copy(layer.state)
    state.CB = state.SCB = None  # else the layer would go on with the old integers
    if old.has_fp16_weights:
        new = Int8Params(weight.to(old.device, old.dtype), requires_grad=old.requires_grad, has_fp16_weights=True)
    else:  # quantises on the way from the CPU only
        new = Int8Params(weight.cpu(), requires_grad=False).to(old.device)
    return {"weight": new, "state": state}


# -- torchao ----------------------------------------------------------------------------------


def _is_torchao(layer: nn.Module) -> bool:
    """A tensor subclass of torchao that can decode itself; int4 for GPUs cannot."""
    kind = type(layer._parameters.get("weight"))
    return kind.__module__.startswith("torchao") and kind.dequantize is not Tensor.dequantize


def _read_torchao(layer: Any) -> Tensor:
    """int8 in fp32, not rounded to the dtype that it stands for: its forward pass does not round either."""
    weight = layer.weight
    return weight.dequantize(torch.float32) if type(weight).__name__ == "Int8Tensor" else weight.dequantize()


def _write_torchao(layer: Any, weight: Tensor) -> dict[str, Any]:
    """int8 with the block's scale where that still fits, else one that maps its extremes onto -128 and 127.

    torchao's own choice, max |w| / 127.5, would shrink a weight by 0.4% each time it is written.
    """
    old = layer.weight
    if type(old).__name__ != "Int8Tensor":
        raise ConfigError(
            f"a {type(old).__name__} cannot be written: merge into the base before it is quantised, or use int8"
        )
    low, high = (-64, 63) if old.reduce_range else (-128, 127)
    (out, width), (rows, columns) = weight.shape, old.block_size
    blocks = weight.to(old.device).float().reshape(out // rows, rows, width // columns, columns)
    scale = torch.maximum(blocks.amax(dim=(1, 3)) / high, blocks.amin(dim=(1, 3)) / low)  # (blocks of out, of in)
    scale = scale.clamp(min=torch.finfo(torch.float32).eps)
    change = scale / old.scale
    scale = torch.where((change > 0.98) & (change < 1.005), old.scale.to(scale), scale)
    steps = torch.round(blocks / scale[:, None, :, None]).clamp(low, high).to(torch.int8)
    new = type(old)(
        steps.reshape(out, width),
        scale,
        old.block_size,
        old.dtype,
        zero_point=torch.zeros_like(scale, dtype=torch.int8),
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        act_pre_scale=old.act_pre_scale,
        act_quant_kwargs=old.act_quant_kwargs,
        reduce_range=old.reduce_range,
    )
    return {"weight": nn.Parameter(new, requires_grad=False)}


# -- zero points ------------------------------------------------------------------------------


class ZeroPointLinear(nn.Module):
    """A linear layer of small integers with a scale and a floating-point zero point for each group of inputs.

    W = scales * (qweight - zeros), with `qweight` (out, in) uint8 of `bits` bits, `scales` and `zeros`
    (out, in / group_size). A floating-point zero point is what lets QA-LoRA (arXiv:2309.14717) merge exactly.
    """

    def __init__(
        self, in_features: int, out_features: int, bits: int = 4, group_size: int = 32, bias: bool = True
    ) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise ConfigError(f"bits is {bits}; it must be in 1..8")
        if group_size < 1 or in_features % group_size:
            raise ConfigError(f"group_size {group_size} does not divide the layer's {in_features} inputs")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        groups = (out_features, in_features // group_size)
        self.register_buffer("qweight", torch.zeros(out_features, in_features, dtype=torch.uint8))
        self.register_buffer("scales", torch.ones(groups))
        self.register_buffer("zeros", torch.zeros(groups))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int = 4, group_size: int = 32) -> ZeroPointLinear:
        """`linear` with its weight rounded to the nearest of 2^bits steps between the extremes of each group."""
        layer = cls(linear.in_features, linear.out_features, bits, group_size, bias=linear.bias is not None)
        layer.to(linear.weight.device)
        for name, tensor in requantize(layer, linear.weight).items():
            setattr(layer, name, tensor)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _read_zero_points(self).to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


def _read_zero_points(layer: Any) -> Tensor:
    out, groups = layer.scales.shape
    steps = layer.qweight.reshape(out, groups, -1) - layer.zeros[..., None]  # (out, groups, group_size)
    return (layer.scales[..., None] * steps).reshape(out, -1)


def _write_zero_points(layer: ZeroPointLinear, weight: Tensor) -> dict[str, Any]:
    top = 2**layer.bits - 1
    groups = weight.to(layer.scales).reshape(*layer.scales.shape, layer.group_size)
    low, high = groups.amin(-1), groups.amax(-1)  # (out, groups)
    flat = torch.where(low == 0, torch.ones_like(low), low.abs())  # a constant group has no range to divide
    scales = torch.where(high > low, (high - low) / top, flat)
    zeros = -low / scales
    steps = torch.round(groups / scales[..., None] + zeros[..., None]).clamp(0, top)
    return {"qweight": steps.to(torch.uint8).reshape(weight.shape), "scales": scales, "zeros": zeros}


# -- GPTQ's packed layout ---------------------------------------------------------------------


def _is_gptq(layer: Any) -> bool:
    """`qweight` (in * bits / 32, out) int32 beside `qzeros`, `scales` and `g_idx`: auto-gptq's and gptqmodel's layout.

    Exllama kernels keep these shapes and shuffle the contents, others change the shapes: neither is readable.
    """
    qweight = layer._buffers.get("qweight")
    if qweight is None or qweight.dtype != torch.int32 or not hasattr(layer, "g_idx"):
        return False
    origin = f"{type(layer).__module__}.{type(layer).__name__}".lower()
    packed = (layer.in_features * layer.bits // 32, layer.out_features)
    return layer.bits in (2, 4, 8) and tuple(qweight.shape) == packed and "exllama" not in origin


def _read_gptq(layer: Any) -> Tensor:
    top = 2**layer.bits - 1
    shifts = torch.arange(0, 32, layer.bits, dtype=torch.int32, device=layer.qweight.device)
    steps = (layer.qweight[:, None, :] >> shifts[:, None]) & top  # (in / per word, per word, out)
    zeros = (layer.qzeros[:, :, None] >> shifts) & top  # (groups, out / per word, per word)
    if not hasattr(layer, "qzero_format") or layer.qzero_format() == 1:
        zeros = (zeros + 1) & top  # version 1 of the format stores the zero point less one
    steps, zeros = steps.reshape(layer.in_features, -1), zeros.reshape(-1, layer.out_features)
    group = layer.g_idx.long()  # (in,)
    return (layer.scales[group] * (steps - zeros[group])).T.contiguous()


def _write_gptq(layer: nn.Module, weight: Tensor) -> dict[str, Any]:
    raise ConfigError(
        f"the weight of a {type(layer).__name__} cannot be written: its zero points are integers, chosen with its "
        "calibration data. Keep the adapter beside it, or merge into the base before it is quantised"
    )


FORMATS = (
    Format(lambda layer: _weight_class(layer) == "Params4bit", _read_4bit, _write_4bit),
    Format(lambda layer: _weight_class(layer) == "Int8Params", _read_int8, _write_int8),
    Format(_is_torchao, _read_torchao, _write_torchao),
    Format(lambda layer: isinstance(layer, ZeroPointLinear), _read_zero_points, _write_zero_points),
    Format(_is_gptq, _read_gptq, _write_gptq),
)
