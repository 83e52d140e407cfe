"""LoftQ equals peft's, and comes closer to the weight than its quantisation alone."""

from __future__ import annotations

import pytest
import torch
from quantized_layers import IN, OUT, WRITABLE, bnb_4bit, bnb_int8, linear
from torch import Tensor
from torch.overrides import TorchFunctionMode

from studio.adapters.inits.loftq import loftq
from studio.adapters.quantized import round_trip
from studio.errors import ConfigError


class OnTheCPU(TorchFunctionMode):
    """peft's LoftQ moves everything to a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.to and "cuda" in [str(value) for value in (*args[1:], *kwargs.values())]:
            args, kwargs = args[:1], {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_equals_peft(bits: int, iterations: int) -> None:
    from peft.utils.loftq_utils import loftq_init

    layer = bnb_4bit() if bits == 4 else bnb_int8()
    down, up, quantized = loftq(linear().weight, round_trip(layer), rank=8, iterations=iterations)
    with OnTheCPU():
        theirs, their_down, their_up = loftq_init(linear().weight, bits, 8, iterations)
    for mine, other in ((quantized, theirs), (down, their_down), (up, their_up)):
        assert (mine - other).abs().max() <= 1e-6 + 1e-4 * other.abs().max()


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "fp4", "torchao groups", "zero points 4"])
def test_loftq_comes_closer_to_the_weight(kind: str) -> None:
    weight = linear().weight
    quantize = round_trip(WRITABLE[kind][0]())
    errors = []
    for iterations in (1, 5):
        down, up, quantized = loftq(weight, quantize, rank=16, iterations=iterations)
        assert (down.shape, up.shape) == ((16, IN), (OUT, 16))
        errors.append((weight - quantized - up @ down).norm())
    plain = (weight - quantize(weight)).norm()
    assert errors[1] <= errors[0] < plain


def test_loftq_names_what_is_out_of_range() -> None:
    weight = torch.randn(6, 8)
    with pytest.raises(ConfigError, match="iterations are 0"):
        loftq(weight, torch.clone, rank=2, iterations=0)
    for rank in (0, 7):
        with pytest.raises(ConfigError, match="needs 1..6"):
            loftq(weight, torch.clone, rank=rank)
