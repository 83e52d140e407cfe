"""The engine on real architecture classes: LoRA equal to peft, every method, ties, checkpointing, bf16."""

from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, build
from layers import close, config_of, net_of, randomise
from torch import Tensor, nn

from studio.adapters import METHODS, Adapter, AdapterConfig, AdapterPlan, AdapterSet, inject, named_targets
from studio.errors import ConfigError

MATRICES = ("linear", "conv", "experts")


def plan_for(model: nn.Module, config: AdapterConfig, *kinds: str) -> AdapterPlan:
    """`config` on every layer of these kinds that the method can adapt, or on all that it can; not on unused ones."""
    names = []
    for name, target in named_targets({"model": model}).items():
        try:
            METHODS[config.method].check(target.spec, config)
        except ConfigError:
            continue
        if (not kinds or target.spec.kind in kinds) and name not in UNUSED:
            names.append(name)
    return AdapterPlan(("re:" + "|".join(map(re.escape, names)),), config=config)


# T5 calls the copies in its encoder and decoder; peft refuses parameters of the outermost module
UNUSED = {"model.shared", "model.scale_shift_table"}


def adapted(model: nn.Module, config: AdapterConfig, *kinds: str) -> AdapterSet:
    adapters = inject({"model": model}, plan_for(model, config, *kinds), {})
    randomise(adapters)
    return adapters.eval()


def loss_of(output: Tensor) -> Tensor:
    """A loss whose gradient differs at every output."""
    return (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)).sum()


def gradients(adapters: AdapterSet) -> dict[str, Tensor]:
    """By name, of all that trains; and forgets them."""
    known = {name: one.grad for name, one in adapters.named_parameters() if one.requires_grad}
    adapters.zero_grad(set_to_none=True)
    return known


# -- LoRA against peft ------------------------------------------------------------------------


