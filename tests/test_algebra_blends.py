"""Every blend against its definition in float64 on full matrices, against peft, and what all blends have in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from blending import BY_ENTRIES, DELTAS, LAYER, STATES, WEIGHTS, blended, product, weights_for
from layers import adapted, close, net_of, randomise
from peft.utils import merge_utils
from torch import Tensor

from studio.adapters import WeightView, attach_adapters, named_targets
from studio.algebra import BLENDS, blend
from studio.formats.state import AdapterState
from studio.seeds import sample_generator

# -- the definitions -------------------------------------------------------------------------


def trimmed(delta: Tensor, density: float) -> Tensor:
    order = delta.flatten().abs().argsort(descending=True)
    kept = torch.zeros(delta.numel(), dtype=torch.float64)
    kept[order[: int(density * delta.numel())]] = 1
    return delta * kept.reshape(delta.shape)


def elected(terms: list[Tensor]) -> Tensor:
    result = torch.zeros_like(terms[0])
    for place in torch.cartesian_prod(*map(torch.arange, result.shape)).tolist():
        values = [float(term[tuple(place)]) for term in terms]
        sign = 1 if sum(values) >= 0 else -1
        same = [value for value in values if value * sign > 0]
        result[tuple(place)] = sum(same) / len(same) if same else 0.0
    return result


def magnitude_prune(density: float) -> Tensor:
    return sum(w * trimmed(d, density) for w, d in zip(WEIGHTS, DELTAS, strict=True))


def ties(density: float, scale: float) -> Tensor:
    return scale * elected([w * trimmed(d, density) for w, d in zip(WEIGHTS, DELTAS, strict=True)])


def breadcrumbs(density: float, gamma: float) -> Tensor:
    total = torch.zeros_like(DELTAS[0])
    for w, d in zip(WEIGHTS, DELTAS, strict=True):
        order = d.flatten().abs().argsort(descending=True)
        outliers, kept = int(gamma * d.numel()), int(density * d.numel())
        mask = torch.zeros(d.numel(), dtype=torch.float64)
        mask[order[outliers : outliers + kept]] = 1
        total += w * d * mask.reshape(d.shape)
    return total


def slerp() -> Tensor:
    one, other = DELTAS[:2]
    t = 0.4 / 1.1
    angle = torch.arccos((one / one.norm() * other / other.norm()).sum())
    return (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * other) / torch.sin(angle)


def uniform(part: str, place: int, seed: int = 0) -> Tensor:
    return torch.rand(DELTAS[0].shape, generator=sample_generator(seed, LAYER, part, place))


def dropped(delta: Tensor, place: int, density: float) -> Tensor:
    return delta * (uniform("weight", place) < density) / density


def dare(density: float) -> Tensor:
    return sum(w * dropped(d, place, density) for place, (w, d) in enumerate(zip(WEIGHTS, DELTAS, strict=True)))


def dare_ties(density: float, scale: float) -> Tensor:
    pairs = enumerate(zip(WEIGHTS, DELTAS, strict=True))
    return scale * elected([w * dropped(d, place, density) for place, (w, d) in pairs])


def della(density: float, epsilon: float) -> Tensor:
    terms = []
    for place, (w, d) in enumerate(zip(WEIGHTS, DELTAS, strict=True)):
        kept = torch.zeros_like(d)
        for row, values in enumerate(d):
            for rank, column in enumerate(values.abs().argsort().tolist()):
                p = density - epsilon / 2 + epsilon * (rank + 0.5) / len(values)
                kept[row, column] = float(uniform("weight", place)[row, column] < p) / p
        terms.append(w * d * kept)
    return elected(terms)


DEFINITIONS: list[tuple[str, dict[str, float | bool], Callable[[], Tensor]]] = [
    ("linear", {}, lambda: sum(w * d for w, d in zip(WEIGHTS, DELTAS, strict=True))),
    ("linear", {"normalise": True}, lambda: sum(w / 1.2 * d for w, d in zip(WEIGHTS, DELTAS, strict=True))),
    ("slerp", {}, slerp),
    ("magnitude-prune", {"density": 0.3}, lambda: magnitude_prune(0.3)),
    ("ties", {"density": 0.4, "scale": 1.5}, lambda: ties(0.4, 1.5)),
    ("ties", {"density": 1.0}, lambda: ties(1.0, 1.0)),
    ("dare", {"density": 0.6}, lambda: dare(0.6)),
    ("dare-ties", {"density": 0.6, "scale": 0.8}, lambda: dare_ties(0.6, 0.8)),
    ("della", {"density": 0.5, "epsilon": 0.4, "scale": 1.0}, lambda: della(0.5, 0.4)),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.05}, lambda: breadcrumbs(0.5, 0.05)),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.0}, lambda: magnitude_prune(0.5)),
]


@pytest.mark.parametrize(
    ("method", "settings", "definition"), DEFINITIONS, ids=[f"{name} {s}" for name, s, _ in DEFINITIONS]
)
def test_it_is_what_its_definition_says(
    method: str, settings: dict[str, float | bool], definition: Callable[[], Tensor]
) -> None:
    states, weights = weights_for(method)
    expected = definition()
    assert (blended(states, weights, method, **settings) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_every_blend_has_a_definition_here() -> None:
    assert BLENDS.keys() == {name for name, _, _ in DEFINITIONS}
    for name, way in BLENDS.items():
        assert way.formula and set(way.settings) == {key for one, s, _ in DEFINITIONS if one == name for key in s}


@pytest.mark.parametrize("method", ["ties", "dare-ties", "magnitude-prune", "dare"])
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_it_is_pefts(method: str, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft elects signs before it weighs, so that the two agree where all weights are positive and equal."""
    weights = [0.8] * 3 if "ties" in method else WEIGHTS
    ours = blended(STATES, weights, method, density=density)
    places = iter(range(3))
    monkeypatch.setattr(torch, "bernoulli", lambda p: (uniform("weight", next(places)) < p).to(p.dtype))
    theirs = getattr(
        merge_utils, method.replace("-", "_").removesuffix("dare") + ("dare_linear" if method == "dare" else "")
    )
    expected = theirs(DELTAS, torch.tensor(weights, dtype=torch.float64), density)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


