"""IA3 and VeRA against peft and LyCORIS, in outputs and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layers import LAYERS, adapted, check_options, check_rows, close, net_of, randomise
from torch import Tensor, nn

from studio.adapters import AdapterConfig, AdapterPlan, attach_adapters, inject
from studio.errors import ConfigError


def gradients(output: Tensor, parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    """Of a weighted sum of `output`, by the parameters and by `x`."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    return list(torch.autograd.grad((output * weights).sum(), [*parameters, x]))


def all_close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(close(one.reshape(other.shape), other) for one, other in zip(ours, theirs, strict=True))


# -- IA3 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["output", "input"])
@pytest.mark.parametrize(
    "kind", ["linear", "linear without bias", "transformers Conv1D", "conv2d", "conv2d grouped", "conv3d"]
)
def test_ia3_equals_peft(kind: str, gate: str) -> None:
    from peft import IA3Config, get_peft_model

    net, x = net_of(kind)
    x.requires_grad_()
    config = IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if gate == "input" else [])
    model = get_peft_model(copy.deepcopy(net), config)
    adapter = adapted(net, "ia3", {"gate": gate}).adapters[0]
    held = model.base_model.model.layer.ia3_l["default"]
    with torch.no_grad():
        held.copy_(1 + adapter.weight.reshape(held.shape))
    assert close(net(x), model(x))
    assert all_close(gradients(net(x), [adapter.weight], x), gradients(model(x), [held], x))


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d", "conv2d", "conv2d dilated", "conv3d"])
def test_a_lycoris_ia3_is_read_and_does_the_same(kind: str, on_input: bool) -> None:
    from lycoris.modules.ia3 import IA3Module

    net, x = net_of(kind)
    x.requires_grad_()
    reference = copy.deepcopy(net)
    module = IA3Module("layer", reference.layer, train_on_input=on_input)
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(5))
    module.apply_to()
    adapters = attach_adapters({"net": net}, {"net.layer": module.state_dict()})
    assert close(net(x), reference(x))
    ours = gradients(net(x), [adapters.adapters[0].weight], x)
    assert all_close(ours, gradients(reference(x), [module.weight], x))
    entry = adapters.state()["net.layer"]
    assert {name: (one.shape, one.dtype) for name, one in entry.items()} == {
        name: (one.shape, one.dtype) for name, one in module.state_dict().items()
    }


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {"gate": "input"}) for kind in LAYERS if kind not in ("embedding", "norm", "group norm", "experts")]
    + [("linear", {"gate_bias": False}), ("conv2d", {"gate_bias": False})],
)
def test_options_of_ia3_keep_the_invariants(kind: str, options: dict[str, Any]) -> None:
    check_options("ia3", kind, options)


def test_a_closed_gate_comes_off_exactly() -> None:
    net, x = net_of("linear")
    before = net(x)
    adapters = adapted(net, "ia3")
    with torch.no_grad():
        adapters.adapters[0].weight[:3] = -1  # l = 0: nothing is left to divide by
    adapters.merge()
    assert not net(x)[..., :3].any()
    adapters.unmerge()
    adapters.detach()
    assert torch.equal(net(x), before)


def test_ia3_refuses_what_it_cannot_gate() -> None:
    with pytest.raises(ConfigError, match="an embedding has no input channels"):
        adapted(net_of("embedding")[0], "ia3", {"gate": "input"})
    with pytest.raises(ConfigError, match="gate is 'both'"):
        adapted(net_of("linear")[0], "ia3", {"gate": "both"})
    entry = adapted(net_of("linear")[0], "ia3").state()["net.layer"]
    with pytest.raises(ConfigError, match=r"weight is \(8,\); this layer needs \(16,\)"):
        attach_adapters({"net": net_of("linear without bias")[0]}, {"net.layer": entry})


# -- VeRA -------------------------------------------------------------------------------------


def chain() -> tuple[nn.Module, Tensor]:
    """Layers of several shapes: A has 24 columns, B 24 rows, from different layers."""
    generator = torch.Generator().manual_seed(7)
    net = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 8, bias=False), nn.Tanh(), nn.Linear(8, 16))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net.requires_grad_(False), torch.randn(3, 5, 12, generator=generator)


