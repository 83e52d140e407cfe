"""AdaLoRA: peft's scores, budgets and masks step by step; and ranks that really leave."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layers import close
from torch import Tensor, nn

from studio.adapters import AdapterPlan, AdapterSet, attach_adapters, inject
from studio.adapters.base import AdapterConfig
from studio.errors import ConfigError

LAYERS = ("conv", "first", "second")
STEPS = 30
SCHEDULE = {"target_rank": 2, "tinit": 4, "tfinal": 6, "delta_t": 2, "total_steps": STEPS}


class Small(nn.Module):
    """A convolution and two linear layers; returns its loss as peft wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.first = nn.Linear(16, 10)
        self.second = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> SimpleNamespace:
        h = self.conv(x).tanh().mean((1,)).flatten(1)  # (B, 16)
        logits = self.second(self.first(h).tanh())
        return SimpleNamespace(logits=logits, loss=logits.sin().square().mean())


def small() -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small().double().requires_grad_(False)


def batch(step: int) -> Tensor:
    return torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def adalora(net: nn.Module, rank: int = 6, **options: Any) -> AdapterSet:
    config = AdapterConfig("adalora", rank, 3.0, options={**SCHEDULE, **options})
    return inject({"net": net}, AdapterPlan(("re:.*",), config=config), {}).double()


def train(net: nn.Module, adapters: AdapterSet, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    """The loss of each step."""
    losses = []
    for step in steps:
        loss = net(batch(step)).loss + (adapters.penalty() or 0)
        loss.backward()
        optimizer.step()
        adapters.after_step(step, optimizer)
        optimizer.zero_grad()
        losses.append(loss)  # alive, with its graph, as in most training loops
    return losses


def adam(adapters: AdapterSet) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adapters.parameters(), lr=0.02)


