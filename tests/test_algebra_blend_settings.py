"""What blends take and tell besides their method: strengths, weights, precision, provenance, memory, and errors."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from blending import BY_ENTRIES, DELTAS, LAYER, STATES, WEIGHTS, blended, lora, product
from layers import adapted, close, net_of
from torch import Tensor, nn

from studio.adapters import WeightView, named_targets
from studio.algebra import Product, blend
from studio.errors import ConfigError
from studio.formats.state import AdapterState

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
