"""LoHa, LoKr and Tucker LoCon against LyCORIS: the same tensors in a file, the same outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import Net, close, randomise
from lycoris.functional.general import factorization as lycoris_factorization
from lycoris.modules import get_module, make_module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from studio.adapters import (
    AdapterConfig,
    AdapterPlan,
    AdapterSet,
    WeightView,
    attach_adapters,
    describe,
    inject,
    named_targets,
)
from studio.adapters.base import method_of
from studio.adapters.methods import LoKr, Tucker
from studio.adapters.methods.lokr import factorization
from studio.errors import ConfigError

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(48, 32), (3, 5, 48)),
    "conv1d": (lambda: nn.Conv1d(24, 32, 3, padding=1), (2, 24, 7)),
    "conv2d": (lambda: nn.Conv2d(24, 32, 3, stride=2, padding=1), (2, 24, 6, 6)),
    "conv2d 1x1": (lambda: nn.Conv2d(24, 32, 1, bias=False), (2, 24, 4, 4)),
    "conv2d dilated": (lambda: nn.Conv2d(24, 32, (3, 2), dilation=2), (2, 24, 6, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(48, 32, 3, groups=2), (2, 48, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(24, 16, 3, padding=1), (1, 24, 3, 3, 3)),
}
MODULES = {"loha": LohaModule, "lokr": LokrModule, "tucker": LoConModule}
SETTINGS: list[tuple[str, int, dict[str, Any]]] = [
    ("loha", 2, {}),  # cheaper through the bottleneck of rank^2
    ("loha", 8, {}),  # cheaper through dW
    ("loha", 3, {"tucker": True}),
    ("lokr", 2, {}),
    ("lokr", 9, {}),  # too large a rank for low-rank factors
    ("lokr", 2, {"full_matrix": True}),
    ("lokr", 1, {"decompose_both": True}),
    ("lokr", 2, {"tucker": True}),
    ("lokr", 1, {"tucker": True, "decompose_both": True, "factor": 3}),
    ("lokr", 2, {"factor": 4}),
    ("tucker", 3, {}),
]
CASES = [(*one, kind) for one in SETTINGS for kind in LAYERS if (one[0], kind) != ("tucker", "conv2d grouped")]
NAMES = {"tucker": "use_tucker"}


def case_of(kind: str) -> tuple[Net, Tensor]:
    """A frozen layer, and an input with a gradient; always the same."""
    make, shape = LAYERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(make()).requires_grad_(False), torch.randn(shape, requires_grad=True)


def lycoris_module(
    net: Net, method: str, rank: int, options: dict[str, Any], alpha: float = 1.5, **settings: Any
) -> nn.Module:
    """LyCORIS's module for the layer, with random values in all that trains."""
    settings |= {NAMES.get(name, name): value for name, value in options.items()}
    settings |= {"use_tucker": True} if method == "tucker" else {}
    module = MODULES[method]("layer", net.layer, 1.0, rank, alpha, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def ours(
    net: Net, method: str, rank: int, options: dict[str, Any], alpha: float = 1.5, rslora: bool = False
) -> AdapterSet:
    """A new adapter of ours with random values."""
    config = AdapterConfig(method, rank, alpha, rslora=rslora, options=options)
    adapters = inject({"net": net}, AdapterPlan(("re:.*",), config=config), {})
    randomise(adapters)
    return adapters


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def view(net: Net) -> WeightView:
    """The layer's weight as methods see it."""
    return WeightView(named_targets({"net": net})["net.layer"])


def weight_of(module: nn.Module) -> Tensor:
    """dW as LyCORIS's forward uses it; its get_diff_weight multiplies LoHa's and LoKr's scale in twice."""
    if isinstance(module, LoConModule):
        return module.get_diff_weight(shape=module.shape)[0]
    return module.get_weight(module.shape) * module.scalar


@pytest.mark.parametrize(("method", "rank", "options", "kind"), CASES)
def test_a_file_of_lycoris_gives_its_outputs_and_gradients(method: str, rank: int, options: dict, kind: str) -> None:
    net, x = case_of(kind)
    module = lycoris_module(net, method, rank, options)
    expected = module(x)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    gradient, x.grad = x.grad, None

    adapters = attach_adapters({"net": net}, {"net.layer": state_of(module)})
    output = net(x)
    (output * weights).sum().backward()
    assert close(output, expected)
    assert close(x.grad, gradient)
    own = {name.removesuffix(".weight"): parameter for name, parameter in module.named_parameters()}
    (adapter,) = adapters.adapters
    assert own.keys() == dict(adapter.named_parameters()).keys()
    for name, parameter in adapter.named_parameters():
        assert close(parameter.grad, own[name].grad), name


@pytest.mark.parametrize(("method", "rank", "options", "kind"), CASES)
def test_a_file_of_lycoris_is_written_again_as_it_was(method: str, rank: int, options: dict, kind: str) -> None:
    net, _ = case_of(kind)
    module = lycoris_module(net, method, rank, options)
    state = state_of(module)
    adapter = method_of(frozenset(state)).from_export(describe(net.layer), state)
    written = adapter.export()
    assert written.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.items())
    assert close(adapter.delta_weight(view(net)), weight_of(module))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("method", "rank", "options", "kind"), CASES)
