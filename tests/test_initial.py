"""LoRA's initialisations and its optimisers' rules, against peft."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from layers import adapted, close, net_of
from safetensors.torch import load_file
from torch import Tensor, nn

from studio.adapters import (
    AdapterConfig,
    AdapterPlan,
    AdapterSet,
    initialise_from_activations,
    initialise_from_originals,
    inject,
)
from studio.adapters.inits.initial import INITS, svd_lowrank
from studio.adapters.quantized import ZeroPointLinear
from studio.errors import ConfigError

RANK, ALPHA = 4, 8.0
LINEARS = ("first", "second", "third")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(24, 16), nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).tanh()).tanh())


def mlp() -> Mlp:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mlp().requires_grad_(False)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def started(
    model: nn.Module, init: str = "kaiming", method: str = "lora", seed: int = 0, **options: object
) -> AdapterSet:
    config = AdapterConfig(method, RANK, ALPHA, options={"init": init, **options})
    return inject({"net": model}, AdapterPlan(("re:.*",), config=config), {}, seed)


def theirs(model: nn.Module, **settings: object) -> peft.PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS), **settings)  # type: ignore[arg-type]
        return peft.get_peft_model(model, config)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_the_start_and_the_conversion_equal_peft(init: str, tmp_path: Path) -> None:
    ours, x = mlp(), draw(5, 24)
    base = ours(x)
    adapters = started(ours, init)
    other = theirs(mlp(), init_lora_weights=init)
    assert close(ours(x), base) and close(other(x), base)
    for name, one in zip(LINEARS, adapters.adapters, strict=True):
        layer = getattr(other.base_model.model, name)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        if init == "pissa_niter_4":  # another draw: as near to the best product as theirs
            weight = getattr(mlp(), name).weight
            errors = [(weight - 2 * found).norm() for found in (one.lora_up @ one.lora_down, product)]
            assert abs(errors[0] / errors[1] - 1) < 0.02
            one.lora_up.data, one.lora_down.data = (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
            one.anchor_up, one.anchor_down = one.lora_up.detach().clone(), one.lora_down.detach().clone()
        else:
            assert close(one.lora_up @ one.lora_down, product)
    other.peft_config["default"].init_lora_weights = True
    other.save_pretrained(tmp_path / "start")
    other.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, one in zip(LINEARS, adapters.adapters, strict=True):
            layer = getattr(other.base_model.model, name)
            for mine, its in ((one.lora_up, layer.lora_B), (one.lora_down, layer.lora_A)):
                change = draw(*mine.shape)
                mine += change
                its["default"].weight += change
    assert close(ours(x), other(x))
    other.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    file = load_file(tmp_path / "end" / "adapter_model.safetensors")
    for name, entry in adapters.state().items():
        up, down = (file[f"base_model.model.{name[4:]}.lora_{one}.weight"] for one in "BA")
        assert entry["lora_up.weight"].shape == up.shape == (up.shape[0], 2 * RANK)
        mine = entry["alpha"] / (2 * RANK) * entry["lora_up.weight"] @ entry["lora_down.weight"]
        assert close(mine, ALPHA / RANK * up @ down)


@pytest.mark.parametrize("kind", ["linear", "transformers Conv1D", "conv1d", "conv2d", "conv3d", "embedding"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_anchored_starts_on_every_layer(init: str, kind: str) -> None:
    """The product at the start is the principal part of the flattened weight, and dW is zero."""
    net, x = net_of(kind)
    base = net(x)
    adapters = inject(
        {"net": net}, AdapterPlan(("re:.*",), config=AdapterConfig("lora", 4, 2.0, options={"init": init})), {}
    )
    (one,) = adapters.adapters
    assert close(net(x), base)
    weight = net.layer.weight.detach().double()
    matrix = weight.T if kind in ("embedding", "transformers Conv1D") else weight.flatten(1)
    product = (one.lora_up.flatten(1) @ one.lora_down.flatten(1)).double()
    if init == "pissa":
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        assert close(0.5 * product, left[:, :4] * values[:4] @ right[:4])
        assert close(one.lora_up.flatten(1).norm(dim=0), one.lora_down.flatten(1).norm(dim=1))
    else:
        q, r = torch.linalg.qr(matrix)
        assert close(product, q[:, :4] @ r[:4])
    one.lora_up.data *= 2
    assert not close(net(x), base)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("init", [*INITS, "pissa_niter_2"])
def test_a_start_changes_nothing_and_is_a_function_of_the_seed(init: str, method: str) -> None:
    model, x = mlp(), draw(5, 24)
    base, stream = model(x), torch.get_rng_state()
    states = []
    for seed in (0, 0, 1):
        adapters = started(model, init, method, seed)
        assert close(model(x), base)
        states.append(adapters.state()["net.second"]["lora_down.weight"])
        assert states[-1].any()
        adapters.detach()
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2]) == (init in ("pissa", "olora"))
    assert torch.equal(torch.get_rng_state(), stream)


def test_random_starts_have_pefts_spread() -> None:
    model = nn.Sequential(nn.Linear(4000, 8))
    for init, setting in (("kaiming", True), ("gaussian", "gaussian"), ("orthogonal", "orthogonal")):
        (mine,) = started(copy.deepcopy(model), init).adapters
        other = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=setting)
        ).base_model.model[0]
        spread = [down.std().item() for down in (mine.lora_down, other.lora_A["default"].weight)]
        assert spread[0] == pytest.approx(spread[1], rel=0.4 if init == "orthogonal" else 0.05)
        assert bool(mine.lora_up.any()) == bool(other.lora_B["default"].weight.any()) == (init == "orthogonal")


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_the_randomised_svd_is_torchs(shape: tuple[int, int]) -> None:
    matrix = draw(*shape)
    left, values, right = svd_lowrank(matrix, 6, 3, torch.Generator().manual_seed(5))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        their_left, their_values, their_right = torch.svd_lowrank(matrix, 6, niter=3)
    assert close(values, their_values)
    assert close((left * values) @ right, (their_left * their_values) @ their_right.T)


@pytest.mark.parametrize(
    ("init", "kind", "rank", "message"),
    [
        ("pisa", "linear", 4, "Did you mean pissa"),
        ("eva", "linear", 4, "call initialise_from_activations"),
        ("loftq", "linear", 4, "call initialise_from_originals"),
        ("orthogonal", "linear", 3, "an even one"),
        ("pissa", "linear", 9, "only 8 directions"),
        ("olora", "conv2d grouped", 4, "grouped convolution"),
    ],
)
def test_what_a_start_cannot_do_is_refused(init: str, kind: str, rank: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(net_of(kind)[0], "lora", {"init": init}, rank=rank)


# -- EVA --------------------------------------------------------------------------------------


def batches() -> list[Tensor]:
    """Inputs whose variance falls quickly from component to component, so that its estimate settles."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q * 0.6 ** torch.arange(24)[:, None]
    return [torch.randn(60, 24, generator=generator) @ mix + 0.3 for _ in range(4)]


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_equals_peft(rho: float) -> None:
    from peft.tuners.lora.eva import get_eva_state_dict

    ours, data = mlp(), batches()
    if rho > 1:  # the third layer's inputs are close to a line: it needs one rank
        ours.second.weight[1:] = ours.second.weight[0]
    other = theirs(copy.deepcopy(ours), init_lora_weights="eva", eva_config=peft.EvaConfig(rho=rho))
    found = get_eva_state_dict(
        other,
        data,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    base = ours(data[0])
    adapters = initialise_from_activations(started(ours), (ours(x) for x in itertools.cycle(data)), rho=rho)
    assert close(ours(data[0]), base)
    assert sum(one.config.rank for one in adapters.adapters) == 3 * RANK
    assert (len({one.config.rank for one in adapters.adapters}) == 1) == (rho == 1)
    for name, vectors in found.items():
        one = dict(adapters.items()).get(f"net.{name.removeprefix('base_model.model.')}")
        if one is None:
            assert len(vectors) == 0
            continue
        assert len(vectors) == one.config.rank
        assert one.scale == ALPHA / RANK
        # the same components up to their signs; both are estimates
        assert ((one.lora_down * vectors).sum(1).abs() > 0.99).all()


def test_eva_finds_the_principal_components_of_all_rows() -> None:
    """Against a float64 SVD of everything at once; and three layers that read one tensor follow it once."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(24, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x) * self.v(x)

    model, data = Three(), batches()
    added: list[int] = []
    adapters = initialise_from_activations(
        started(model), (model(x) for x in data), rho=1, tau=1.1, rows=lambda x: (added.append(len(x)), x)[1]
    )
    assert added == [60] * len(data)
    rows = torch.cat(data).double()
    right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:RANK]
    for one in adapters.adapters:
        assert ((one.lora_down.double() * right).sum(1).abs() > 1 - 1e-3).all()


def test_eva_leaves_other_adapters_and_says_what_it_needs() -> None:
    model, data = mlp(), batches()
    plan = AdapterPlan(("re:.*",), config=AdapterConfig("lora", RANK), overrides={"third": {"method": "diff"}})
    adapters = inject({"net": model}, plan, {})
    again = initialise_from_activations(adapters, (model(x) for x in data), rho=1)
    assert list(again.adapters)[2] is list(adapters.adapters)[2]
    again.detach()
    base = model(data[0])
    again = initialise_from_activations(started(model, "pissa", "dora"), (model(x) for x in data))
    assert close(model(data[0]), base)
    with pytest.raises(ConfigError, match="read nothing in a forward pass"):
        initialise_from_activations(again, [])
    with pytest.raises(ConfigError, match="rho is 0.5"):
        initialise_from_activations(again, [], rho=0.5)
    again.detach()
    with pytest.raises(ConfigError, match="the set has none"):
        initialise_from_activations(adapted(model, "diff"), [])


# -- LoftQ ------------------------------------------------------------------------------------


def test_loftq_brings_a_quantised_model_closer_to_the_original() -> None:
    original, x = mlp(), draw(50, 24)
    model = mlp()
    for name in LINEARS:
        setattr(model, name, ZeroPointLinear.from_linear(getattr(original, name), bits=3, group_size=8))
    expected, quantised = original(x), model(x)
    adapters = started(model)
    weights = {f"net.{name}": getattr(original, name).weight for name in LINEARS}
    initialise_from_originals(adapters, weights)
    assert (model(x) - expected).norm() < 0.8 * (quantised - expected).norm()
    for name, one in adapters.items():
        layer = model.get_submodule(name[4:])
        residual = weights[name] - layer.scales.repeat_interleave(8, 1) * (
            layer.qweight - layer.zeros.repeat_interleave(8, 1)
        )
        left, values, right = torch.linalg.svd(residual, full_matrices=False)
        assert close(one.scale * one.lora_up @ one.lora_down, left[:, :RANK] * values[:RANK] @ right[:RANK])
    with pytest.raises(ConfigError, match=r"net\.first: LoftQ needs the original weight"):
        initialise_from_originals(adapters, {})
    adapters.detach()
    with pytest.raises(ConfigError, match="exclude each other"):
        initialise_from_originals(started(model, "pissa"), weights)
    with pytest.raises(ConfigError, match="the set has none"):
        initialise_from_originals(started(original), weights)


# -- LoRA-FA and LoRA+ ------------------------------------------------------------------------


def pairs(adapters: AdapterSet, other: peft.PeftModel) -> Iterator[tuple[nn.Module, nn.Module]]:
    for name, one in adapters.items():
        yield one, getattr(other.base_model.model, name.removeprefix("net."))


def test_lora_fa_steps_as_in_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # it rounds the projection to bf16 otherwise
    ours, x = mlp().double(), draw(5, 24).double()
    adapters, other = started(ours, freeze_down=True).double(), theirs(mlp()).double()
    theirs_optimizer = create_lorafa_optimizer(other, r=RANK, lora_alpha=int(ALPHA), lr=0.01)
    with torch.no_grad():
        for mine, its in pairs(adapters, other):
            mine.lora_up.copy_(draw(*mine.lora_up.shape))
            its.lora_B["default"].weight.copy_(mine.lora_up)
            its.lora_A["default"].weight.copy_(mine.lora_down)
    # their epsilon acts before the correction of the bias, torch's after it
    theirs_optimizer.param_groups[0]["eps"] = 0.0
    optimizer = torch.optim.AdamW(adapters.parameter_groups(0.01), eps=0.0, weight_decay=0)
    for _ in range(3):
        for model, one in ((ours, optimizer), (other, theirs_optimizer)):
            one.zero_grad()
            (5 * model(x)).sin().sum().backward()
            one.step()
    for mine, its in pairs(adapters, other):
        assert mine.lora_down.grad is None
        assert close(mine.lora_up, its.lora_B["default"].weight)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d grouped"])
def test_lora_fa_takes_the_step_nearest_to_full_training(kind: str) -> None:
    """The projected gradient of up makes scale * d(up) @ down the projection of dL/dW on down's rows."""
    net, x = net_of(kind)
    adapters = adapted(net, "lora", {"freeze_down": True})
    (one,) = adapters.adapters
    weight = net.layer.weight.requires_grad_()
    net(x).sin().sum().backward()
    groups = one.spec.groups
    down = one.lora_down.detach().reshape(groups, 4 // groups, -1)
    full = weight.grad.reshape(groups, -1, down.shape[-1])
    nearest = full @ down.mT @ torch.linalg.inv(down @ down.mT) @ down
    step = one.lora_up.grad.reshape(groups, -1, 4 // groups) @ down
    assert close(one.scale * step, nearest)


def test_lora_plus_has_pefts_rates() -> None:
    from peft.optimizers import create_loraplus_optimizer

    other = theirs(mlp())
    optimizer = create_loraplus_optimizer(other, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    names = {id(parameter): name for name, parameter in other.named_parameters()}
    expected = {
        "up" if "lora_B" in names[id(p)] else "down": g["lr"] for g in optimizer.param_groups for p in g["params"]
    }
    adapters = started(mlp(), lr_ratio=16.0)
    names = {id(parameter): name for name, parameter in adapters.named_parameters()}
    found = {names[id(p)].split("_")[-1]: g["lr"] for g in adapters.parameter_groups(1e-3) for p in g["params"]}
    assert found == pytest.approx(expected)
    assert found == pytest.approx({"down": 1e-3, "up": 16e-3})
