"""Several adapters by name; and mixed batches for every method on every kind of layer."""

from __future__ import annotations

import time

import pytest
import torch
from layers import LAYERS, adapted, cases, close, net_of, randomise
from torch import Tensor, nn

from studio.adapters import (
    AdapterConfig,
    AdapterPlan,
    AdapterSet,
    AdapterStack,
    attach_adapters,
    inject,
    mixed_batch,
    named_targets,
)
from studio.errors import ConfigError

CALLED = [kind for kind in LAYERS if next(iter(named_targets({"net": net_of(kind)[0]}).values())).spec.called]


def stack_on(net: nn.Module, method: str = "lora", names: tuple[str, ...] = ("cat", "dog")) -> AdapterStack:
    """Random adapters, each with values of its own."""
    stack = AdapterStack()
    for seed, name in enumerate(names, start=1):
        randomise(stack.add(name, adapted(net, method)), seed)
    return stack


@pytest.mark.parametrize(("method", "kind"), [case for case in cases() if case[1] in CALLED])
def test_rows_of_a_mixed_batch_are_those_of_single_adapters(method: str, kind: str) -> None:
    """Outputs, and the gradients of each adapter, in float64."""
    net, x = net_of(kind)
    net, x = net.double(), x.double() if x.is_floating_point() else x
    x = torch.cat([x, x.flip(0)])[:4]
    stack, names = stack_on(net, method), ("dog", "cat", None, "dog")
    for adapters in stack.values():
        adapters.double()
    weights = torch.randn(net(x).shape, generator=torch.Generator().manual_seed(5)).double()
    expected, gradients = torch.zeros_like(weights), {}
    for name in (None, "cat", "dog"):
        mine = [place for place, one in enumerate(names) if one == name]
        stack.activate([] if name is None else name)
        output = net(x)[mine]
        expected[mine] = output.detach()
        if name is not None:
            (output * weights[mine]).sum().backward()
            gradients[name] = [one.grad.clone() for one in stack[name].parameters() if one.requires_grad]
            stack[name].zero_grad()
    with stack.rows(names):
        together = net(x)
        (together * weights).sum().backward()
    assert close(together.detach(), expected)
    for name, known in gradients.items():
        trained = [one for one in stack[name].parameters() if one.requires_grad]
        assert all(close(one.grad, gradient) for one, gradient in zip(trained, known, strict=True))
    with torch.no_grad(), stack.rows(names):  # the path of generating: stacked factors are kept between calls
        assert close(net(x), expected)
        assert close(net(x), expected)


@pytest.mark.parametrize(("first", "second"), [("lora", "dora"), ("dora", "loha"), ("oft", "lora"), ("lora", "ia3")])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv2d"])
def test_a_set_that_is_not_named_acts_on_all_rows(first: str, second: str, kind: str) -> None:
    """Different methods on one layer, with `mixed_batch` itself."""
    net, x = net_of(kind)
    adapted(net, first)
    some = adapted(net, second)
    randomise(some, 2)
    with torch.no_grad():
        both = net(x)
        some.enabled = False
        one = net(x)
        some.enabled = True
        with mixed_batch([None, some, None][: len(x)]):
            rows = net(x)
    assert close(rows[1], both[1])
    assert close(rows[0], one[0])


@pytest.mark.parametrize(("method", "kind"), [case for case in cases() if case[1] not in CALLED])
def test_a_weight_for_the_whole_batch_refuses_rows(method: str, kind: str) -> None:
    net, x = net_of(kind)
    stack = stack_on(net, method)
    with pytest.raises(ConfigError, match="one weight for the whole batch"), stack.rows(["cat", None, "dog"][: len(x)]):
        net(x)


def test_a_merged_set_refuses_rows() -> None:
    net, x = net_of("linear")
    stack = stack_on(net)
    stack["cat"].merge()
    with pytest.raises(ConfigError, match="merged"), stack.rows(["cat", None, "dog"]):
        net(x)


def test_activating_by_name() -> None:
    net, x = net_of("linear")
    base = net(x)
    stack = stack_on(net, names=("cat", "dog", "owl"))
    effects = {}
    for name in stack:
        stack.activate(name)
        assert stack.active == {name: 1.0}
        effects[name] = net(x) - base
    stack.activate(["cat", "owl"])
    assert close(net(x), base + effects["cat"] + effects["owl"])
    stack.activate({"dog": 0.5, "owl": -1})
    assert stack.active == {"dog": 0.5, "owl": -1}
    assert close(net(x), base + 0.5 * effects["dog"] - effects["owl"])
    stack.activate(["dog"])  # with the strength that it has
    assert close(net(x), base + 0.5 * effects["dog"])
    with stack.disabled():
        assert torch.equal(net(x), base)
    assert stack.active == {"dog": 0.5}
    with stack.rows([None, "cat", None]):  # what is active, but not named, is off
        assert close(net(x) - base, effects["cat"] * torch.tensor([0.0, 1, 0]).reshape(3, 1, 1))
    assert stack.active == {"dog": 0.5}
    stack.activate(())
    assert torch.equal(net(x), base)


def test_merging_what_is_active() -> None:
    net, x = net_of("linear")
    own, base = net.layer.weight, net(x)
    stack = stack_on(net)
    stack.activate({"dog": 0.7})
    expected = net(x)
    with stack.merged() as reports:
        assert list(reports) == ["dog"]
        assert close(net(x), expected)
        with stack.disabled():
            assert torch.equal(net(x), base)
        assert close(net(x), expected)
    assert net.layer.weight is own
    assert torch.equal(net(x), expected)


