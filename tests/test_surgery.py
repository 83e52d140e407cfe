"""Rank surgery: the function, the moments and the resumed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layers import LAYERS, adapted, close, net_of
from torch import Tensor, nn

from studio.adapters import (
    AdapterConfig,
    AdapterPlan,
    AdapterSet,
    RankSchedule,
    WeightView,
    attach_adapters,
    grow,
    inject,
    rebalance,
    shrink,
)
from studio.errors import ConfigError

KINDS = [kind for kind in LAYERS if kind not in ("norm", "group norm", "experts")]
CASES = [("lora", kind) for kind in KINDS] + [("dora", kind) for kind in KINDS if kind != "conv2d grouped"]


def factors(adapters: AdapterSet) -> tuple[nn.Parameter, nn.Parameter]:
    """lora_up and lora_down of the only layer."""
    (adapter,) = adapters.adapters
    return adapter.lora_up, adapter.lora_down


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    """Linear in the output: the gradient of dW is the same whatever the adapter is."""
    y = net(x)
    return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum()


def with_moments(net: nn.Module, x: Tensor, adapters: AdapterSet, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW after a step of length zero."""
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.0, betas=betas)
    adapters.zero_grad()
    loss_of(net, x).backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_growing_and_rebalancing_keep_the_function(method: str, kind: str) -> None:
    net, x = net_of(kind)
    adapters = adapted(net, method, rslora=True)
    up, down = factors(adapters)
    before = net(x)
    grow(adapters, 8)
    assert close(net(x), before)
    assert factors(adapters)[0] is up
    assert (len(down), up.shape[1] * adapters.adapters[0].spec.groups) == (8, 8)
    rebalance(adapters)
    assert close(net(x), before)
    state = adapters.state()  # alpha in the file is that of the rank there
    adapters.detach()
    attach_adapters({"net": net}, state)
    assert close(net(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_shrinking_keeps_the_best_approximation(kind: str) -> None:
    """Against the SVD of the full matrix, group by group, in float64."""
    net, _ = net_of(kind)
    adapters = adapted(net, rank=8)
    (adapter,) = adapters.adapters
    groups, weight = adapter.spec.groups, WeightView(adapters.targets[adapters.names[0]])
    full = adapter.delta_weight(weight).detach().double().reshape(groups, adapter.spec.weight_shape[0] // groups, -1)
    left, values, right = torch.linalg.svd(full, full_matrices=False)
    kept = 4 // groups
    best = (left[..., :kept] * values[:, None, :kept]) @ right[:, :kept]
    report = shrink(adapters, 4)
    assert close(adapter.delta_weight(weight).reshape(full.shape), best)
    assert report.ranks == {adapters.names[0]: 4}
    share = values[:, :kept].square().sum() / values.square().sum()
    assert abs(report.energy[adapters.names[0]] - share.item()) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d grouped", "embedding"])
def test_balanced_factors_are_those_of_the_svd(kind: str) -> None:
    net, _ = net_of(kind)
    adapters = adapted(net)
    rebalance(adapters)
    up, down = factors(adapters)
    groups = adapters.adapters[0].spec.groups
    up, down = up.reshape(groups, -1, up.shape[1]), down.reshape(groups, len(down) // groups, -1)
    products = up.mT @ up
    assert close(products, down @ down.mT)
    assert close(products, torch.diag_embed(products.diagonal(dim1=1, dim2=2)))


def test_energy_decides_the_rank() -> None:
    net, x = net_of("linear")
    adapters = adapted(net, rank=4)
    up, down = factors(adapters)
    with torch.no_grad():  # singular values 8, 4, 2, 1
        up.copy_(torch.linalg.qr(torch.randn(8, 4)).Q * torch.tensor([8.0, 4, 2, 1]))
        down.copy_(torch.linalg.qr(torch.randn(12, 4)).Q.T)
    report = shrink(adapters, energy=80 / 85 - 1e-6)
    assert report.ranks == {"net.layer": 2}
    assert abs(report.energy["net.layer"] - 80 / 85) < 1e-6
    assert "rank 2 in 1 layers keeps 94.12%" in str(report)
    before = net(x)
    assert shrink(adapters, energy=1.0).ranks == {"net.layer": 2}
    assert close(net(x), before)


OPERATIONS: dict[str, Callable[[AdapterSet, torch.optim.Optimizer], object]] = {
    "grow": lambda adapters, optimizer: grow(adapters, 12, optimizer),
    "shrink": lambda adapters, optimizer: shrink(adapters, 4, optimizer=optimizer),
    "rebalance": rebalance,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d grouped", "embedding"])
def test_first_moments_are_those_of_the_new_factors(kind: str, operation: str) -> None:
    """With beta1 = 0, exp_avg is the gradient: it must be the one that the changed factors have."""
    net, x = net_of(kind)
    adapters = adapted(net, rank=8)
    optimizer = with_moments(net, x, adapters, (0.0, 0.9))
    OPERATIONS[operation](adapters, optimizer)
    assert all(parameter.grad is None for parameter in adapters.parameters())
    loss_of(net, x).backward()
    groups = adapters.adapters[0].spec.groups
    for factor, dim in zip(factors(adapters), (1, 0), strict=True):
        moment = optimizer.state[factor]["exp_avg"]
        assert moment.shape == factor.shape
        old = factor.shape[dim] // (groups if dim == 0 else 1)  # ranks in each group
        kept = 8 // groups if operation == "grow" else old
        by_group = [one.unflatten(dim, (-1, old)).narrow(dim + 1, 0, kept) for one in (moment, factor.grad)]
        assert close(*by_group)
        assert not moment.unflatten(dim, (-1, old)).narrow(dim + 1, kept, old - kept).any()


def test_second_moments_are_exact_where_only_lengths_change() -> None:
    """Factors along the singular directions already: T is diagonal. With beta2 = 0, exp_avg_sq is g^2."""
    net, x = net_of("linear")
    adapters = adapted(net)
    up, down = factors(adapters)
    with torch.no_grad():
        up.copy_(torch.linalg.qr(torch.randn(8, 4)).Q * torch.tensor([8.0, 4, 2, 1]))
        down.copy_(torch.linalg.qr(torch.randn(12, 4)).Q.T * torch.tensor([[0.5], [0.7], [0.9], [1.1]]))
    optimizer = with_moments(net, x, adapters, (0.0, 0.0))
    rebalance(adapters, optimizer)
    loss_of(net, x).backward()
    for factor in (up, down):
        assert close(optimizer.state[factor]["exp_avg_sq"], factor.grad.square())


def test_new_ranks_take_steps_of_the_usual_length() -> None:
    """A second moment of zero would make the first steps of a new rank several times too long."""
    longest = {}
    for start in ("the mean", "zero"):
        net, x = net_of("linear")
        adapters = adapted(net, rank=2)
        optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-3, weight_decay=0.0)

        def step(net: nn.Module = net, x: Tensor = x, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            loss_of(net, x).backward()
            optimizer.step()

        for _ in range(400):
            step()
        grow(adapters, 4, optimizer)
        up, _ = factors(adapters)
        if start == "zero":
            optimizer.state[up]["exp_avg_sq"][:, 2:] = 0
        lengths = []
        for _ in range(20):
            before = up.detach().clone()
            step()
            lengths.append(float((up.detach() - before)[:, 2:].abs().max()) / 1e-3)
        longest[start] = max(lengths)
    assert longest["the mean"] < 1.5
    assert longest["zero"] > 3


def test_ranks_that_add_nothing_start_again() -> None:
    """Both factors of a rank at zero would stay there; and what never trained is left alone."""
    net, x = net_of("linear")
    adapters = adapted(net)
    grow(adapters, 6)
    before = net(x)
    rebalance(adapters, seed=5)
    assert close(net(x), before)
    up, down = factors(adapters)
    assert not up[:, 4:].any()
    assert down[4:].norm(dim=1).min() > 0.1
    fresh = inject({"net": net}, AdapterPlan(("layer",), config=AdapterConfig(rank=4)), {})
    own = factors(fresh)[1].clone()
    rebalance(fresh)
    assert torch.equal(factors(fresh)[1], own)


def test_the_norm_of_dora_is_not_remembered_across_surgery() -> None:
    net, x = net_of("linear")
    adapters = adapted(net, "dora", rank=8)
    net(x)
    shrink(adapters, 2)
    grow(adapters, 8)
    weight = WeightView(adapters.targets["net.layer"])
    assert close(
        net(x), nn.functional.linear(x, net.layer.weight + adapters.adapters[0].delta_weight(weight), net.layer.bias)
    )


def test_an_anchored_adapter_grows_and_is_rebalanced() -> None:
    net, x = net_of("linear")
    adapters = adapted(net, options={"init": "pissa"})
    before = net(x)
    grow(adapters, 6)
    rebalance(adapters)
    assert close(net(x), before)
    with pytest.raises(ConfigError, match=r"net.layer: what init 'pissa' started from"):
        shrink(adapters, 2)


# -- schedules and resuming -----------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.conv(x)).mean((2, 3)))


class Run:
    """A training run whose batches are a function of the step."""

    def __init__(self, method: str, ranks: dict[int, int]) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = Toy().requires_grad_(False)
        config = AdapterConfig(method, ranks[0], alpha=5.0, rslora=True)
        self.adapters = inject({"net": self.net}, AdapterPlan(("re:.*",), config=config), {}, seed=2)
        self.optimizer = torch.optim.AdamW(self.adapters.parameter_groups(1e-2), lr=1e-2)
        self.schedule = RankSchedule(ranks, seed=2)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(4, 3, 5, 5, generator=generator), torch.randn(4, 5, generator=generator)
            self.optimizer.zero_grad()
            (self.net(x) - y).square().mean().backward()
            self.optimizer.step()
            self.schedule.after_step(self.adapters, step, self.optimizer)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("stop", [3, 5, 8, 13])
def test_a_resumed_schedule_gives_the_same_bits(method: str, stop: int, tmp_path: Path) -> None:
    ranks = {0: 3, 5: 7, 9: 10, 12: 6}
    undisturbed = Run(method, ranks)
    undisturbed.train(0, 15)
    first = Run(method, ranks)
    first.train(0, stop)
    torch.save([first.adapters.state_dict(), first.optimizer.state_dict()], tmp_path / "state.pt")
    second = Run(method, ranks)
    adapters, optimizer = torch.load(tmp_path / "state.pt", weights_only=True)
    second.adapters.load_state_dict(adapters)
    second.optimizer.load_state_dict(optimizer)
    assert {len(one.lora_down) for one in second.adapters.adapters} == {second.schedule.rank_at(stop)}
    second.train(stop, 15)
    mine, theirs = second.adapters.state_dict(), undisturbed.adapters.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert {len(one.lora_down) for one in second.adapters.adapters} == {6}
    state = undisturbed.optimizer.state_dict()["state"]
    for place, tensors in second.optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, state[place][name]) for name, tensor in tensors.items())
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(9))
    assert torch.equal(second.net(x), undisturbed.net(x))  # the scale, too


def test_a_schedule_is_checked_after_the_first_step() -> None:
    for ranks, message in (({5: 8}, "no step 0"), ({0: 0}, "rank 0 at step 0"), ({0: 4, -1: 2}, "rank 2 at step -1")):
        with pytest.raises(ConfigError, match=message):
            RankSchedule(ranks)
    schedule = RankSchedule({0: 4, 500: 8, 1000: 16})
    assert [schedule.rank_at(step) for step in (0, 499, 500, 700, 1000, 5000)] == [4, 4, 8, 8, 16, 16]
    adapters = adapted(net_of("conv2d grouped")[0])
    schedule.after_step(adapters, 0, None)
    with pytest.raises(ConfigError, match=r"net.layer: the rank cannot become 6; choose a multiple of 4"):
        RankSchedule({0: 4, 500: 6}).after_step(adapters, 0, None)


def test_what_cannot_be_changed_is_refused_and_nothing_is() -> None:
    net, x = net_of("linear")
    adapters = adapted(net)
    with pytest.raises(ConfigError, match="energy is 1.5"):
        shrink(adapters, energy=1.5)
    with pytest.raises(TypeError):
        shrink(adapters)
    with pytest.raises(ConfigError, match="the rank cannot become 0"):
        shrink(adapters, 0)
    with adapters.merged(), pytest.raises(RuntimeError, match="unmerge"):
        grow(adapters, 8)
    optimizer = torch.optim.Rprop(adapters.parameters(), lr=1e-3)
    loss_of(net, x).backward()
    optimizer.step()
    with pytest.raises(ConfigError, match="Rprop keeps 'prev'"):
        grow(adapters, 8, optimizer)
    assert len(factors(adapters)[1]) == 4
    with pytest.raises(ConfigError, match="net.layer: the rank of 'loha' is fixed"):
        grow(adapted(net, "loha"), 8)
    with pytest.raises(ConfigError, match="net.layer: lora_down is frozen"):
        rebalance(adapted(net, options={"freeze_down": True}))