@pytest.mark.parametrize("seed", [0, 3])
def test_vera_equals_peft_and_its_projections_bit_for_bit(seed: int) -> None:
    from peft import VeraConfig, get_peft_model

    net, x = chain()
    x.requires_grad_()
    config = VeraConfig(r=4, target_modules=["0", "2", "4"], projection_prng_key=seed, d_initial=0.2)
    model = get_peft_model(copy.deepcopy(net), config)
    plan = AdapterPlan(("0", "2", "4"), config=AdapterConfig("vera", 4, 2.0, options={"seed": seed, "d_initial": 0.2}))
    adapters = inject({"net": net}, plan, {})
    layers = [model.base_model.model[place] for place in (0, 2, 4)]
    for adapter, layer in zip(adapters.adapters, layers, strict=True):
        assert torch.equal(adapter.projections.vera_A, layer.vera_A["default"])
        assert torch.equal(adapter.projections.vera_B, layer.vera_B["default"])
        assert torch.equal(adapter.vera_lambda_d, layer.vera_lambda_d["default"])
        assert torch.equal(adapter.vera_lambda_b, layer.vera_lambda_b["default"])
    randomise(adapters)
    ours = [one for adapter in adapters.adapters for one in (adapter.vera_lambda_b, adapter.vera_lambda_d)]
    held = [one["default"] for layer in layers for one in (layer.vera_lambda_b, layer.vera_lambda_d)]
    with torch.no_grad():
        for mine, theirs in zip(ours, held, strict=True):
            theirs.copy_(mine)
    assert close(net(x), model(x))
    assert all_close(gradients(net(x), ours, x), gradients(model(x), held, x))


def test_vera_layers_share_one_pair_of_projections_that_is_not_stored() -> None:
    adapters = adapted(chain()[0], "vera")
    assert len({id(adapter.projections) for adapter in adapters.adapters}) == 1
    assert sum(buffer.numel() for buffer in adapters.buffers()) == 4 * 24 + 24 * 4
    assert not any("vera_A" in key for key in adapters.state_dict())
    double = copy.deepcopy(adapters).double()
    assert double.adapters[0].projections is double.shared["vera"][0]
    assert double.adapters[0].delta_weight(_view(double)).dtype == torch.float64


def _view(adapters: Any) -> Any:
    from studio.adapters import WeightView

    return WeightView(adapters.targets[adapters.names[0]])


def test_one_layer_of_a_vera_file_keeps_the_projections_of_all() -> None:
    net, _ = chain()
    adapters = adapted(net, "vera")
    state = adapters.state()
    assert state["net.4"]["vera_projection"].tolist() == [0, 24, 24]
    x = torch.randn(3, 8)
    expected = net[4](x)
    adapters.detach()
    alone = attach_adapters({"net": net}, {"net.4": state["net.4"]})
    assert torch.equal(net[4](x), expected)
    assert torch.equal(alone.state()["net.4"]["vera_projection"], state["net.4"]["vera_projection"])


def test_ranks_may_differ_among_vera_layers() -> None:
    net, x = chain()
    plan = AdapterPlan(("0", "2"), config=AdapterConfig("vera", 4), overrides={"2": {"rank": 6}})
    adapters = inject({"net": net}, plan, {})
    randomise(adapters)
    output, state = net(x), adapters.state()
    adapters.detach()
    attach_adapters({"net": net}, state)
    assert close(net(x), output)
    assert state["net.2"]["vera_lambda_d"].shape == (6,)


def test_vera_refuses_what_would_not_train_or_fit() -> None:
    with pytest.raises(ConfigError, match="d_initial is 0"):
        adapted(net_of("linear")[0], "vera", {"d_initial": 0})
    entry = adapted(net_of("linear")[0], "vera").state()["net.layer"]
    with pytest.raises(ConfigError, match="projections of 12 and 8 channels"):
        attach_adapters({"net": net_of("linear without bias")[0]}, {"net.layer": entry})


# -- both -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), [("ia3", {}), ("ia3", {"gate": "input"}), ("vera", {})])
def test_every_sample_has_its_own_adapter(method: str, options: dict[str, Any]) -> None:
    check_rows(method, options)