def in_peft(model: nn.Module, adapters: AdapterSet) -> dict[str, Any]:
    """Puts peft's LoRA on `model` with the factors of `adapters`; target -> peft's layer."""
    from peft import LoraConfig, inject_adapter_in_model

    paths = {name.removeprefix("model."): target.spec.called for name, target in adapters.targets.items()}
    config = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules="|".join(re.escape(path) for path, called in paths.items() if called),
        target_parameters=[path for path, called in paths.items() if not called],
    )
    inject_adapter_in_model(config, model)
    layers = {}
    for path, layer in model.named_modules():
        if hasattr(layer, "lora_A"):  # two parameters of one module are two layers, one inside the other
            name = "model." + path.replace(".base_layer", "")
            layers[f"{name}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else name] = layer
    for name, adapter in adapters.items():
        down, up = in_peft_order(adapter, adapter.lora_down, adapter.lora_up)
        layers[name].lora_A["default"].weight.data.copy_(down)
        layers[name].lora_B["default"].weight.data.copy_(up)
    return layers


def in_peft_order(adapter: Adapter, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Experts (E, rank, in) and (E, out, rank) as peft has them, (E * rank, in) and (out, rank * E)."""
    if adapter.spec.kind != "experts":
        return down, up
    return down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)


@pytest.mark.filterwarnings("ignore")
# peft's MultiheadAttention adds dW of out_proj twice, and no dW at all on torch's fast path
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "torch attention"])
def test_lora_on_every_matrix_equals_peft(name: str) -> None:
    model, run = build(name)
    reference, base, state = copy.deepcopy(model), run(model), copy.deepcopy(model.state_dict())
    adapters = adapted(model, AdapterConfig(rank=4, alpha=2.0), *MATRICES)
    adapters.check_used(lambda: run(model))
    layers = in_peft(reference, adapters)
    assert layers.keys() == set(adapters.names)
    output, expected = run(model), run(reference)
    assert close(output, expected)
    assert not close(output, base)
    loss_of(output).backward()
    loss_of(expected).backward()
    for full_name, adapter in adapters.items():
        theirs = layers[full_name].lora_A["default"].weight.grad, layers[full_name].lora_B["default"].weight.grad
        if theirs == (None, None):  # the last block's queries of the text, which nothing reads
            assert (adapter.lora_down.grad, full_name) == (None, "model.transformer_blocks.1.attn.add_q_proj")
            continue
        mine = in_peft_order(adapter, adapter.lora_down.grad, adapter.lora_up.grad)
        assert close(mine[0], theirs[0]) and close(mine[1], theirs[1]), full_name
    adapters.merge()
    assert close(run(model), output)
    adapters.detach()
    assert torch.equal(run(model), base)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert list(model.state_dict()) == list(state)


def test_lora_in_the_attention_of_torch_is_that_of_its_weights() -> None:
    """Against the model with W + scale * up @ down in the place of each weight."""
    model, run = build("torch attention")
    reference, x, base = copy.deepcopy(model), torch.randn(2, 5, 16), run(model)
    adapters = adapted(model, AdapterConfig(rank=4, alpha=2.0), "linear")
    assert Counter(target.spec.called for target in adapters.targets.values()) == {True: 5, False: 4}
    adapters.check_used(lambda: run(model))
    weights, factors = {}, {}
    for name, adapter in adapters.items():
        key = name.removeprefix("model.") + ("" if name.endswith("_weight") else ".weight")
        down, up = factors[name] = [
            one.detach().clone().requires_grad_() for one in (adapter.lora_down, adapter.lora_up)
        ]
        weights[key] = reference.get_parameter(key) + adapter.scale * up @ down
    output, expected = model(x), torch.func.functional_call(reference, weights, (x,))
    assert close(output, expected) and not close(output, reference(x))
    loss_of(output).backward()
    loss_of(expected).backward()
    for name, adapter in adapters.items():
        assert close(adapter.lora_down.grad, factors[name][0].grad), name
        assert close(adapter.lora_up.grad, factors[name][1].grad), name
    with torch.no_grad():  # where torch would take a fast path around the attention
        assert close(model(x), expected)
        adapters.merge()
        assert close(model(x), expected)
    adapters.detach()
    assert torch.equal(run(model), base)


def test_lora_fa_projects_the_gradient_of_each_expert_by_itself() -> None:
    steps = {}
    for freeze in (False, True):
        net, x = net_of("experts")
        adapters = adapted(net, AdapterConfig(rank=4, alpha=2.0, options={"freeze_down": freeze}))
        (adapter,) = adapters.adapters
        with torch.no_grad():
            adapter.lora_down.copy_(torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(5)))
        loss_of(net(x)).backward()
        steps[freeze] = adapter.lora_up.grad
    for expert, down in enumerate(adapter.lora_down):
        assert close(steps[True][expert], steps[False][expert] @ torch.linalg.inv(down @ down.T) / adapter.scale**2)


# -- every method -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name"),
    [(one, name) for one in METHODS for name in ("llama", "unet") if (one, name) != ("bias", "llama")],  # it has none
)
def test_every_method_acts_on_all_layers_that_it_can_adapt(method: str, name: str) -> None:
    """In float64, where a deep model's rounding does not hide an error."""
    model, run = build(name)
    model.double()
    adapters = adapted(model, config_of(method)).double()
    adapters.check_used(lambda: run(model))
    output = run(model)
    loss_of(output).backward()
    optimized = {id(one) for group in adapters.parameter_groups(1e-3) for one in group["params"]}
    assert optimized == {id(one) for one in adapters.parameters() if one.requires_grad}
    assert all(one is not None and one.any() for one in gradients(adapters).values())
    adapters.merge()
    assert torch.allclose(run(model), output, rtol=0, atol=1e-9 * float(output.abs().max()))
    adapters.unmerge()
    assert torch.equal(run(model), output)


# -- tied weights -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "here", "there"), [("gpt2", "lm_head", "transformer.wte"), ("gpt2", "transformer.wte", "lm_head")]
)
def test_an_adapter_on_a_tied_weight_acts_there_alone(name: str, here: str, there: str) -> None:
    model, run = build(name)
    one, other = model.get_submodule(here), model.get_submodule(there)
    assert one.weight is other.weight
    own, values, base = one.weight, one.weight.clone(), run(model)
    ids, hidden = torch.arange(5)[None], torch.randn(1, 5, 16)
    inputs = {"lm_head": hidden, "transformer.wte": ids}
    adapters = inject({"model": model}, AdapterPlan((here,), config=AdapterConfig(rank=4)), {})
    randomise(adapters)
    untouched = other(inputs[there])
    output = run(model)
    assert not close(output, base)
    report = adapters.merge()
    assert report.untied == {f"model.{here}": (f"model.{there}",)}
    assert f"model.{here} is untied from model.{there}" in str(report)
    assert close(run(model), output)
    assert other.weight is own and one.weight is not own
    assert torch.equal(own, values) and torch.equal(other(inputs[there]), untouched)
    adapters.unmerge()
    assert one.weight is other.weight and torch.equal(run(model), output)


def test_t5_ties_four_layers() -> None:
    model, _ = build("t5")
    names = ["model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "model.lm_head"]
    tied = {name: target.tied for name, target in named_targets({"model": model}).items() if target.tied}
    assert tied == {name: tuple(other for other in names if other != name) for name in names}


# -- how models are trained -------------------------------------------------------------------


def _checkpointed(model: Any, how: str) -> None:
    if how == "diffusers":
        model.enable_gradient_checkpointing()
        return
    model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    if how == "reentrant":  # it passes gradients only where an input of the block asks for them
        model.enable_input_require_grads()


CHECKPOINTED = [
    *((name, how) for name in ("llama", "t5", "mixtral") for how in ("reentrant", "not reentrant")),
    *((name, "diffusers") for name in ("unet", "flux")),
]


@pytest.mark.parametrize(("name", "how"), CHECKPOINTED)
@pytest.mark.parametrize("method", ["lora", "dora", "norm"])
def test_checkpointed_gradients_are_the_same(name: str, how: str, method: str) -> None:
    model, run = build(name)
    adapters = adapted(model.train(), config_of(method))
    adapters.train()
    adapters.check_used(lambda: run(model))
    loss_of(run(model)).backward()
    plain = gradients(adapters)
    calls = Counter()
    adapted_layers = [target.layer for target in adapters.targets.values()]
    for layer in model.modules():
        if layer not in adapted_layers:  # another hook there would change how adapters act
            layer.register_forward_hook(lambda layer, *_: calls.update([id(layer)]))
    _checkpointed(model, how)
    loss_of(run(model)).backward()
    assert 2 in calls.values(), "nothing was computed again"
    for key, gradient in gradients(adapters).items():
        assert (gradient is None and plain[key] is None) or close(gradient, plain[key]), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_in_bf16_stays_there_and_adapters_train_in_fp32(name: str) -> None:
    model, run = build(name)
    adapters = adapted(model, AdapterConfig(rank=4, alpha=2.0))
    exact = run(model).detach()
    model.to(torch.bfloat16)
    output = run(model)
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).norm() <= 0.2 * exact.norm()
    loss_of(output).backward()
    assert all(one is None or one.dtype == torch.float32 for one in gradients(adapters).values())
    with adapters.merged():
        assert run(model).dtype == torch.bfloat16


# -- layers that merging cannot change --------------------------------------------------------


def test_a_parametrised_weight_is_adapted_and_never_merged_in_vain() -> None:
    def normed() -> nn.Module:
        return nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1))

    net = nn.Sequential(nn.Conv1d(8, 8, 1), normed()).requires_grad_(False)
    x = torch.randn(2, 8, 5)
    assert list(named_targets({"model": net})) == ["model.0", "model.1"]
    first = net[0].weight
    adapters = adapted(net, AdapterConfig(rank=4))
    output = net(x)
    with pytest.raises(ConfigError, match=r"model\.1: its weight is computed in each call"):
        adapters.merge()
    assert net[0].weight is first and torch.equal(net(x), output), "all of the merge is undone"


def test_recurrent_layers_hold_no_targets() -> None:
    """They compute with copies of their parameters, which an effective value would not reach."""
    assert not named_targets({"model": nn.LSTM(4, 4)})
