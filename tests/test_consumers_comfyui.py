"""Files of ours under the LoRA code of a ComfyUI checkout, COMFYUI: our rules for it hold, key by key and number by
number."""

from __future__ import annotations

import os

import pytest
from consuming import ADAPTERS, MORE, Case, answers

CHECKOUT = os.environ.get("COMFYUI")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="needs a checkout of ComfyUI: set COMFYUI")

ONLY = ("unet", "transformer", "text_encoder")
CASES = [
    *(Case("sd15", name, "kohya") for name in (*ADAPTERS, *MORE)),
    *(Case(kind, "lora, all layers", "comfyui") for kind in ("sd15", "sdxl", "flux")),
    *(Case(kind, "lora, all layers", "diffusers") for kind in ("sd15", "sdxl", "flux")),
    *(Case(kind, "dora", "lycoris", ONLY) for kind in ("sd15", "sdxl", "flux")),
    *(Case("flux", name, "kohya") for name in ("lora, all layers", "dora", "loha")),
    Case("sdxl", "locon", "kohya"),
]


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory):
    return answers("consume_with_comfyui.py", CASES, tmp_path_factory.mktemp("comfyui"), str(CHECKOUT))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_check_tells_what_comfyui_does(comfyui, case):
    answer = comfyui[case]
    report = answer.reports["comfyui"]
    idle = {key for key in report.unused if key.endswith(".rescale")}  # it reads OFT's and does nothing with it
    assert set(report.unused) - idle == set(answer.theirs["unused"])
    assert report.error == pytest.approx(answer.deviation(), rel=1e-3, abs=1e-5)