def size(adapters: AdapterSet, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """(elements of the parameters, elements of the optimizer's state)."""
    state = [one for entry in optimizer.state.values() for one in entry.values() if isinstance(one, Tensor)]
    return sum(one.numel() for one in adapters.parameters()), sum(one.numel() for one in state)


class Peft:
    """The same model under peft's tuner itself, which applies the penalty without a task type."""

    def __init__(self, net: nn.Module, adapters: AdapterSet, orth_reg_weight: float) -> None:
        from peft import AdaLoraConfig
        from peft.tuners.adalora import AdaLoraModel

        config = AdaLoraConfig(
            init_r=6,
            target_r=2,
            tinit=4,
            tfinal=6,
            deltaT=2,
            total_step=STEPS,
            lora_alpha=3,
            orth_reg_weight=orth_reg_weight,
            target_modules=list(LAYERS),
        )
        self.model = AdaLoraModel(net, config, "default").double()
        self.layers = {name: getattr(self.model.model, name) for name in LAYERS}
        for name, adapter in adapters.items():
            layer = self.layers[name.removeprefix("net.")]
            for own, theirs in (("lora_down", "lora_A"), ("lora_up", "lora_B"), ("lora_e", "lora_E")):
                parameter = getattr(layer, theirs)["default"]
                parameter.data.copy_(getattr(adapter, own).reshape(parameter.shape))
        trained = [one for name, one in self.model.named_parameters() if "lora_" in name]
        self.optimizer = torch.optim.AdamW(trained, lr=0.02)

    def step(self, step: int) -> Tensor:
        loss = self.model(batch(step)).loss
        loss.backward()
        self.optimizer.step()
        self.model.update_and_allocate(step)
        self.optimizer.zero_grad()
        return loss

    def scores(self, name: str) -> Tensor:
        """The importance of each triplet of a layer, from peft's running statistics."""
        allocator = self.model.rankallocator
        down, up, e = (allocator._element_score(f"{name}.lora_{letter}.default") for letter in "ABE")
        return e.flatten() + down.mean(1) + up.mean(0)

    def values(self, name: str) -> Tensor:
        return self.layers[name].lora_E["default"].detach().flatten()


@pytest.mark.parametrize(("orth_reg_weight", "patience", "compared"), [(0.0, None, STEPS), (0.5, 10, 25)])
def test_thirty_steps_are_those_of_peft(
    orth_reg_weight: float, patience: int | None, compared: int, monkeypatch: Any
) -> None:
    """Losses, scores, thresholds, budgets and masks, in float64.

    Once the final phase begins (step 24) peft's masked vectors stay in its penalty, and ours are gone: with
    a penalty the comparison ends there. The default patience of 10 budget steps is not exhausted before.
    """
    net = small()
    adapters = adalora(net, patience=patience, orth_reg_weight=orth_reg_weight)
    peft = Peft(small(), adapters, orth_reg_weight)
    optimizer, options = adam(adapters), adapters.adapters[0].options
    allocations: list[tuple[int, float]] = []
    find, mask = torch.kthvalue, peft.model.rankallocator.mask_to_budget

    def masked(model: nn.Module, budget: int) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "kthvalue", lambda *a, **k: seen.append(find(*a, **k)) or seen[-1])
            pattern = mask(model, budget)
        allocations.append((budget, float(seen[-1].values)))
        return pattern

    seen: list[Any] = []
    monkeypatch.setattr(peft.model.rankallocator, "mask_to_budget", masked)
    came_back = False
    for step in range(compared):
        before, scores = len(allocations), [one.scores() for one in adapters.adapters]
        (loss,) = train(net, adapters, optimizer, range(step, step + 1))
        assert torch.allclose(loss, peft.step(step), rtol=1e-6)
        if step < options.final_step:
            for (name, adapter), old in zip(adapters.items(), scores, strict=True):
                theirs = peft.scores(f"{name.removeprefix('net.')}")
                assert torch.allclose(adapter.scores(), theirs, rtol=1e-5, atol=0)
                assert not torch.equal(adapter.scores(), old)
        for name, adapter in adapters.items():
            theirs = peft.values(name.removeprefix("net."))
            if step >= options.final_step:
                theirs = theirs[theirs != 0]
                assert torch.allclose(adapter.lora_e.flatten()[: len(theirs)], theirs, rtol=1e-5)
                assert len(adapter.lora_e) == max(1, len(theirs))
            else:
                came_back |= bool(((adapter.masked > 0) & (adapter.lora_e.flatten() != 0)).any())
                assert torch.equal(adapter.lora_e.flatten() == 0, theirs == 0)
                assert torch.allclose(adapter.lora_e.flatten(), theirs, rtol=1e-5)
        if len(allocations) > before and step < options.final_step:
            budget, threshold = allocations[-1]
            everything = torch.cat([one.scores() for one in adapters.adapters])
            assert options.budget(step, 18, 6) == budget
            assert torch.isclose(everything.kthvalue(18 - budget).values.float(), torch.tensor(threshold), rtol=1e-5)
    assert [budget for budget, _ in allocations] == [14, 12, 10, 8, 7, 6, 6, 6, 6, 6][: len(allocations)]
    assert came_back  # a masked triplet trains on between two budget steps


def test_the_penalty_is_the_loss_term_of_peft() -> None:
    net = small()
    adapters = adalora(net)
    x, bare = batch(0), small()
    theirs = Peft(copy.deepcopy(bare), adapters, 0.5).model(x).loss
    assert torch.allclose(adapters.penalty(), theirs - bare(x).loss, rtol=1e-12)
    assert adalora(small(), orth_reg_weight=0.0).penalty() is None


