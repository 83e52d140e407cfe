"""Files of ours in a checkout of kohya's sd-scripts, SD_SCRIPTS: in a process of its own, equal to what they mean."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from consuming import NEEDED, Answer, Case, answers

from studio.formats import kohya

CHECKOUT = os.environ.get("SD_SCRIPTS")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="needs a checkout of kohya-ss/sd-scripts: set SD_SCRIPTS")

LOADED = [
    Case("sd15", "lora, mixed alphas", "kohya"),
    Case("sd15", "locon", "kohya"),
    Case("sdxl-deep", "lora, mixed alphas", "kohya"),
    Case("sdxl-deep", "locon", "kohya"),
    Case("flux", "lora, mixed alphas", "kohya"),
]
MISREAD = [Case("sd15", "dora", "kohya"), Case("flux", "dora", "kohya"), Case("flux", "lora, all layers", "kohya")]
UNUSED = [Case("sd15", name, "kohya") for name in ("loha", "lokr", "oft")]


@pytest.fixture(scope="module")
def sd_scripts(tmp_path_factory):
    place = tmp_path_factory.mktemp("sd-scripts")
    return answers("consume_with_sd_scripts.py", [*LOADED, *MISREAD, *UNUSED], place, str(CHECKOUT))


def under_their_names(answer: Answer, family: str) -> Answer:
    """With our changes by kohya's module, where fused layers have the changes of their parts one after the other."""
    parts: dict[str, list[torch.Tensor]] = {}
    for layer, change in answer.changes.items():
        parts.setdefault(kohya.module_name(layer, family), []).append(change)
    return replace(answer, changes={module: torch.cat(own) for module, own in parts.items()})


@pytest.mark.parametrize("case", LOADED, ids=str)
def test_sd_scripts_computes_what_the_file_means(sd_scripts, case):
    answer = sd_scripts[case]
    assert answer.theirs["refused"] == "" and answer.theirs["unexpected"] == []
    assert answer.same_outputs()
    assert answer.reports["sd-scripts"].faithful
    assert min(answer.needed.values()) > NEEDED


@pytest.mark.parametrize("case", MISREAD, ids=str)
def test_the_check_tells_what_sd_scripts_leaves_out_and_how_far_it_is_off(sd_scripts, case):
    answer = sd_scripts[case]
    report = answer.reports["sd-scripts"]
    assert set(report.unused) == set(answer.theirs["unexpected"])
    assert not answer.same_outputs()
    theirs = under_their_names(answer, {"sd15": "sd", "flux": "flux"}[case.kind])
    assert theirs.deviation() > 0.1
    assert report.error == pytest.approx(theirs.deviation(), rel=1e-3)


@pytest.mark.parametrize("case", UNUSED, ids=str)
def test_sd_scripts_uses_no_other_method(sd_scripts, case):
    answer = sd_scripts[case]
    assert answer.reports["sd-scripts"].used == 0
    assert set(answer.reports["sd-scripts"].unused) == set(answer.theirs["unexpected"])
