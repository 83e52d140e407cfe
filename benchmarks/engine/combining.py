"""The sum of several LoRAs as one LoRA of the rank of each: the truncated SVD of the summed products."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from benchmarks.engine.figures import Figure, timed
from benchmarks.engine.pair import RANK, inject_ours, share_random_factors, with_peft
from benchmarks.engine.timing import AGAIN, Variant, interleave
from benchmarks.engine.workloads import Size
from studio.algebra import combine
from studio.formats.state import AdapterState

WEIGHTS = [1.0, 0.3, -0.2]
"""So far apart that the 16th and the 17th singular value differ: where they nearly coincide, the best sum of
rank 16 is hardly determined, and neither library's fp32 result is within 1e-5 of the exact one."""

LAYERS, WIDTH, TARGETS = 16, 512, r"\d+"


@torch.no_grad()
def svd(size: Size) -> Iterator[Figure]:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    names = ["default", "1", "2"]
    theirs = with_peft(model, TARGETS, adapters=len(names))
    states = []
    for seed, name in enumerate(names):
        adapters = inject_ours(copy.deepcopy(model), TARGETS, seed=seed)
        share_random_factors(adapters, theirs, name)
        states.append(AdapterState("model", adapters.state()))

    def forget() -> tuple[()]:
        if "sum" in theirs.peft_config:
            theirs.delete_adapter("sum")
        return ()

    peft = Variant(lambda: theirs.add_weighted_adapter(names, WEIGHTS, "sum", combination_type="svd"), forget)
    ours = Variant(lambda: combine(states, WEIGHTS, rank=RANK))
    samples = interleave({"peft": peft, AGAIN: peft, "ours": ours}, min(size.rounds, 7))
    times, error = samples.milliseconds(), _error(combine(states, WEIGHTS, rank=RANK), theirs)
    where = f"{LAYERS} layers of {WIDTH} x {WIDTH}"
    note = f"{times['peft']['median_ms']:.0f} ms / {times['ours']['median_ms']:.1f} ms"
    yield timed(f"SVD combination of three adapters: {where}", samples, 1 / 30, "at most 1/30 of peft", note=note)
    yield Figure(f"difference of their products over the largest entry: {where}", "", 0, error, 1e-5, "at most 1e-5")


def _error(combined: AdapterState, theirs: nn.Module) -> float:
    """max |ours - peft's| / max |peft's| over the layers' products; `forget` left peft's "sum" in place."""
    errors = []
    for name, entry in combined.tensors.items():
        expected = theirs.base_model.model.get_submodule(name.removeprefix("model.")).get_delta_weight("sum")
        errors.append((_product(entry) - expected).abs().max() / expected.abs().max())
    return torch.stack(errors).max().item()


def _product(entry: Mapping[str, Tensor]) -> Tensor:
    up, down = entry["lora_up.weight"], entry["lora_down.weight"]
    return entry["alpha"] / down.shape[0] * up @ down
