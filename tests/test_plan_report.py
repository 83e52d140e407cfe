"""The dry-run plan: what gets what and why, its parameters and flops, and what it leaves out."""

from __future__ import annotations

import json
import math

import architectures
import pytest
import torch
from layers import adapted, cases, config_of, net_of
from pydantic_core import to_jsonable_python
from torch import nn

from studio.adapters import AdapterConfig, AdapterPlan, PlanReport, inject, plan_report
from studio.errors import ConfigError
from studio.families import FAMILIES


def report_of(model: nn.Module, *targets: str, config: AdapterConfig | None = None, **plan: object) -> PlanReport:
    return plan_report({"model": model}, AdapterPlan(targets, config=config or AdapterConfig(rank=4), **plan), {})


@pytest.fixture(scope="module")
def sd15() -> PlanReport:
    """Stable Diffusion 1.5 without memory, with every kind of reason."""
    family = FAMILIES["sd"]
    plan = AdapterPlan(
        ("attention", "feed-forward", "unet.up_blocks.0.*", "projections"),
        exclude=("unet.mid_block.*", "*.attn2.to_k"),
        config=AdapterConfig(rank=8, alpha=4.0),
        overrides={"*.to_q": {"rank": 2}, "unet.down_blocks.0.*": {"rslora": True}},
    )
    return plan_report(family.prefixes(family.reference()), plan, family.roles)


def test_each_row_says_why(sd15: PlanReport) -> None:
    rows = {row.name: row for row in sd15.rows}
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    query, output = rows[f"{block}.attn1.to_q"], rows[f"{block}.attn1.to_out.0"]
    assert (query.targets, query.overrides) == (("attention",), ("*.to_q", "unet.down_blocks.0.*"))
    assert (query.method, query.rank, query.alpha) == ("lora", 2, pytest.approx(4 * 2**0.5))
    assert (output.targets, output.overrides, output.rank) == (("attention",), ("unet.down_blocks.0.*",), 8)
    assert rows["unet.up_blocks.1.attentions.0.proj_in"].overrides == ()
    assert rows.keys().isdisjoint(one.name for one in sd15.left_out)