def test_pruned_triplets_leave_parameters_and_optimizer_without_a_change_of_the_function() -> None:
    net = small()
    adapters = adalora(net, patience=2)
    optimizer = adam(adapters)
    sizes = [size(adapters, optimizer)]
    x = batch(99)
    for step in range(STEPS):
        loss = net(batch(step)).loss + adapters.penalty()
        loss.backward()
        optimizer.step()
        full = copy.deepcopy(adapters.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
        for adapter in adapters.adapters:
            adapter.prune(torch.zeros(len(adapter.masked), dtype=torch.bool), optimizer)  # nothing to do
        assert all(torch.equal(one, full[0][name]) for name, one in adapters.state_dict().items())
        adapters.after_step(step, optimizer)
        sizes.append(size(adapters, optimizer))
        if sizes[-1] < sizes[-2] and step > 0:
            kept = [adapter.lora_e.detach() for adapter in adapters.adapters]
            assert all(len(one) >= 1 for one in kept)
            for number, entry in optimizer.state_dict()["state"].items():
                parameter = list(adapters.parameters())[number]
                assert entry["exp_avg"].shape == entry["exp_avg_sq"].shape == parameter.shape
                known = full[1][number]["exp_avg"].flatten()
                assert torch.isin(entry["exp_avg"], known).all()
        optimizer.zero_grad()
    ranks = [len(one.lora_e) for one in adapters.adapters]
    assert sum(ranks) == 6
    assert len({sizes[0][0], *[one for one, _ in sizes]}) >= 4  # several times on the way, not at the end alone
    assert all(later <= earlier for earlier, later in pairwise(sizes[1:]))
    assert sizes[-1][1] < 0.5 * sizes[1][1]
    output = net(x).logits
    entry = adapters.state()
    adapters.detach()
    attach_adapters({"net": net}, entry)
    assert close(net(x).logits, output)
    assert {name: len(one["lora_down.weight"]) for name, one in entry.items()} == dict(zip(entry, ranks, strict=True))


def test_masking_and_pruning_give_the_same_output() -> None:
    net = small()
    adapters = adalora(net)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    low = torch.tensor([True, False, True, False, False, True])
    with torch.no_grad():
        for adapter in adapters.adapters:
            adapter.mask(low)
    masked = net(batch(0)).logits
    for adapter in adapters.adapters:
        adapter.prune(low, None)
        assert adapter.lora_down.shape[0] == adapter.lora_up.shape[1] == len(adapter.lora_e) == 3
    assert torch.allclose(net(batch(0)).logits, masked, rtol=1e-12)


def test_a_run_goes_on_after_pruning_as_if_it_had_not_stopped() -> None:
    net, other = small(), small()
    adapters = adalora(net, patience=1)
    optimizer = adam(adapters)
    train(net, adapters, optimizer, range(15))
    saved = copy.deepcopy((adapters.state_dict(), optimizer.state_dict()))
    resumed = adalora(other, patience=1)
    resumed_optimizer = adam(resumed)
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    assert size(resumed, resumed_optimizer) == size(adapters, optimizer)
    expected = train(net, adapters, optimizer, range(15, STEPS))
    assert all(map(torch.equal, train(other, resumed, resumed_optimizer, range(15, STEPS)), expected))
    assert all(map(torch.equal, resumed.parameters(), adapters.parameters()))


@pytest.mark.parametrize(("rank", "target"), [(4, 4), (1, 1), (1, None), (6, 1)])
def test_ranks_at_the_edge(rank: int, target: int | None) -> None:
    """peft fails where the target is the first rank."""
    net = small()
    adapters = adalora(net, rank, target_rank=target)
    losses = train(net, adapters, adam(adapters), range(STEPS))
    assert losses[-1] < losses[0]
    assert sum(len(one.lora_e) for one in adapters.adapters) in (3 * (target or 1), 3, 4)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="target_rank 8 is above the rank 6"):
        adalora(small(), target_rank=8)
    with pytest.raises(ConfigError, match="leave none of the 30 steps"):
        adalora(small(), tinit=24)
    with pytest.raises(ConfigError, match="beta1 is 1.0"):
        adalora(small(), beta1=1.0)
    adapters = adalora(small(), total_steps=None)
    with pytest.raises(ConfigError, match="total_steps"):
        adapters.after_step(0)
    other = {"*first": {"options": {**SCHEDULE, "tinit": 5}}}
    plan = AdapterPlan(("re:.*",), config=AdapterConfig("adalora", 6, options=SCHEDULE), overrides=other)
    with pytest.raises(ConfigError, match="share one budget"):
        inject({"net": small()}, plan, {})


def test_an_optimizer_that_cannot_follow_is_named_at_the_first_step() -> None:
    net = small()
    adapters = adalora(net)
    optimizer = torch.optim.Adafactor(adapters.parameters())
    with pytest.raises(ConfigError, match="Adafactor keeps"):
        train(net, adapters, optimizer, range(1))


def test_several_processes_are_refused_at_the_first_step(monkeypatch: Any) -> None:
    """A wrapper such as DDP would no longer reduce the gradient of a parameter that has changed its shape."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="several processes"):
        adalora(small()).after_step(0)
