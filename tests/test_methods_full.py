"""Training in full, norm and bias tuning, against LyCORIS and against training the parameters themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layers import LAYERS, adapted, close, net_of, randomise, supported
from torch import Tensor, nn

from studio.adapters import METHODS, AdapterConfig, AdapterPlan, attach_adapters, inject
from studio.errors import ConfigError

FULL = ("diff", "norm", "bias")
CASES = [(method, kind) for method in FULL for kind in LAYERS if supported(method, kind)]


def run(net: nn.Module, x: Tensor) -> Tensor:
    output = net(x)
    output.sin().sum().backward()
    return output


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_outputs_and_gradients_are_those_of_the_parameters_themselves(method: str, kind: str) -> None:
    net, x = net_of(kind)
    adapters = adapted(net, method)
    output = run(net, x)
    other, _ = net_of(kind)
    names = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}
    (one,) = adapters.adapters
    own = {mine: getattr(other.layer, names[mine], None) for mine in one.export()}
    if own.get("diff", 0) is None:  # a parameter that its module uses itself has a name of its own
        own["diff"] = next(other.layer.parameters())
    turned = kind in ("transformers Conv1D", "experts")  # stored as (..., in, out)
    with torch.no_grad():
        for name, parameter in own.items():
            delta = one.get_parameter(name)
            parameter.requires_grad_().add_(delta.mT if turned and name == "diff" else delta)
    assert close(output, run(other, x))
    for name, parameter in own.items():
        assert close(one.get_parameter(name).grad, parameter.grad.mT if turned and name == "diff" else parameter.grad)


def full_module(layer: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    from lycoris.modules.full import FullModule

    return FullModule.make_module_from_state_dict("one", layer, tensors["diff"], tensors.get("diff_b"))


def norm_module(layer: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    from lycoris.modules.norms import NormModule

    return NormModule.make_module_from_state_dict("one", layer, tensors["w_norm"], tensors.get("b_norm"))


@pytest.mark.parametrize(
    ("method", "kind", "make"),
    [
        *(("diff", kind, full_module) for kind in ("linear", "linear without bias", "conv1d", "conv2d", "conv3d")),
        *(("norm", kind, norm_module) for kind in ("norm", "group norm")),
    ],
)
def test_lycoris_reads_the_tensors_and_computes_the_same(
    method: str, kind: str, make: Callable[[nn.Module, dict[str, Tensor]], nn.Module]
) -> None:
    net, x = net_of(kind)
    other, _ = net_of(kind)
    adapters = adapted(net, method)
    with torch.no_grad():
        module = make(other.layer, adapters.state()["net.layer"])
    module.org_forward = other.layer.forward
    output, theirs = net(x), module(x)
    assert close(output, theirs)
    (one,) = adapters.adapters
    output.sin().sum().backward()
    theirs.sin().sum().backward()
    names = {"diff": "weight", "diff_b": "bias"}
    for name, parameter in one.named_parameters():
        assert close(parameter.grad, module.get_parameter(names.get(name, name)).grad)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up, self.head = (
            nn.Embedding(10, 12),
            nn.LayerNorm(12),
            nn.Linear(12, 12),
            nn.Linear(12, 4, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.norm(self.embed(x))).relu())


def test_modules_train_in_full_beside_a_lora_in_one_set() -> None:
    model = Block().requires_grad_(False)
    x = torch.arange(10)[None]
    base = model(x)
    plan = AdapterPlan(
        ("re:.*",),
        config=AdapterConfig("lora", 2),
        overrides={"head": {"method": "diff"}, "norm": {"method": "norm"}, "embed": {"method": "diff"}},
    )
    adapters = inject({"net": model}, plan, {})
    assert [one.method for one in adapters.adapters] == ["diff", "norm", "lora", "diff"]
    assert torch.equal(model(x), base)
    optimizer = torch.optim.AdamW(adapters.parameter_groups(0.05))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    output, state = model(x), adapters.state()
    assert {name: set(entry) for name, entry in state.items()} == {
        "net.embed": {"diff"},
        "net.norm": {"w_norm", "b_norm"},
        "net.up": {"lora_down.weight", "lora_up.weight", "alpha"},
        "net.head": {"diff"},
    }
    adapters.detach()
    again = attach_adapters({"net": model}, state)
    assert close(model(x), output)
    again.merge()
    assert close(model(x), output)


def test_bitfit_takes_every_bias_and_nothing_else() -> None:
    model = Block().requires_grad_(False)
    adapters = inject({"net": model}, AdapterPlan(("re:.*",), config=AdapterConfig("bias")), {})
    assert adapters.names == ["net.norm", "net.up"]
    assert sum(parameter.numel() for parameter in adapters.parameters()) == 24
    randomise(adapters)
    x = torch.arange(10)[None]
    x = model.embed(x)
    shifted = nn.functional.layer_norm(x, (12,), model.norm.weight, model.norm.bias + adapters.adapters[0].diff_b)
    expected = nn.functional.linear(shifted, model.up.weight, model.up.bias + adapters.adapters[1].diff_b)
    assert close(model.up(model.norm(x)), expected)


def test_a_file_without_the_bias_leaves_it_alone() -> None:
    net, x = net_of("linear")
    adapters = adapted(net, "diff")
    adapters.adapters[0].diff_b.data.zero_()
    output, diff = net(x), adapters.adapters[0].diff.detach()
    adapters.detach()
    attach_adapters({"net": net}, {"net.layer": {"diff": diff}})
    assert close(net(x), output)


def test_what_does_not_fit_is_refused() -> None:
    linear = net_of("linear without bias")[0]
    with pytest.raises(ConfigError, match=r"needs \(16, 12\)"):
        attach_adapters({"net": linear}, {"net.layer": {"diff": torch.zeros(3, 4)}})
    with pytest.raises(ConfigError, match="diff_b is .* has no bias"):
        attach_adapters({"net": linear}, {"net.layer": {"diff": torch.zeros(16, 12), "diff_b": torch.zeros(16)}})
    with pytest.raises(ConfigError, match="which 'bias' does not read"):
        adapted(net_of("linear")[0], "bias", dropout=0.1)
    assert not METHODS["bias"].supports(next(iter(adapted(linear).adapters)).spec)