def test_a_new_adapter_has_the_tensors_of_lycoris(
    method: str, rank: int, options: dict, kind: str, rslora: bool
) -> None:
    net, _ = case_of(kind)
    (entry,) = ours(net, method, rank, options, rslora=rslora).state().values()
    state = state_of(lycoris_module(net, method, rank, options, rs_lora=rslora))
    assert {name: tensor.shape for name, tensor in entry.items()} == {name: one.shape for name, one in state.items()}
    whole = {"lokr_w1", "lokr_w2"} <= entry.keys()  # readers take the scale 1 there, rsLoRA or not
    assert torch.equal(entry["alpha"], torch.tensor(float(rank)) if whole else state["alpha"])


# LyCORIS takes the rank of LoKr's Tucker form from the wrong side, and cannot read its own files either
READABLE = [one for one in CASES if one[0] != "lokr" or "tucker" not in one[2] or one[3] in ("linear", "conv2d 1x1")]


@pytest.mark.parametrize(("method", "rank", "options", "kind"), READABLE)
def test_lycoris_reads_our_file(method: str, rank: int, options: dict, kind: str) -> None:
    net, x = case_of(kind)
    base = net(x)
    adapters = ours(net, method, rank, options, rslora=True)
    output, (entry,) = net(x), adapters.state().values()
    adapters.detach()
    which, parts = get_module({f"layer.{name}": tensor for name, tensor in entry.items()}, "layer")
    module = make_module(which, parts, "layer", net.layer)
    assert close(module(x), output)
    assert not close(base, output)


@pytest.mark.parametrize("method", MODULES)
def test_a_trained_scalar_and_rslora_are_in_the_file(method: str) -> None:
    net, _ = case_of("conv2d")
    module = lycoris_module(net, method, 2, {}, use_scalar=True, rs_lora=True)
    state = state_of(module)
    adapter = method_of(frozenset(state)).from_export(describe(net.layer), state)
    assert module.scalar != 1
    assert close(adapter.delta_weight(view(net)), weight_of(module))


@pytest.mark.parametrize(("method", "rank", "options"), SETTINGS)
def test_files_for_another_base_are_refused(method: str, rank: int, options: dict) -> None:
    for kind, other in (("linear", nn.Linear(48, 31)), ("conv2d", nn.Conv2d(24, 32, 5)), ("conv2d", nn.Linear(24, 32))):
        state = state_of(lycoris_module(case_of(kind)[0], method, rank, options))
        with pytest.raises(ConfigError, match="another base"):
            attach_adapters({"net": Net(other)}, {"net.layer": state})


def test_what_is_not_understood_is_refused() -> None:
    net, _ = case_of("linear")
    for method in ("loha", "lokr"):
        state = state_of(lycoris_module(net, method, 2, {}, weight_decompose=True))
        with pytest.raises(ConfigError, match="no method has the entries alpha, dora_scale"):
            attach_adapters({"net": net}, {"net.layer": state})
    half = {"lokr_w1": torch.ones(4, 6), "lokr_w2_a": torch.ones(8, 2)}
    with pytest.raises(ConfigError, match="no method has the entries lokr_w1, lokr_w2_a"):
        attach_adapters({"net": net}, {"net.layer": half})
    with pytest.raises(ConfigError, match="factor is 0"):
        LoKr(describe(net.layer), AdapterConfig("lokr", options={"factor": 0}))
    with pytest.raises(ConfigError, match="tucker"):
        Tucker(describe(nn.Conv2d(8, 8, 3, groups=2)), AdapterConfig("tucker"))


def test_factorization_is_that_of_lycoris() -> None:
    for size in [*range(1, 200), 320, 640, 768, 1280, 3072, 4096]:
        for factor in (-1, 1, 2, 3, 4, 7, 8, 16, 64):
            assert factorization(size, factor) == lycoris_factorization(size, factor), (size, factor)
