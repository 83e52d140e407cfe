"""Quantised bases: what is read equals what the library computes, what is written is read back."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from quantized_layers import (
    IN,
    OUT,
    ROUNDING,
    WRITABLE,
    bnb_4bit,
    bnb_int8,
    linear,
    through_the_layer,
    torchao,
    unquantised_4bit,
    unquantised_int8,
    zero_points,
)
from torch import Tensor, nn

from studio.adapters import AdapterConfig, AdapterPlan, AdapterSet, WeightView, inject
from studio.adapters.quantized import (
    ZeroPointLinear,
    allow_gradients,
    dequantize,
    is_quantized,
    layer_shape,
    requantize,
    round_trip,
)
from studio.errors import ConfigError


def assign(layer: nn.Module, tensors: dict) -> dict:
    former = {name: getattr(layer, name) for name in tensors}
    for name, tensor in tensors.items():
        setattr(layer, name, tensor)
    return former


@pytest.mark.parametrize("kind", WRITABLE)
def test_what_is_read_is_what_the_layer_computes_with(kind: str) -> None:
    layer = WRITABLE[kind][0]()
    before = dequantize(layer)
    assert is_quantized(layer)
    assert layer_shape(layer) == tuple(before.shape) == (OUT, IN)
    assert before.is_floating_point()
    computed = through_the_layer(layer)
    assert torch.equal(before, dequantize(layer)), "the first forward pass moved something"
    assert (before - computed).abs().max() <= ROUNDING.get(kind, 1e-5) * before.abs().max()


@pytest.mark.parametrize("kind", WRITABLE)
def test_writing_what_was_read_changes_nothing(kind: str) -> None:
    make, change = WRITABLE[kind]
    quantize = round_trip(make())
    once = quantize(linear().weight)
    assert (quantize(once) - once).abs().max() <= change * once.abs().max()
    layer = make()
    assert (quantize(dequantize(layer)) - dequantize(layer)).abs().max() <= max(change, 1e-6) * once.abs().max()


@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.parametrize("kind", WRITABLE)
def test_a_written_weight_acts_and_the_former_comes_back_bit_for_bit(kind: str, forward_first: bool) -> None:
    layer = WRITABLE[kind][0]()
    if forward_first:
        through_the_layer(layer)
    wanted = linear().weight + 0.05 * torch.randn(OUT, IN)
    own = dequantize(layer)
    written = requantize(layer, wanted)
    assert torch.equal(own, dequantize(layer)), "writing does not touch the layer"
    former = assign(layer, written)
    error = (dequantize(layer) - wanted).abs().max()
    assert error <= (wanted - round_trip(layer)(wanted)).abs().max() + 1e-6
    assert error < 0.5 * (own - wanted).abs().max() or "4" in kind
    assert (through_the_layer(layer) - dequantize(layer)).abs().max() <= 1e-2 * wanted.abs().max()
    assign(layer, former)
    assert torch.equal(own, dequantize(layer))
    assert (through_the_layer(layer) - own).abs().max() <= 1e-2 * own.abs().max()
    assert torch.equal(own, dequantize(layer))


@pytest.mark.parametrize("make", [unquantised_4bit, unquantised_int8])
def test_a_weight_that_is_not_quantised_yet_is_read_as_it_is(make: Callable[[], nn.Linear]) -> None:
    layer = make()
    assert is_quantized(layer)
    assert torch.equal(dequantize(layer), linear().weight)
    assign(layer, requantize(layer, linear().weight))
    assert torch.equal(dequantize(layer), dequantize(make().to("cpu")))


@pytest.mark.parametrize("nested", [False, True])
def test_the_packing_for_cpus_is_read_and_undone(nested: bool) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer = bnb_4bit(nested=nested)
    plain = dequantize(layer)
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    packed = dequantize(layer)
    assert layer.weight.quant_state.packing_format_for_cpu
    assert packed.dtype == plain.dtype
    assert (plain - packed).abs().max() <= 4e-3 * plain.abs().max()  # the block maxima are bf16 there
    allow_gradients(layer)
    assert torch.equal(packed, dequantize(layer))
    layer.eval()
    assert (through_the_layer(layer) - packed).abs().max() <= 1e-5 * packed.abs().max(), "packed again"


TRAINABLE = [kind for kind in WRITABLE if kind != "torchao dynamic"]


@pytest.mark.parametrize("kind", TRAINABLE)
def test_gradients_pass_through_the_frozen_base_even_after_an_evaluation(kind: str) -> None:
    layer = WRITABLE[kind][0]()
    allow_gradients(layer)
    layer.eval()
    dtype = layer.bias.dtype
    with torch.no_grad():
        layer(torch.randn(2, IN, dtype=dtype))
    layer.train()
    x = torch.randn(3, IN, dtype=dtype, requires_grad=True)
    probe = torch.randn(3, OUT, dtype=dtype)
    (layer(x) * probe).sum().backward()
    expected = probe.float() @ dequantize(layer).float()
    assert x.grad is not None
    assert (x.grad - expected).abs().max() <= 1e-2 * expected.abs().max()
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_activations_that_stop_gradients_are_refused() -> None:
    layer = torchao("Int8DynamicActivationInt8WeightConfig")
    x = torch.randn(3, IN, requires_grad=True)
    assert not layer(x).requires_grad, "torchao has become differentiable here: the refusal can go"
    with pytest.raises(ConfigError, match="Int8WeightOnlyConfig"):
        allow_gradients(layer)


# -- adapters on quantised layers ---------------------------------------------------------------


def two_layers(make: Callable[[], nn.Module]) -> nn.Sequential:
    """Two layers of one format, so that the first one's adapter learns through the second one's base."""
    first, second = make(), make()
    return nn.Sequential(first, nn.Linear(OUT, IN, dtype=first.bias.dtype).requires_grad_(False), second)


def adapted(net: nn.Module, method: str) -> AdapterSet:
    adapters = inject({"net": net}, AdapterPlan(("net.0", "net.2"), config=AdapterConfig(method, rank=4)), {})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapters


def dense_twin(net: nn.Sequential) -> nn.Sequential:
    """The same function with plain layers that hold the dequantised weights."""
    twin = nn.Sequential(*(linear() if is_quantized(layer) else layer for layer in net))
    for layer, plain in zip(net, twin, strict=True):
        if is_quantized(layer):
            plain.weight = nn.Parameter(dequantize(layer).float(), requires_grad=False)
    return twin


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", [kind for kind in TRAINABLE if kind != "torchao bf16"])
def test_adapters_on_a_quantised_base_equal_those_on_its_dense_twin(kind: str, method: str) -> None:
    net = two_layers(WRITABLE[kind][0])
    twin = dense_twin(net)
    adapters, theirs = adapted(net, method), adapted(twin, method)
    x, probe = torch.randn(3, IN), torch.randn(3, OUT)
    net.eval()
    with torch.no_grad():
        net(x)  # a preview in the midst of training
    net.train()
    for model in (net, twin):
        (model(x) * probe).sum().backward()
    tolerance = 2e-2 if kind == "int8 in floating point" else 1e-3
    for mine, other in zip(adapters.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad - other.grad).abs().max() <= tolerance * other.grad.abs().max()


@pytest.mark.parametrize("kind", TRAINABLE)
def test_adapters_merge_into_the_format_and_leave_it_bit_for_bit(kind: str) -> None:
    net = two_layers(WRITABLE[kind][0])
    before = [dequantize(net[i]) for i in (0, 2)]
    adapters = adapted(net, "lora")
    wanted = []
    for weight, (name, adapter) in zip(before, adapters.items(), strict=True):
        target = adapters.targets[name]
        with torch.no_grad():
            wanted.append(round_trip(target.layer)(weight.float() + adapter.delta_weight(WeightView(target))))
    report = adapters.merge()
    net.eval()
    net(torch.randn(2, IN, dtype=net[0].bias.dtype))
    for i, weight in zip((0, 2), wanted, strict=True):
        assert torch.equal(dequantize(net[i]), weight)
    coarse = kind.startswith(("nf4", "fp4", "zero points 4"))
    assert all(0 <= lost < (0.6 if coarse else 0.05) for lost in report.lost.values())
    adapters.unmerge()
    for i, weight in zip((0, 2), before, strict=True):
        assert torch.equal(dequantize(net[i]), weight)


def test_adapters_do_not_train_on_a_base_that_stops_gradients() -> None:
    with pytest.raises(ConfigError, match=r"net\.0.*no gradient"):
        adapted(two_layers(lambda: torchao("Int8DynamicActivationInt8WeightConfig")), "lora")


# -- zero points and GPTQ ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_are_half_a_step_away_at_most(bits: int) -> None:
    base = linear()
    layer = ZeroPointLinear.from_linear(base, bits, group_size=16)
    step = layer.scales.repeat_interleave(16, dim=1)  # (out, in)
    assert ((dequantize(layer) - base.weight).abs() <= step * 0.5001).all()
    assert int(layer.qweight.max()) == 2**bits - 1
    x = torch.randn(2, 5, IN)
    assert torch.allclose(layer(x), x @ dequantize(layer).T + base.bias, atol=1e-6)


def test_groups_of_one_value_are_exact() -> None:
    base = linear()
    with torch.no_grad():
        base.weight.copy_(torch.tensor([0.0, 0.25, -3.0, 1e-3]).repeat(OUT // 4)[:, None].expand(OUT, IN))
    assert torch.equal(dequantize(ZeroPointLinear.from_linear(base)), base.weight)


def test_a_change_that_is_constant_in_a_group_moves_zero_points_only() -> None:
    """What QA-LoRA's merge rests on: zeros -= delta / scales adds delta to the whole group."""
    layer = zero_points()
    before, steps = dequantize(layer), layer.qweight.clone()
    delta = torch.randn(layer.zeros.shape)  # (out, groups)
    layer.zeros -= delta / layer.scales
    assert torch.equal(steps, layer.qweight)
    assert torch.allclose(dequantize(layer), before + delta.repeat_interleave(layer.group_size, 1), atol=1e-5)


