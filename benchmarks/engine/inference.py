"""Forward passes without gradients: one adapter, merged or beside the weights, and a different one for every sample."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from benchmarks.engine.figures import Figure, timed
from benchmarks.engine.pair import (
    DORA,
    LORA,
    Kind,
    check_equal,
    inject_ours,
    share_random_factors,
    with_ours,
    with_peft,
)
from benchmarks.engine.timing import AGAIN, Variant, interleave
from benchmarks.engine.workloads import Size, Workload, deep_llama, llama, unet
from studio.adapters import mixed_batch


@torch.no_grad()
def forward(size: Size) -> Iterator[Figure]:
    for work in (llama(size), unet(size)):
        for kind in (LORA, DORA):
            yield from _forward(work, kind, size.rounds)


def _forward(work: Workload, kind: Kind, rounds: int) -> Iterator[Figure]:
    theirs = with_peft(work.model, work.targets, kind).eval()
    beside, adapters = with_ours(work, kind)
    share_random_factors(adapters, theirs)
    merged, to_merge = with_ours(work, kind)
    to_merge.load_state_dict(adapters.state_dict())
    to_merge.merge()
    check_equal(work.forward(beside), work.forward(theirs))
    check_equal(work.forward(merged), work.forward(theirs))
    models = {"bare": work.model, AGAIN: copy.deepcopy(work.model), "peft": theirs, "ours": beside, "merged": merged}
    variants = {name: Variant(lambda model=model: work.forward(model)) for name, model in models.items()}
    samples = interleave(variants, rounds, resolution=0.005)
    name = f"no-grad forward over bare: {work.name}, {kind.name}"
    yield timed(f"{name}, effective weights cached", samples, 1.01, "at most 1.01x", ours="merged")
    yield timed(f"{name}, without the copy", samples, samples.ratio("peft"), "no worse than peft")


@torch.no_grad()
def mixed(size: Size) -> Iterator[Figure]:
    """Four samples with four adapters over the same four with one adapter."""
    work = deep_llama(size, batch=4)
    theirs = with_peft(work.model, work.targets, adapters=4).eval()
    model = copy.deepcopy(work.model)
    sets = [inject_ours(model, work.targets, seed=seed).eval() for seed in range(4)]
    names = ["default", "1", "2", "3"]
    for adapters, name in zip(sets, names, strict=True):
        share_random_factors(adapters, theirs, name)
        adapters.check_used(lambda: work.forward(model))
    theirs.set_adapter("default")

    def enable(count: int) -> tuple[()]:
        for place, adapters in enumerate(sets):
            adapters.enabled = place < count
        return ()

    def together() -> Tensor:
        with mixed_batch(sets):
            return work.forward(model)

    def entered() -> tuple[ExitStack]:
        enable(4)
        block = ExitStack()
        block.enter_context(mixed_batch(sets))
        work.forward(model)
        return (block,)

    def again(block: ExitStack) -> None:
        with block:
            work.forward(model)

    check_equal(together(), work.forward(theirs, adapter_names=names))
    one = Variant(lambda: work.forward(model), lambda: enable(1))
    variants = {
        "one": one,
        AGAIN: one,
        "mixed": Variant(together, lambda: enable(4)),
        "further": Variant(again, entered),
        "peft, one": Variant(lambda: work.forward(theirs)),
        "peft, mixed": Variant(lambda: work.forward(theirs, adapter_names=names)),
    }
    samples = interleave(variants, size.rounds)
    for name, what in (("mixed", "one pass"), ("further", "each further pass with the same choice")):
        row = f"mixed batch of four adapters over one adapter: {work.name}, {what}"
        yield timed(row, samples, 1.5, "at most 1.5x", ours=name, peft="peft, mixed", peft_over="peft, one")
