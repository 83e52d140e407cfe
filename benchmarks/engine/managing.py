"""Injecting adapters, and choosing among loaded ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import torch
from torch import nn

from benchmarks.engine.figures import Figure, timed
from benchmarks.engine.pair import inject_ours, peft_config, with_peft
from benchmarks.engine.timing import AGAIN, Samples, Variant, interleave
from benchmarks.engine.workloads import Size, deep_llama
from studio.adapters import AdapterSet

LOADED = 7


def injecting(size: Size) -> Iterator[Figure]:
    from peft import get_peft_model

    work = deep_llama(size)
    theirs = Variant(lambda model: get_peft_model(model, peft_config(work.targets)), lambda: _copy(work.model))
    ours = Variant(lambda model: inject_ours(model, work.targets), lambda: _copy(work.model))
    samples = interleave({"peft": theirs, AGAIN: theirs, "ours": ours}, size.rounds // 2 or 1)
    yield _share_of_peft(f"inject: {work.name}", samples, 0.15)


def choosing(size: Size) -> Iterator[Figure]:
    """Switch and disable with seven adapters loaded, and what loaded adapters cost a short forward pass."""
    work = deep_llama(size)
    theirs = with_peft(work.model, work.targets, adapters=LOADED)
    model = copy.deepcopy(work.model)
    sets = [inject_ours(model, work.targets, seed=seed) for seed in range(LOADED)]
    for adapters in sets[1:]:
        adapters.enabled = False
    where = f"{LOADED} loaded, {work.name}"
    yield _share_of_peft(f"switch adapters: {where}", _switch(theirs, sets[:2], size.rounds), 0.05)
    yield _share_of_peft(f"disable and enable adapters: {where}", _disable(theirs, sets[0], size.rounds), 0.05)
    theirs.set_adapter("default")
    bare = Variant(lambda: work.forward(work.model))
    variants = {
        "bare": bare,
        AGAIN: bare,
        "peft": Variant(lambda: work.forward(theirs)),
        "ours": Variant(lambda: work.forward(model)),
    }
    with torch.no_grad():
        samples = interleave(variants, size.rounds)
    yield timed(f"no-grad forward of 4 tokens over bare, one active: {where}", samples)


def _switch(theirs: Any, pair: list[AdapterSet], rounds: int) -> Samples:
    names, turns = cycle(["1", "default"]), cycle([pair[::-1], pair])

    def ours() -> None:
        on, off = next(turns)
        off.enabled, on.enabled = False, True

    peft = Variant(lambda: theirs.set_adapter(next(names)))
    return interleave({"peft": peft, AGAIN: peft, "ours": Variant(ours)}, 2 * (rounds // 2) + 1)  # ends as it began


def _disable(theirs: Any, adapters: AdapterSet, rounds: int) -> Samples:
    def peft() -> None:
        with theirs.disable_adapter():
            pass

    def ours() -> None:
        adapters.enabled = False
        adapters.enabled = True

    return interleave({"peft": Variant(peft), AGAIN: Variant(peft), "ours": Variant(ours)}, rounds)


def _share_of_peft(name: str, samples: Samples, bound: float) -> Figure:
    times = samples.milliseconds()
    note = f"{times['peft']['median_ms']:.3g} ms / {times['ours']['median_ms']:.3g} ms"
    return timed(name, samples, bound, f"at most {bound:g} of peft", note=note)


def _copy(model: nn.Module) -> tuple[nn.Module]:
    return (copy.deepcopy(model),)
