"""Files of ours in lycoris_lora: in a process of its own, equal to what the file means."""

from __future__ import annotations

import pytest
from consuming import ADAPTERS, NEEDED, Case, answers

ONLY = ("unet", "transformer", "text_encoder")  # the components that have names in the wrapper's file
LOADED = [
    Case(kind, name, "lycoris", ONLY)
    for kind in ("sd15", "sdxl", "flux")
    for name in ADAPTERS
    if name != "locon" or kind != "flux"
]
LESS = Case("sd15", "loha", "lycoris", ONLY, without=".mid_block.attentions.0.proj_in")


@pytest.fixture(scope="module")
def lycoris(tmp_path_factory):
    return answers("consume_with_lycoris.py", [*LOADED, LESS], tmp_path_factory.mktemp("lycoris"))


@pytest.mark.parametrize("case", LOADED, ids=str)
def test_lycoris_computes_what_the_file_means(lycoris, case):
    answer = lycoris[case]
    assert answer.same_outputs()
    assert set(answer.theirs["changes"]) == set(answer.changes)
    assert answer.reports["lycoris"].faithful
    assert min(answer.needed.values()) > NEEDED


@pytest.mark.parametrize("case", LOADED, ids=str)
def test_the_check_tells_how_far_merging_in_lycoris_is_off(lycoris, case):
    answer = lycoris[case]
    assert answer.reports["lycoris-merge"].error == pytest.approx(answer.deviation(), rel=1e-3, abs=1e-5)
    assert (answer.deviation() > 0.1) == (case.name in ("loha", "lokr"))


def test_a_layer_less_in_the_file_shows(lycoris):
    whole, less = lycoris[Case("sd15", "loha", "lycoris", ONLY)], lycoris[LESS]
    assert len(less.changes) == len(whole.changes) - 1
    assert less.same_outputs()
    less.theirs = whole.theirs
    assert not less.same_outputs()
