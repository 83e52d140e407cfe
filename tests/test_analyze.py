"""Will adapters fight: the figures against full matrices, and the score against what really happens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from layers import adapted, net_of, randomise
from torch import Tensor

from studio.adapters import AdapterConfig, AdapterPlan, WeightView, attach_adapters, match_targets, named_targets
from studio.algebra.analyze import Encounter, analyze, suggest
from studio.algebra.heatmap import CANCELS, DOUBLES, colour, heatmap
from studio.errors import ConfigError
from studio.families.loading import load_base
from studio.formats.state import AdapterState

LAYER = "unet.mid_block.attentions.0.proj_in"


def orthonormal(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q


def lora(up: Tensor, down: Tensor, name: str = LAYER) -> AdapterState:
    entry = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(float(len(down)))}
    return AdapterState("sd", {name: entry})


def random_lora(seed: int, rank: int, name: str = LAYER, out: int = 30, width: int = 40) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return lora(torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator), name)


def delta(state: AdapterState) -> Tensor:
    (entry,) = state.tensors.values()
    return entry["lora_up.weight"] @ entry["lora_down.weight"]


def whole(*states: AdapterState, weights: list[float] | None = None) -> Encounter:
    (pair,) = analyze(states, weights or [1.0, 1.0]).pairs
    return pair.whole


def test_the_figures_are_those_of_the_full_matrices() -> None:
    first, second, weights = random_lora(1, 3), random_lora(2, 5), [0.8, -0.3]
    found = whole(first, second, weights=weights)
    a, b = (weight * delta(state) for weight, state in zip(weights, (first, second), strict=True))
    norms = sorted([float(a.norm()), float(b.norm())])
    assert found.cosine == pytest.approx(float((a * b).sum()) / norms[0] / norms[1], abs=1e-5)
    assert found.ratio == pytest.approx(norms[1] / norms[0], rel=1e-5)
    assert found.score == pytest.approx(abs(float((a * b).sum())) / norms[0] ** 2, abs=1e-5)
    signs = (a[::2] * b[::2] < 0).float().mean()  # of the rows that are looked at
    assert found.sign_conflict == pytest.approx(float(signs), abs=1e-6)


def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = orthonormal(generator, 40, 4), orthonormal(generator, 30, 4)
    turned = [math.cos(0.3), math.cos(1.1)]  # the angles between what the two read
    read = torch.stack([c * rows[:, k] + math.sqrt(1 - c**2) * rows[:, 2 + k] for k, c in enumerate(turned)])
    found = whole(lora(columns[:, :2], rows[:, :2].T.contiguous()), lora(columns[:, 2:], read))
    assert found.rows == pytest.approx(sum(c**2 for c in turned) / 2, abs=1e-5)
    assert found.columns == pytest.approx(0, abs=1e-6) and found.score == pytest.approx(0, abs=1e-6)


def test_doubled_cancelled_and_apart() -> None:
    ink = random_lora(1, 3)
    same, opposite, twice = whole(ink, ink), whole(ink, ink, weights=[1.0, -1.0]), whole(ink, ink, weights=[1.0, -2.0])
    assert (same.score, same.cosine, same.rows, same.sign_conflict) == pytest.approx((1, 1, 1, 0), abs=1e-5)
    assert (opposite.score, opposite.cosine, opposite.sign_conflict) == pytest.approx((1, -1, 1), abs=1e-5)
    assert (twice.score, twice.ratio) == pytest.approx((1, 2))
    elsewhere = whole(ink, random_lora(2, 3, "unet.conv_in"))
    assert (elsewhere.score, elsewhere.rows, elsewhere.sign_conflict) == (0, None, None)


def test_blocks_stand_as_the_model_runs_and_do_not_make_up_for_each_other() -> None:
    names = [f"unet.{block}.attentions.0.proj_in" for block in ("up_blocks.0", "mid_block", "down_blocks.1")]
    first = AdapterState("sd", {name: random_lora(1, 3).tensors[LAYER] for name in names})
    flipped = {**first.tensors[names[0]], "lora_up.weight": -first.tensors[names[0]]["lora_up.weight"]}
    second = AdapterState("sd", {**first.tensors, names[0]: flipped})
    (pair,) = analyze([first, second], [1.0, 1.0], names=["ink", "wash"]).pairs
    assert [one.block for one in pair.blocks] == ["unet.down_blocks.1", "unet.mid_block", "unet.up_blocks.0"]
    assert [round(one.cosine, 4) for one in pair.blocks] == [1, 1, -1]
    assert pair.whole.cosine == pytest.approx(1 / 3) and pair.whole.score == pytest.approx(1)
    (halved,) = analyze([first, second], [1.0, 1.0], strengths=[{"unet.up_blocks.*": 0.5}, {}]).pairs
    assert [round(one.ratio, 4) for one in halved.blocks] == [1, 1, 2]


def test_low_rank_changes_are_never_formed() -> None:
    states = [random_lora(seed, 2, out=2**17, width=2**17) for seed in (1, 2)]  # 64 GiB
    assert whole(*states).score < 0.01


@pytest.mark.parametrize("method", ["dora", "lokr", "diff"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_changes_without_factors_are_compared_too(method: str, kind: str) -> None:
    net, _ = net_of(kind)
    views, states, deltas = {name: WeightView(one) for name, one in named_targets({"net": net}).items()}, [], []
    for seed in (1, 2):
        adapters = adapted(net, method)
        randomise(adapters, seed)
        states.append(AdapterState("net", adapters.state()))
        deltas.append(adapters.adapters[0].delta_weight(views["net.layer"]).detach())
        adapters.detach()
    (pair,) = analyze(states, [1.0, 1.0], bases=views).pairs
    cosine = torch.cosine_similarity(deltas[0].flatten(), deltas[1].flatten(), dim=0)
    assert 0 < pair.whole.rows <= 1 and 0 < pair.whole.columns <= 1
    if method != "diff":  # whose bias counts too
        assert pair.whole.cosine == pytest.approx(float(cosine), abs=1e-5)


def test_suggestions_bring_down_the_loud_and_what_is_said_twice() -> None:
    apart = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    assert suggest([1.0, -0.5], apart) == pytest.approx([2**-0.5, -0.5])
    same = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert suggest([1.0, 1.0], same) == pytest.approx([2**-0.5, 2**-0.5])
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert suggest([1.0, 1.0], opposite) == pytest.approx([1.0, 1.0])


def test_what_cannot_be_compared_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="give two or more"):
        analyze([random_lora(1, 2)], [1.0])
    with pytest.raises(ConfigError, match=rf"{LAYER}: the adapters have different shapes"):
        analyze([random_lora(1, 2), random_lora(2, 2, width=41)], [1.0, 1.0])


def test_an_adapter_of_weight_zero_disturbs_nobody() -> None:
    found = whole(random_lora(1, 2), random_lora(2, 2), weights=[1.0, 0.0])
    assert (found.score, found.cosine, found.ratio, found.rows) == (0, 0, None, None)


def test_the_picture_shows_who_doubles_and_who_cancels() -> None:
    ink, wash = random_lora(1, 3), random_lora(2, 3)
    found = analyze([ink, ink, wash], [1.0, -1.0, 1.0], names=["ink", "anti", "a very long name " * 5])
    pixels = {count[1] for count in heatmap(found).getcolors(1 << 16)}
    assert colour(0) == (255, 255, 255) and colour(1) == DOUBLES and colour(-1) == CANCELS
    assert CANCELS in pixels and colour(found.pairs[1].whole.score) not in (DOUBLES, CANCELS)


# -- does the score predict anything? --------------------------------------------------------


def pair_of(specs, generator: torch.Generator) -> list[AdapterState]:
    """Two adapters whose subspaces, maps and norms have much or little to do with each other, drawn at random."""
    overlap, alike, sign, ratio = torch.rand(4, generator=generator).tolist()
    alike, ratio = math.copysign(alike, sign - 0.5), math.exp((2 * ratio - 1) * math.log(2))
    entries: list[dict] = [{}, {}]
    for name, spec in specs.items():
        out, width = spec.weight_shape[0], math.prod(spec.weight_shape[1:])
        columns, rows = orthonormal(generator, out, 8), orthonormal(generator, width, 8)
        first_map = torch.randn(4, 4, generator=generator)
        fresh = torch.randn(4, 4, generator=generator)
        maps = first_map, alike * first_map + math.sqrt(1 - alike**2) * fresh
        for place, size in enumerate((ratio**-0.5, ratio**0.5)):
            share = (1.0, overlap)[place]
            turn = math.sqrt(share), math.sqrt(1 - share)
            up = (turn[0] * columns[:, :4] + turn[1] * columns[:, 4:]) @ maps[place]
            down = (turn[0] * rows[:, :4] + turn[1] * rows[:, 4:]).T.contiguous()
            up = up * size * 0.04 * math.sqrt(out) / up.norm()  # against weights of the norm sqrt(out)
            kernel = (1,) * spec.dims
            entry = {"lora_up.weight": up.reshape(out, 4, *kernel), "lora_down.weight": down.reshape(4, -1, *kernel)}
            entries[place][name] = {**entry, "alpha": torch.tensor(4.0)}
    return [AdapterState("sd", one) for one in entries]


def test_the_score_predicts_how_much_of_an_adapters_effect_is_changed_by_the_other() -> None:
    """On noise predictions: |<e - e_i, e_i>| / |e_i|^2, for the effects e_i of one adapter and e of both."""
    family, models = load_base(str(tiny.folder("sd15")))
    modules, generator = family.prefixes(models), torch.Generator().manual_seed(1)
    plan = AdapterPlan(("attention",), config=AdapterConfig(rank=4))
    specs = {name: target.spec for name, (target, _) in match_targets(modules, plan, family.roles).items()}
    base = tiny.predict(family, models)

    def effect(*states: AdapterState) -> Tensor:
        sets = [attach_adapters(modules, state.tensors) for state in states]
        prediction = tiny.predict(family, models)
        for one in sets:
            one.detach()
        return (prediction - base).double()

    predicted, real = [], []
    for _ in range(24):
        states = pair_of(specs, generator)
        both, alone = effect(*states), [effect(state) for state in states]
        changed = [abs(float(((both - own) * own).sum() / own.square().sum())) for own in alone]
        predicted.append(whole(*states).score)
        real.append(min(1.0, max(changed)))
    assert np.corrcoef(predicted, real)[0, 1] >= 0.5