def test_switching_never_touches_what_trains() -> None:
    net, _ = net_of("linear")
    stack = stack_on(net)
    for parameter in stack["dog"].parameters():
        parameter.requires_grad_(False)
    before = [parameter.requires_grad for adapters in stack.values() for parameter in adapters.parameters()]
    stack.activate("dog")
    with stack.disabled(), stack.rows(["dog", "cat"]):
        pass
    with stack.merged():
        pass
    stack.activate(["cat", "dog"])
    stack.clone("cat", "tiger")
    after = [parameter.requires_grad for adapters in stack.values() for parameter in adapters.parameters()]
    assert after[: len(before)] == before
    assert all(parameter.requires_grad for parameter in stack["tiger"].parameters())


def test_members_come_and_go() -> None:
    net, x = net_of("linear")
    base = net(x)
    stack = stack_on(net)
    both = net(x)
    stack.rename("cat", "tiger")
    assert list(stack) == ["tiger", "dog"]
    assert torch.equal(net(x), both)
    stack.activate("dog")
    dog = net(x)
    removed = stack.remove("tiger")
    assert torch.equal(net(x), dog)
    assert isinstance(removed, AdapterSet)
    assert "tiger" not in stack
    assert len(stack) == 1
    stack.remove("dog")
    assert torch.equal(net(x), base)
    assert not net.layer._forward_hooks


@pytest.mark.parametrize("name", ["dgo", "activate", "rename", "clone", "rows"])
def test_unknown_names_are_errors_with_the_nearest(name: str) -> None:
    stack = stack_on(net_of("linear")[0])
    calls = {
        "dgo": lambda: stack["dgo"],
        "activate": lambda: stack.activate({"cat": 0.5, "dgo": 2}),
        "rename": lambda: stack.rename("dgo", "owl"),
        "clone": lambda: stack.clone("dgo", "owl"),
        "rows": lambda: stack.rows([None, "dgo"]).__enter__(),
    }
    with pytest.raises(ConfigError, match=r"'dgo'. Did you mean dog\? Adapters: cat, dog"):
        calls[name]()
    assert stack.active == {"cat": 1.0, "dog": 1.0}  # nothing was changed on the way


def test_names_in_use_are_refused() -> None:
    stack = stack_on(net_of("linear")[0])
    for call in (lambda: stack.add("cat", stack["dog"]), lambda: stack.rename("dog", "cat")):
        with pytest.raises(ConfigError, match="'cat' already"):
            call()


@pytest.mark.parametrize(("method", "kind"), [case for case in cases() if case[1] in ("linear", "conv2d", "norm")])
def test_a_clone_is_an_adapter_of_its_own_on_the_same_layers(method: str, kind: str) -> None:
    net, x = net_of(kind)
    stack = stack_on(net, method, ("cat",))
    expected = net(x)
    twin = stack.clone("cat", "tiger")
    assert all(twin.targets[name].layer is target.layer for name, target in stack["cat"].targets.items())
    mine = {parameter.data_ptr() for parameter in twin.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in stack["cat"].parameters()}
    assert torch.equal(net(x), expected)
    stack.activate("tiger")
    assert torch.equal(net(x), expected)
    randomise(twin, 7)
    assert not close(net(x), expected)
    stack.remove("tiger")
    stack.activate("cat")
    assert torch.equal(net(x), expected)


def test_switching_takes_the_same_time_for_any_number_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.ModuleList(nn.Linear(4, 4) for _ in range(336))
    plan = AdapterPlan(("re:.*",), config=AdapterConfig("lora", 1))
    stack = AdapterStack({str(number): inject({"net": net}, plan, {}) for number in range(7)})

    def forbidden(self: nn.Module, *args: object) -> Tensor:
        raise AssertionError("switching walks through modules")

    for walk in ("modules", "named_modules", "children", "parameters", "named_parameters", "apply"):
        monkeypatch.setattr(nn.Module, walk, forbidden)
    monkeypatch.setattr(nn.ModuleList, "__iter__", forbidden)
    times = []
    for number in range(7):
        start = time.perf_counter()
        stack.activate({str(number): 0.5})
        with stack.disabled():
            pass
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


# -- mixed batches within other things ---------------------------------------------------------------


def test_a_batch_within_a_batch_ends_where_it_ends() -> None:
    net, x = net_of("linear")
    cat, dog = stack_on(net).values()
    with mixed_batch([cat, dog, None]):
        expected = net(x)
        with mixed_batch([dog, None, cat]):
            assert not close(net(x), expected)
        assert torch.equal(net(x), expected)


def test_what_is_kept_for_a_batch_belongs_to_the_sets_that_act() -> None:
    net, x = net_of("linear")
    cat, dog, bird = stack_on(net, names=("cat", "dog", "bird")).values()
    with torch.no_grad(), mixed_batch([cat, dog, bird]):
        expected = net(x)
        bird.enabled = False
        net(x)
        bird.enabled, dog.enabled = True, False
        assert close(net(x)[[0, 2]], expected[[0, 2]])


def test_a_mixed_batch_of_adapters_from_inference_mode() -> None:
    net, x = net_of("linear")
    stack = stack_on(net)
    with stack.rows(["cat", "dog", None]):
        expected = net(x)
    states = [stack.remove(name).state() for name in list(stack)]
    with torch.inference_mode():
        cat, dog = (attach_adapters({"net": net}, state) for state in states)
        with mixed_batch([cat, dog, None]):
            assert close(net(x), expected)


def test_a_set_of_a_mixed_batch_cannot_be_merged_or_absent() -> None:
    net, _ = net_of("linear")
    cat, dog = stack_on(net).values()
    with mixed_batch([cat, dog, None]), pytest.raises(RuntimeError, match="mixed batch"):
        cat.merge()
    dog.detach()
    with pytest.raises(ConfigError, match="not attached"), mixed_batch([cat, dog, None]):
        pass
