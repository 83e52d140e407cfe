"""A linear layer in every quantised format, from the same weight; they skip the test where their library is missing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from studio.adapters.quantized import ZeroPointLinear

IN, OUT = 128, 64


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)


def unquantised_4bit(kind: str = "nf4", nested: bool = False) -> nn.Linear:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(IN, OUT, quant_type=kind, compress_statistics=nested).requires_grad_(False)
    layer.load_state_dict(linear().state_dict())
    return layer


def bnb_4bit(kind: str = "nf4", nested: bool = False) -> nn.Linear:
    return unquantised_4bit(kind, nested).to("cpu")


def unquantised_int8(**settings) -> nn.Linear:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(IN, OUT, **{"has_fp16_weights": False, **settings}).requires_grad_(False)
    layer.load_state_dict(linear().state_dict())
    return layer


def bnb_int8(**settings) -> nn.Linear:
    return unquantised_int8(**settings).to("cpu")


def torchao(config: str = "Int8WeightOnlyConfig", group: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    quantization = pytest.importorskip("torchao.quantization")
    settings = {"granularity": quantization.PerGroup(group)} if group else {}
    holder = nn.Sequential(linear(dtype))
    quantization.quantize_(holder, getattr(quantization, config)(**settings))
    return holder[0].requires_grad_(False)


def zero_points(bits: int = 4) -> ZeroPointLinear:
    return ZeroPointLinear.from_linear(linear(), bits)


# every format that can be written -> (layer, the largest change of a weight when it is written once more)
WRITABLE: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "nf4": (bnb_4bit, 0.0),
    "nf4 nested": (lambda: bnb_4bit(nested=True), 1e-3),  # the block maxima are rounded once more
    "fp4": (lambda: bnb_4bit("fp4"), 0.0),
    "int8": (bnb_int8, 0.0),
    "int8 outliers": (lambda: bnb_int8(threshold=6.0), 0.0),
    "int8 in floating point": (lambda: bnb_int8(has_fp16_weights=True), 0.0),
    "torchao": (torchao, 1e-6),
    "torchao groups": (lambda: torchao(group=32), 1e-6),
    "torchao bf16": (lambda: torchao(dtype=torch.bfloat16), 1e-6),
    "torchao dynamic": (lambda: torchao("Int8DynamicActivationInt8WeightConfig"), 1e-6),
    "zero points 4": (zero_points, 1e-6),
    "zero points 8": (lambda: zero_points(8), 1e-6),
}

# the largest difference between a weight and what its layer makes of the identity matrix, which some formats round
ROUNDING = {
    "int8": 1e-3,
    "int8 outliers": 1e-3,
    "int8 in floating point": 1e-2,
    "torchao bf16": 1e-2,
    "torchao dynamic": 5e-3,
}


def through_the_layer(layer: nn.Module) -> Tensor:
    """The weight (out, in) as the layer's own forward pass has it."""
    dtype = torch.bfloat16 if layer.bias.dtype == torch.bfloat16 else torch.float32
    with torch.no_grad():
        return (layer(torch.eye(IN, dtype=dtype)) - layer.bias).T