def test_zero_points_survive_files_and_name_their_settings() -> None:
    layer = zero_points()
    other = ZeroPointLinear(IN, OUT)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(dequantize(other), dequantize(layer))
    with pytest.raises(ConfigError, match="24 does not divide the layer's 128"):
        ZeroPointLinear(IN, OUT, group_size=24)
    with pytest.raises(ConfigError, match="bits is 9"):
        ZeroPointLinear(IN, OUT, bits=9)


def packed_words(values: Tensor, bits: int, dim: int) -> Tensor:
    """Integers of `bits` bits, 32 / bits of them in each int32 along `dim`, the first in the lowest bits."""
    per_word = 32 // bits
    values = values.long().movedim(dim, -1)
    words = values.reshape(*values.shape[:-1], -1, per_word) << (torch.arange(per_word) * bits)
    return words.sum(-1).to(torch.int32).movedim(-1, dim)  # the sum wraps into the sign bit, as packers do


class QuantLinear(nn.Module):
    """auto-gptq's layout, built by hand: no such package is installed."""

    def __init__(self, bits: int, version: int, group_size: int = 32, act_order: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_features, self.out_features, self.bits = IN, OUT, bits
        groups, top = IN // group_size, 2**bits - 1
        self.steps = torch.randint(top + 1, (IN, OUT))
        self.zero_points = torch.randint(top + 1, (groups, OUT))
        stored = self.zero_points if version == 2 else (self.zero_points - 1) & top
        self.register_buffer("qweight", packed_words(self.steps, bits, 0))
        self.register_buffer("qzeros", packed_words(stored, bits, 1))
        self.register_buffer("scales", torch.rand(groups, OUT).half())
        order = torch.randperm(IN) if act_order else torch.arange(IN)
        self.register_buffer("g_idx", (order // group_size).int())
        if version == 2:
            self.qzero_format = lambda: 2


class ExllamaQuantLinear(QuantLinear):
    """The same shapes with shuffled contents."""


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_layouts_are_read(bits: int, version: int, act_order: bool) -> None:
    layer = QuantLinear(bits, version, act_order=act_order)
    expected = torch.stack(
        [layer.scales[g] * (layer.steps[i] - layer.zero_points[g]) for i, g in enumerate(layer.g_idx)], dim=1
    )
    assert is_quantized(layer)
    assert layer_shape(layer) == (OUT, IN)
    assert torch.equal(dequantize(layer), expected)
    with pytest.raises(ConfigError, match="QuantLinear cannot be written"):
        requantize(layer, expected)


def test_formats_that_cannot_be_read_are_named() -> None:
    unreadable: list[nn.Module] = [ExllamaQuantLinear(4, 1)]
    for name in ("W_q", "qweight", "codes"):
        other = type(f"Other{name}Linear", (nn.Module,), {})()
        other.in_features, other.out_features = IN, OUT
        other.register_buffer(name, torch.zeros(4, 4, dtype=torch.uint8))
        unreadable.append(other)
    integers = linear()
    integers.weight = nn.Parameter(torch.zeros(OUT, IN, dtype=torch.uint8), requires_grad=False)
    for layer in [*unreadable, integers]:
        assert is_quantized(layer)
        for call in (dequantize, round_trip, lambda layer: requantize(layer, torch.zeros(OUT, IN))):
            with pytest.raises(ConfigError, match=type(layer).__name__):
                call(layer)


@pytest.mark.parametrize(
    "layer", [linear(), nn.Conv2d(3, 4, 3), nn.Embedding(5, 4), nn.LayerNorm(4), nn.Sequential(linear()), nn.ReLU()]
)
def test_plain_layers_are_not_quantised(layer: nn.Module) -> None:
    assert not is_quantized(layer)


def test_torchao_formats_that_are_read_only_say_so() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(linear(torch.bfloat16))
    quantization.quantize_(holder, quantization.IntxWeightOnlyConfig(torch.int4))
    weight = dequantize(holder[0])
    assert (weight - through_the_layer(holder[0])).abs().max() <= 1e-2 * weight.abs().max()
    with pytest.raises(ConfigError, match="IntxUnpackedToInt8Tensor cannot be written"):
        requantize(holder[0], weight)


def test_asking_imports_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [bnb_4bit(), bnb_int8(), torchao(), zero_points(), QuantLinear(4, 1)]
    for name in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now raises ImportError
    assert all(is_quantized(layer) for layer in layers)
    for layer in layers[2:]:  # what is not bitsandbytes' own is read without it
        dequantize(layer)
    assert not is_quantized(linear())
