"""Files of ours in diffusers' `load_lora_weights`: in a process of its own, equal to what the file means."""

from __future__ import annotations

import pytest
from consuming import NEEDED, Case, answers

DOUBLE = {"without": ".single_transformer_blocks."}  # diffusers converts single blocks of FLUX.1's width alone
LOADED = [
    Case("sd15", "lora", "kohya"),
    Case("sd15", "locon", "kohya"),
    Case("sd15", "lora, mixed alphas", "diffusers"),
    Case("sd15", "dora", "diffusers"),
    Case("sdxl", "lora", "kohya"),
    Case("sdxl", "locon", "kohya"),
    Case("sdxl", "lora, mixed alphas", "diffusers"),
    Case("sdxl", "dora", "diffusers"),
    Case("flux", "lora, all layers", "diffusers"),
    Case("flux", "dora", "diffusers"),
    Case("flux", "lora, mixed alphas", "kohya", **DOUBLE),
]
MISREAD = [
    Case("sd15", "lora, mixed alphas", "kohya"),
    Case("sdxl", "dora", "kohya"),
    Case("flux", "dora", "kohya", **DOUBLE),
    Case("flux", "lora, all layers", "kohya", **DOUBLE),
]
REFUSED = [Case("sd15", name, "kohya") for name in ("loha", "lokr", "oft")] + [Case("flux", "lora", "kohya")]


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory):
    return answers("consume_with_diffusers.py", [*LOADED, *MISREAD, *REFUSED], tmp_path_factory.mktemp("diffusers"))


@pytest.mark.parametrize("case", LOADED, ids=str)
def test_diffusers_computes_what_the_file_means(diffusers, case):
    answer = diffusers[case]
    assert answer.theirs["refused"] == "" and answer.same_outputs()
    assert set(answer.theirs["changes"]) == set(answer.changes)
    assert answer.reports["diffusers"].faithful
    assert min(answer.needed.values()) > NEEDED


@pytest.mark.parametrize("case", MISREAD, ids=str)
def test_the_check_tells_how_far_diffusers_is_off(diffusers, case):
    """Once a version of diffusers reads such files right, the rule is wrong and has to go."""
    answer = diffusers[case]
    assert not answer.same_outputs()
    assert answer.deviation() > 0.1
    assert answer.reports["diffusers"].error == pytest.approx(answer.deviation(), rel=1e-3)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_the_check_tells_that_diffusers_refuses(diffusers, case):
    answer = diffusers[case]
    assert answer.theirs["refused"]
    assert answer.reports["diffusers"].used == 0