def test_what_is_left_out_has_its_reason(sd15: PlanReport) -> None:
    reasons = {one.name: one for one in sd15.left_out}
    key = reasons["unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert (key.exclusion, key.method, key.targets) == ("*.attn2.to_k", "", ("attention",))
    assert reasons["unet.mid_block.attentions.0.proj_in"].exclusion == "unet.mid_block.*"
    norm = reasons["unet.up_blocks.0.resnets.0.norm1"]
    assert (norm.kind, norm.exclusion, norm.method) == ("norm", "", "lora")
    assert {one.kind for one in sd15.left_out if not one.exclusion} == {"norm"}
    assert sd15.unadapted["norm"] == 61 + 3 * 16 + 25, "U-Net's group norms and layer norms, and CLIP's"


def test_parameters_and_flops_of_lora_are_those_of_its_factors(sd15: PlanReport) -> None:
    for row in sd15.rows:
        out, inputs = row.shape[0], math.prod(row.shape[1:])
        assert row.cost.parameters == row.rank * (out + inputs)
        assert (row.cost.position, row.cost.call) == (2 * row.rank * (out + inputs), 0)
        assert row.cost.base == 2 * out * inputs
    assert sd15.parameters == sum(row.cost.parameters for row in sd15.rows)
    assert (sd15.adapter_bytes, sd15.optimizer_bytes) == (4 * sd15.parameters, 8 * sd15.parameters)
    assert sd15.base_parameters == 859_520_964 + 123_060_480, "the published U-Net and CLIP ViT-L"


def test_the_text_has_a_line_for_each_reason_and_not_for_each_layer(sd15: PlanReport) -> None:
    text = str(sd15)
    assert len(text.splitlines()) <= 20
    for part in (
        "attention (*.to_q)",
        "feed-forward",
        "Excluded by unet.mid_block.*: 2 conv, 10 linear",
        "Met, but lora cannot adapt them: ",
        "attn1.to_k and 8 more; not in unet.mid_block.attentions.0.proj_in",
        f"{sd15.parameters:,} parameters",
    ):
        assert part in text, text
    assert len(json.loads(json.dumps(to_jsonable_python(sd15)))["rows"]) == len(sd15.rows)


def test_a_pattern_that_takes_only_some_layers_of_the_blocks_is_told() -> None:
    model, _ = architectures.build("llama")
    report = report_of(model, r"re:.*layers\.[01]\.self_attn\.q_proj", "gate_proj")
    (partial,) = report.partial
    assert (partial.name, partial.adapted, partial.total) == ("self_attn.q_proj", 2, 3)
    assert partial.missing == ("model.model.layers.2.self_attn.q_proj",)
    assert "Adapted in 2 of 3 layers only: self_attn.q_proj; not in model.model.layers.2.self_attn.q_proj" in str(
        report
    )
    assert not report_of(model, "q_proj", "gate_proj").partial


def test_tied_weights_and_experts_are_told() -> None:
    assert "model.lm_head holds the same weight as model.transformer.wte" in str(
        report_of(architectures.build("gpt2")[0], "lm_head")
    )
    rows = report_of(architectures.build("gpt-oss")[0], "experts.down_proj").rows
    assert {(row.kind, row.shape, row.cost.parameters) for row in rows} == {("experts", (4, 16, 16), 4 * 4 * 32)}
    assert {(row.cost.position, row.cost.call) for row in rows} == {(0, 2 * 4 * 4 * 16 * 16)}


@pytest.mark.parametrize(("method", "kind"), cases())
def test_a_plan_counts_what_then_trains(method: str, kind: str) -> None:
    net, _ = net_of(kind)
    report = plan_report({"net": net}, AdapterPlan(("re:.*",), config=config_of(method)), {})
    assert not net.layer._forward_hooks and not net.layer._forward_pre_hooks
    adapters = adapted(net, method)
    trained = sum(one.numel() for group in adapters.parameter_groups(1.0) for one in group["params"])
    assert report.parameters == trained
    assert report.base_parameters == sum(one.numel() for one in net.parameters())


@pytest.mark.parametrize(
    ("method", "kind", "position", "call"),
    [
        ("lora", "conv2d", 2 * 4 * (8 * 9 + 12), 0),
        ("lora", "conv2d grouped", 2 * 4 * (2 * 9 + 12 // 4), 0),
        ("lora", "embedding", 2 * 4 * 12, 0),  # reading a row costs nothing
        ("dora", "linear", 2 * 4 * (12 + 8), 2 * 4 * (8 * 12 + 12 * 4 + 8 * 4)),  # W A^T, A A^T and B (A A^T)
        ("loha", "linear", 2 * 12 * 8, 2 * 2 * 4 * 12 * 8),  # two products make dW
        ("vera", "linear", 2 * 4 * (12 + 8), 0),
        ("bias", "linear", 0, 0),
        ("lora", "fused", 0, 2 * 4 * 12 * 24),
    ],
)
def test_flops_are_those_of_the_method(method: str, kind: str, position: int, call: int) -> None:
    (row,) = plan_report({"net": net_of(kind)[0]}, AdapterPlan(("re:.*",), config=config_of(method)), {}).rows
    assert (row.cost.position, row.cost.call) == (position, call)


def test_what_injection_refuses_is_refused_before() -> None:
    model, _ = architectures.build("llama")
    for plan, message in (
        (AdapterPlan(("q_prjo",)), "q_proj"),
        (AdapterPlan(("q_proj",), ("k_proj",)), "touches none"),
        (AdapterPlan(("embed_tokens",), config=AdapterConfig(dropout=0.1)), "model.model.embed_tokens: dropout"),
    ):
        for make in (plan_report, inject):
            with pytest.raises(ConfigError, match=message):
                make({"model": model}, plan, {})


def test_a_model_without_memory_gets_no_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(100_000, 100_000) for _ in range(10)))  # 400 GB
    report = report_of(model, "*", config=AdapterConfig("diff"))
    assert report.parameters == report.base_parameters == 10 * 100_000 * 100_001
    assert all(parameter.is_meta for parameter in model.parameters())
