"""The engine: targets, attaching, merging; and LoRA against peft, layer type by layer type."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor, nn

from studio.adapters import AdapterConfig, AdapterPlan, AdapterSet, attach_adapters, inject, match_targets
from studio.errors import ConfigError
from studio.families.loading import load_base

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 10), lambda: torch.randn(3, 5, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), lambda: torch.randn(2, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), lambda: torch.randn(2, 6, 9, 9)),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 8, 1), lambda: torch.randn(2, 6, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 5, 5, 5)),
    "embedding": (lambda: nn.Embedding(20, 12, padding_idx=0), lambda: torch.randint(20, (3, 7))),
}
# peft 0.21.2 forgets the dilation (its shapes do not fit), and has another form for groups
OURS_ONLY: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "conv2d dilated": (lambda: nn.Conv2d(6, 8, 3, dilation=2), lambda: torch.randn(2, 6, 9, 9)),
    "conv2d grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), lambda: torch.randn(2, 8, 9, 9)),
    "conv2d reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), lambda: torch.randn(2, 6, 9, 9)),
}


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(net: nn.Module, rank: int = 4, alpha: float = 2.0, **settings) -> AdapterSet:
    """`net` under random (never zero) LoRA factors on every layer."""
    plan = AdapterPlan(("re:.*",), config=AdapterConfig("lora", rank, alpha, **settings))
    adapters = inject({"net": net}, plan, {})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapters


def close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-6 + 1e-4 * b.abs().max()).all())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_lora_equals_peft_in_outputs_and_gradients(kind: str, rslora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    make, make_input = LAYERS[kind]
    net, x = Net(make()), make_input()
    reference = get_peft_model(
        copy.deepcopy(net),
        LoraConfig(r=4, lora_alpha=2, target_modules=["layer"], use_rslora=rslora, lora_dropout=0.0),
    )
    adapters = adapted(net, rslora=rslora)
    lora = adapters.adapters[0]
    embedding = kind == "embedding"
    stores = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    factors = [getattr(reference.base_model.model.layer, store)["default"] for store in stores]
    down, up = factors if embedding else [factor.weight for factor in factors]
    with torch.no_grad():
        down.copy_(lora.lora_down)
        up.copy_(lora.lora_up)
    ours, theirs = net(x), reference(x)
    assert close(ours, theirs)
    weights = torch.randn(ours.shape)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert close(lora.lora_down.grad, down.grad)
    assert close(lora.lora_up.grad, up.grad)


def test_taking_adapters_off_restores_the_model() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    reference, x = copy.deepcopy(net), torch.randn(2, 6)
    adapters = adapted(net)
    assert not torch.equal(net(x), reference(x))
    assert [type(module) for module in net.modules()] == [type(module) for module in reference.modules()]
    assert list(net.state_dict()) == list(reference.state_dict())
    adapters.detach()
    assert torch.equal(net(x), reference(x))
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[name])
    assert not any(module._forward_hooks for module in net.modules())


def test_a_deep_copy_has_adapters_of_its_own() -> None:
    net, x = Net(nn.Linear(6, 6)), torch.randn(2, 6)
    adapters = adapted(net)
    twin = copy.deepcopy(net)
    before = twin(x)
    with torch.no_grad():
        adapters.adapters[0].lora_up.zero_()
    assert torch.equal(twin(x), before)
    assert not torch.equal(net(x), before)


def test_strengths_of_several_adapters_add_up() -> None:
    net, x = Net(nn.Linear(6, 6)), torch.randn(2, 6)
    base = net(x)
    first, second = adapted(net), adapted(net)
    second.set_strength(0)
    alone = net(x) - base
    second.set_strength(2)
    assert close(net(x) - base, 3 * alone)
    first.set_strength(-2)
    assert close(net(x), base)


def test_dropout_is_a_function_of_the_sample_keys() -> None:
    net, x = Net(nn.Linear(6, 6)), torch.randn(4, 3, 6)
    adapters = adapted(net, dropout=0.5).train()
    adapters.set_keys([1, 2, 3, 4])
    together = net(x)
    assert torch.equal(net(x), together)
    for row in range(4):  # a sample's mask does not depend on the batch it is in
        adapters.set_keys([row + 1])
        assert close(net(x[row : row + 1]), together[row : row + 1])
    adapters.set_keys([5, 6, 7, 8])
    assert not torch.equal(net(x), together)
    adapters.eval()
    assert not torch.equal(net(x), together)
    with pytest.raises(RuntimeError, match="set_keys"):
        adapters.train().set_keys([])
        net(x)


def test_dropout_survives_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    net, x = Net(nn.Linear(6, 6)), torch.randn(2, 6, requires_grad=True)
    adapters = adapted(net, dropout=0.5).train()
    adapters.set_keys([1, 2])
    net(x).square().sum().backward()
    plain = [parameter.grad.clone() for parameter in adapters.parameters()]
    adapters.zero_grad()
    checkpoint(net, x, use_reentrant=False).square().sum().backward()
    for parameter, gradient in zip(adapters.parameters(), plain, strict=True):
        assert torch.equal(parameter.grad, gradient)


def block() -> nn.Module:
    layers = {"to_q": nn.Linear(4, 4), "to_k": nn.Linear(4, 4), "conv1": nn.Conv2d(4, 4, 3), "act": nn.ReLU()}
    return nn.ModuleDict({"down": nn.ModuleDict(layers), "up": nn.ModuleDict({"to_q": nn.Linear(4, 4)})})


ROLES = {"attention": (r"unet\..+\.to_[qk]",), "convolutions": (r"unet\..+\.conv\d",)}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("attention", ["unet.down.to_q", "unet.down.to_k", "unet.up.to_q"]),
        ("to_q", ["unet.down.to_q", "unet.up.to_q"]),
        ("down.to_q", ["unet.down.to_q"]),
        ("unet.down.*", ["unet.down.to_q", "unet.down.to_k", "unet.down.conv1"]),
        (r"re:unet\.\w+\.to_k", ["unet.down.to_k"]),
    ],
)
def test_targets(pattern: str, expected: list[str]) -> None:
    assert list(match_targets({"unet": block()}, AdapterPlan((pattern,)), ROLES)) == expected


@pytest.mark.parametrize("field", ["targets", "exclude", "overrides"])
def test_a_pattern_that_matches_nothing_is_an_error_with_near_misses(field: str) -> None:
    plans = {
        "targets": AdapterPlan(("to_qq",)),
        "exclude": AdapterPlan(("attention",), exclude=("to_qq",)),
        "overrides": AdapterPlan(("attention",), overrides={"to_qq": {"rank": 4}}),
    }
    with pytest.raises(ConfigError, match=r"'to_qq' matches none of the 4 layers.*to_q"):
        match_targets({"unet": block()}, plans[field], ROLES)


@pytest.mark.parametrize("field", ["exclude", "overrides"])
def test_a_pattern_that_touches_no_chosen_layer_is_an_error(field: str) -> None:
    value = ("convolutions",) if field == "exclude" else {"convolutions": {"rank": 4}}
    with pytest.raises(ConfigError, match="touches none of the 3 layers"):
        match_targets({"unet": block()}, AdapterPlan(("attention",), **{field: value}), ROLES)


def test_sets_are_merged_and_unmerged_in_any_order() -> None:
    net, x = Net(nn.Linear(6, 6)), torch.randn(2, 6)
    own = net.layer.weight
    first, second = adapted(net), adapted(net)
    beside = net(x)
    first.merge()
    second.merge()
    assert close(net(x), beside)
    assert not net.layer._forward_hooks
    with pytest.raises(RuntimeError, match="merged already"):
        second.merge()
    first.unmerge()
    assert close(net(x), beside)
    second.detach()
    first.detach()
    assert net.layer.weight is own


def test_overrides_set_rank_alpha_dropout_and_rate_per_target() -> None:
    plan = AdapterPlan(
        ("attention", "convolutions"),
        config=AdapterConfig(rank=8, alpha=4.0),
        overrides={"convolutions": {"rank": 2, "lr": 1e-5}, "*.down.to_q": {"alpha": 1.0, "dropout": 0.1}},
    )
    adapters = inject({"unet": block()}, plan, ROLES)
    configs = {name: adapter.config for name, adapter in adapters.items()}
    assert (configs["unet.down.conv1"].rank, configs["unet.down.conv1"].lr) == (2, 1e-5)
    assert (configs["unet.down.to_q"].alpha, configs["unet.down.to_q"].dropout) == (1.0, 0.1)
    assert configs["unet.up.to_q"] == AdapterConfig(rank=8, alpha=4.0)
    assert sorted(group["lr"] for group in adapters.parameter_groups(1e-3)) == [1e-5, 1e-3]
    with pytest.raises(ConfigError, match=r"'rnak'.*rank"):
        match_targets({"unet": block()}, AdapterPlan(("attention",), overrides={"to_q": {"rnak": 2}}), ROLES)


def test_check_used_names_a_layer_that_is_never_called() -> None:
    net = block()
    adapters = inject({"net": net}, AdapterPlan(("to_q",)), {})
    with pytest.raises(ConfigError, match=r"1 adapted layers take no part .*: net.down.to_q\."):
        adapters.check_used(lambda: net.up.to_q(torch.randn(1, 4)))


def test_a_state_reloads_and_a_wrong_one_is_refused() -> None:
    net, x = Net(nn.Linear(6, 6)), torch.randn(2, 6)
    adapters = adapted(net)
    state, y = adapters.state(), net(x)
    adapters.detach()
    again = attach_adapters({"net": net}, state)
    assert torch.equal(net(x), y)
    again.detach()
    with pytest.raises(ConfigError, match="not in this model: net.other"):
        attach_adapters({"net": net}, {"net.other": state["net.layer"]})
    with pytest.raises(ConfigError, match="for another base"):
        attach_adapters({"net": Net(nn.Linear(7, 6))}, state)


def test_initialisation_is_a_function_of_seed_and_layer() -> None:
    def first(plan: AdapterPlan, seed: int) -> Tensor:
        return dict(inject({"unet": block()}, plan, ROLES, seed).items())["unet.up.to_q"].lora_down

    alone, among = AdapterPlan(("unet.up.to_q",)), AdapterPlan(("attention",))
    assert torch.equal(first(alone, 3), first(among, 3))
    assert not torch.equal(first(alone, 3), first(alone, 4))


@pytest.mark.parametrize(
    "settings", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"method": "lroa"}], ids=lambda settings: str(settings)
)
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError):
        AdapterConfig(**settings)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_taking_adapters_off_restores_a_whole_pipeline(kind: str) -> None:
    family, models = load_base(str(tiny.folder(kind)))
    modules = family.prefixes(models)
    before = {name: copy.deepcopy(module) for name, module in modules.items()}
    adapters = inject(modules, AdapterPlan(tiny.TARGETS), family.roles)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_()
    tiny.predict(family, models)
    adapters.merge()
    tiny.predict(family, models)
    adapters.unmerge()
    adapters.detach()
    for name, module in modules.items():
        assert [type(part) for part in module.modules()] == [type(part) for part in before[name].modules()]
        tensors, originals = module.state_dict(), before[name].state_dict()
        assert list(tensors) == list(originals)
        assert all(torch.equal(tensors[key], originals[key]) for key in originals)
