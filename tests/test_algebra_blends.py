"""Every blend against its definition in float64 on full matrices, against peft, and what all blends have in common."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from layers import adapted, close, net_of, randomise
from peft.utils import merge_utils
from torch import Tensor, nn

from studio.adapters import WeightView, attach_adapters, named_targets
from studio.algebra import BLENDS, Product, blend
from studio.errors import ConfigError
from studio.formats.state import AdapterState
from studio.seeds import sample_generator

LAYER, WEIGHTS = "net.layer", [0.7, -0.4, 0.9]
BY_ENTRIES = [name for name, way in BLENDS.items() if not way.coefficients]


def lora(seed: int, out: int = 24, inputs: int = 30, rank: int = 3, name: str = LAYER) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, inputs, generator=generator), torch.randn(out, rank, generator=generator)
    return AdapterState("net", {name: {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}})


STATES = [lora(seed, rank=2 + seed) for seed in range(3)]


def product(entry: Mapping[str, Tensor]) -> Tensor:
    """dW in float64, of a LoRA or a full difference."""
    if "diff" in entry:
        return entry["diff"].double()
    up, down = entry["lora_up.weight"].double(), entry["lora_down.weight"].double()
    return float(entry["alpha"]) / len(down) * up @ down


DELTAS = [product(one.tensors[LAYER]) for one in STATES]


def blended(states: Sequence[AdapterState], weights: Sequence[float], method: str, **settings: object) -> Tensor:
    return product(blend(states, weights, method, **settings).tensors[LAYER])


def weights_for(method: str) -> tuple[list[AdapterState], list[float]]:
    """Inputs that the method takes: slerp is between two, and neither is subtracted."""
    return (STATES[:2], [0.7, 0.4]) if method == "slerp" else (STATES, WEIGHTS)


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


# -- strengths, weights ----------------------------------------------------------------------


def blocks() -> AdapterState:
    names = ["unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    return AdapterState("sd", {name: lora(3).tensors[LAYER] for name in names})


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_blocks_have_strengths_of_their_own(method: str) -> None:
    state, expected = blocks(), product(lora(3).tensors[LAYER])
    cases: list[dict[str, float]] = [
        {"unet.mid_block*": 1.0, "*.to_q": -2.0},
        {"to_q": -2.0},
        {"attention": -2.0},
        {"re:.*attn1.*": -2},
    ]
    for strengths in cases:
        result = blend([state], [0.5], method, strengths=[strengths], **({"density": 1.0} if method == "ties" else {}))
        first, second = map(product, result.tensors.values())
        assert close(first, 0.5 * expected) and close(second, -1.0 * expected)
        assert json.loads(result.metadata["studio.blend"])["settings"]["strengths"] == [strengths]
    with pytest.raises(ConfigError, match=r"'atention' matches none of the 2 layers.* Did you mean attention"):
        blend([state], [1.0], strengths=[{"atention": 1.0}])


def test_what_has_no_weight_is_left_out_and_named() -> None:
    result = blend([blocks()], [1.0], strengths=[{"*.to_q": 0.0}])
    (left_out,) = result.report.left_out
    assert left_out.endswith("to_q") and left_out not in result.tensors
    zero = blend(STATES, [1.0, 0.0, 0.0])
    assert zero.report.ranks == {LAYER: 2}, "an input of weight 0 adds no ranks"


def test_subtraction_and_interpolation() -> None:
    assert close(blended(STATES[:2], [1.0, -1.0], "linear"), DELTAS[0] - DELTAS[1])
    assert close(blended(STATES[:2], [3.0, 1.0], "linear", normalise=True), 0.75 * DELTAS[0] + 0.25 * DELTAS[1])


def test_slerp_between_the_same_and_opposite_directions_is_linear() -> None:
    twice = AdapterState("net", {LAYER: {**STATES[0].tensors[LAYER], "alpha": torch.tensor(4.0)}})
    assert close(blended([STATES[0], twice], [1.0, 1.0], "slerp"), 1.5 * DELTAS[0])
    other = AdapterState("net", {"net.other": STATES[1].tensors[LAYER]})
    assert close(blended([STATES[0], other], [1.0, 3.0], "slerp"), 0.25 * DELTAS[0])


# -- reports, metadata, memory ---------------------------------------------------------------


def test_sign_conflicts_are_counted() -> None:
    disagree = (0.7 * DELTAS[0] * (-0.4) * DELTAS[1] < 0).double().mean()
    exact = blend(STATES[:2], [0.7, -0.4], "ties").report
    assert exact.sign_conflicts[LAYER] == pytest.approx(float(disagree)) and exact.sampled_rows is None
    sampled = blend(STATES[:2], [0.7, -0.4]).report
    assert sampled.sampled_rows == 16 and sampled.sign_conflict == pytest.approx(float(disagree), abs=0.1)
    same, against = (blend([STATES[0]] * 2, [1.0, other]).report for other in (2.0, -0.5))
    assert (same.sign_conflict, against.sign_conflict) == (0.0, 1.0)
    assert "sign conflicts   100.0%" in str(against)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_precision_is_read_exactly_and_written_on_request(dtype: torch.dtype, relative: float) -> None:
    halved = [AdapterState("net", {LAYER: {k: v.to(dtype) for k, v in one.tensors[LAYER].items()}}) for one in STATES]
    exact = sum(w * product(one.tensors[LAYER]) for w, one in zip(WEIGHTS, halved, strict=True))
    result = blend(halved, WEIGHTS)
    assert result.tensors[LAYER]["lora_up.weight"].dtype == torch.float32
    assert (product(result.tensors[LAYER]) - exact).abs().max() <= 1e-6 * exact.abs().max()
    stored = blend(halved, WEIGHTS, dtype=dtype)
    assert stored.tensors[LAYER]["lora_up.weight"].dtype == dtype and 0 < stored.report.rounding < relative
    error = float((product(stored.tensors[LAYER]) - exact).norm() / exact.norm())
    assert stored.report.rounding == pytest.approx(error, rel=0.3) and result.report.rounding == 0


def test_what_half_precision_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"net\.layer: it has values beyond torch.float16: keep fp32"):
        blend(STATES, [1e6, 1.0, 1.0], dtype=torch.float16)


def test_provenance_triggers_and_tokens_are_kept() -> None:
    vectors = {"text_encoder": torch.ones(2, 4)}
    one = AdapterState("net", STATES[0].tensors, {"modelspec.trigger_phrase": "ink"}, embeddings={"<ink>": vectors})
    other = AdapterState("net", STATES[1].tensors, {"modelspec.trigger_phrase": "oil"})
    result = blend([one, other], [1.0, 0.5], "dare", names=["ink", "oil"], seed=3, density=0.4)
    made = json.loads(result.metadata["studio.blend"])
    assert (made["method"], made["settings"]) == ("dare", {"density": 0.4, "seed": 3})
    assert [(each["name"], each["weight"]) for each in made["inputs"]] == [("ink", 1.0), ("oil", 0.5)]
    assert result.metadata["modelspec.trigger_phrase"] == "ink, oil" and result.embeddings == {"<ink>": vectors}
    clash = AdapterState("net", STATES[1].tensors, embeddings={"<ink>": {"text_encoder": torch.zeros(2, 4)}})
    with pytest.raises(ConfigError, match="two of the adapters have trained the token '<ink>'"):
        blend([one, clash], [1.0, 1.0])


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_coefficients_never_form_the_matrix(method: str) -> None:
    states = [lora(seed, 2**17, 2**17, 2) for seed in (1, 2)]  # 64 GiB
    entry = blend(states, [1.0, 1.0], method, rank=3).tensors[LAYER]
    assert entry["lora_up.weight"].shape == (2**17, 3)


@pytest.mark.parametrize("method", BY_ENTRIES)
def test_one_layer_at_a_time_is_formed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    formed: list[weakref.ref[Tensor]] = []
    dense, most = Product.dense, 0

    def watched(self: Product) -> Tensor:
        nonlocal most
        formed.append(weakref.ref(result := dense(self)))
        most = max(most, sum(one() is not None for one in formed))
        return result

    monkeypatch.setattr(Product, "dense", watched)
    many = [AdapterState("net", {f"net.{n}": one.tensors[LAYER] for n in range(5)}) for one in STATES]
    blend(many, WEIGHTS, method, rank=2)
    assert len(formed) == 15 and most <= 3 + 1  # the last layer's, until they are replaced


def test_what_makes_no_sense_is_one_clear_error() -> None:
    cases = (
        (("tise", {}), "unknown blend 'tise'. Did you mean ties"),
        (("ties", {"densty": 0.5}), "'ties' has no setting 'densty'. Did you mean density"),
        (("linear", {"density": 0.5}), "'linear' has no setting 'density'. It has normalise"),
        (("slerp", {"density": 0.5}), "'slerp' has no setting 'density'. It has none"),
        (("ties", {"density": 0.0}), "density is 0.0; it must be above 0, and 1 at most"),
        (("dare", {"density": 1.5}), "density is 1.5"),
        (("della", {"density": 0.1, "epsilon": 0.3}), "density 0.1 and epsilon 0.3"),
        (("breadcrumbs", {"density": 0.9, "gamma": 0.2}), "density 0.9 and gamma 0.2"),
        (("ties", {"energy": 1.5}), "energy is 1.5"),
        (("slerp", {}), "^slerp is between two adapters; 3 were given"),
        (("linear", {"names": ["one"]}), "3 adapters and 1 names"),
        (("linear", {"strengths": [{}]}), "3 adapters and 1 sets of strengths"),
    )
    for (method, arguments), message in cases:
        with pytest.raises(ConfigError, match=message):
            blend(STATES, WEIGHTS, method, **arguments)
    with pytest.raises(ConfigError, match="slerp goes from one adapter to another"):
        blend(STATES[:2], [1.0, -1.0], "slerp")
    with pytest.raises(ConfigError, match="add up to 0"):
        blend(STATES[:2], [1.0, -1.0], normalise=True)
    kernel = AdapterState("net", {LAYER: {"diff": torch.ones(4, 3, 5)}})
    with pytest.raises(ConfigError, match=r"\(4, 3, 5\) may be of a convolution or of experts: give `bases`"):
        blend([kernel], [1.0], rank=2)


def test_a_base_of_shapes_only_serves_methods_that_do_not_read_it() -> None:
    net, _ = net_of("linear")
    with torch.device("meta"):
        shapes = nn.ModuleDict({"layer": nn.Linear(12, 8)})
    bases = {name: WeightView(target) for name, target in named_targets({"net": shapes}).items()}
    full = {name: WeightView(target) for name, target in named_targets({"net": net}).items()}
    loha = AdapterState("net", adapted(net, "loha").state())
    assert close(*(blended([loha], [1.0], "linear", bases=one) for one in (bases, full)))
    net, _ = net_of("linear")
    with pytest.raises(ConfigError, match="the change depends on the base's weight, and `bases` has its shape only"):
        blend([AdapterState("net", adapted(net, "dora").state())], [1.0], bases=bases)