# -- what all have in common -----------------------------------------------------------------


@pytest.mark.parametrize("method", BLENDS)
def test_the_form_of_the_inputs_does_not_matter(method: str) -> None:
    """A full difference, a LoRA, and one of another alpha and in float64 are the same dW."""
    states, weights = weights_for(method)
    first = states[0].tensors[LAYER]
    wide = {"lora_down.weight": first["lora_down.weight"].double() * 4, "lora_up.weight": first["lora_up.weight"]}
    others = [AdapterState("net", {LAYER: {**wide, "alpha": torch.tensor(0.5)}})]
    others += [AdapterState("net", {LAYER: {"diff": product(one.tensors[LAYER]).float()}}) for one in states[1:]]
    ours, same = blended(states, weights, method), blended(others, weights, method)
    assert close(ours, same)


@pytest.mark.parametrize("method", BLENDS)
def test_a_rank_gives_the_best_lora_and_says_what_is_lost(method: str) -> None:
    states, weights = weights_for(method)
    exact = blended(states, weights, method)
    up, values, down = torch.linalg.svd(exact)
    best = (up[:, :4] * values[:4]) @ down[:4]
    short = blend(states, weights, method, rank=4)
    assert close(product(short.tensors[LAYER]), best) and short.report.ranks == {LAYER: 4}
    residual = float((exact - best).norm() / exact.norm())
    assert short.residuals[LAYER] == pytest.approx(residual, abs=1e-5) == short.report.residual
    enough = int((values.square().cumsum(0) / values.square().sum() < 0.9).sum()) + 1
    dynamic = blend(states, weights, method, energy=0.9)
    assert dynamic.report.ranks == {LAYER: enough} and dynamic.energy_kept >= 0.9 - 1e-6
    assert blend(states, weights, method, energy=0.9, rank=2).report.ranks == {LAYER: min(2, enough)}


@pytest.mark.parametrize("method", BY_ENTRIES)
def test_masks_are_functions_of_seed_layer_and_input(method: str) -> None:
    twice = [AdapterState("net", {name: one.tensors[LAYER] for name in (LAYER, "net.other")}) for one in STATES]
    first, again, other = (blend(twice, WEIGHTS, method, seed=seed).tensors for seed in (0, 0, 1))
    alone = blend(STATES, WEIGHTS, method).tensors
    random = method in ("dare", "dare-ties", "della")
    assert torch.equal(first[LAYER]["diff"], again[LAYER]["diff"])
    assert torch.equal(first[LAYER]["diff"], alone[LAYER]["diff"])
    assert torch.equal(first[LAYER]["diff"], other[LAYER]["diff"]) != random
    assert torch.equal(first[LAYER]["diff"], first["net.other"]["diff"]) != random
    if method == "dare":
        assert not torch.equal(
            *(blend([*order], [1.0, 1.0], method).tensors[LAYER]["diff"] for order in (STATES[:2], STATES[1::-1]))
        )


@pytest.mark.parametrize("method", ["dare", "della"])
def test_dropping_and_rescaling_keeps_the_mean(method: str) -> None:
    """A single input, over many seeds: the blend is dW on average."""
    mean = sum(blended(STATES[:1], [1.0], method, seed=seed) for seed in range(600)) / 600
    assert (mean - DELTAS[0]).norm() <= 0.06 * DELTAS[0].norm()


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d grouped", "embedding", "experts", "norm"])
@pytest.mark.parametrize("method", BLENDS)
def test_layers_of_every_kind_take_it(method: str, kind: str) -> None:
    """On a model: at full rank the LoRA acts as the full difference does, and one input of weight 1 as itself."""
    net, x = net_of(kind)
    states = []
    for seed in (1, 2):
        adapters = adapted(net, "norm" if kind == "norm" else "lora")
        randomise(adapters, seed)
        states.append(AdapterState("net", adapters.state()))
        adapters.detach()
    bases = {name: WeightView(target) for name, target in named_targets({"net": net}).items()}
    outputs = []
    for settings in ({}, {"rank": 8 if kind == "conv2d grouped" else 12}):
        state = blend(states, [1.0, 0.5], method, bases=bases, **settings)
        adapters = attach_adapters({"net": net}, state.tensors)
        outputs.append(net(x))
        adapters.detach()
    if kind != "conv2d grouped":  # whose groups of 3 outputs have a rank of 3 at most, which 8 is 2 of
        assert close(*outputs)
    assert not close(outputs[0], net(x))
