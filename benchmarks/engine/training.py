"""Forward and backward passes of adapted models over the bare frozen model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import count

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine.figures import Figure, overhead_removed, timed
from benchmarks.engine.pair import DORA, DROPOUT, LORA, Kind, check_equal, share_random_factors, with_ours, with_peft
from benchmarks.engine.timing import AGAIN, Samples, Variant, interleave
from benchmarks.engine.workloads import Size, Workload, llama, unet

SHARES = {"llama": (0.25, 0.45, 0.60), "unet": (0.15, 0.35, 0.50)}
"""Targets: the share of peft's overhead that is gone, for LoRA, dropout and DoRA."""


def train_llama(size: Size) -> Iterator[Figure]:
    return _train(llama(size), SHARES["llama"], size.rounds)


def train_unet(size: Size) -> Iterator[Figure]:
    return _train(unet(size), SHARES["unet"], size.rounds)


def _train(work: Workload, shares: tuple[float, ...], rounds: int) -> Iterator[Figure]:
    for kind, share in zip((LORA, DROPOUT, DORA), shares, strict=True):
        variants = {"bare": _bare_step(work), AGAIN: _bare_step(work), **_steps(work, kind)}
        note = ""
        if kind is LORA:
            note = f"; its flops {_flops(variants['peft']) / _flops(variants['bare']):.3f}x"
        yield _figure(work, kind, share, interleave(variants, rounds, resolution=0.01), note)


def _figure(work: Workload, kind: Kind, share: float, samples: Samples, note: str) -> Figure:
    peft, ours = samples.ratio("peft"), samples.ratio("ours")
    bound = 1 + (1 - share) * (peft - 1)
    target = f"{share:.0%} of the overhead gone: at most {bound:.3f}x"
    name = f"forward + backward over bare: {work.name}, {kind.name}"
    return timed(name, samples, bound, target, note=f"{overhead_removed(peft, ours):.0%} gone{note}")


def _bare_step(work: Workload) -> Variant:
    model = copy.deepcopy(work.model)
    return _step(work, [], lambda: work.forward(model))


def _steps(work: Workload, kind: Kind) -> dict[str, Variant]:
    """One training step of peft's and one of our adapter of `kind`, which compute the same without dropout."""
    theirs, (model, adapters) = with_peft(work.model, work.targets, kind), with_ours(work, kind)
    share_random_factors(adapters, theirs)
    with torch.no_grad():
        check_equal(work.forward(model), work.forward(theirs.eval()))
    keys = count()

    def forward() -> Tensor:
        adapters.set_keys([next(keys)])
        return work.forward(model)

    adapters.train()
    theirs.train()
    return {
        "peft": _step(work, theirs.parameters(), lambda: work.forward(theirs)),
        "ours": _step(work, adapters.parameters(), forward),
    }


def _step(work: Workload, parameters: Iterable[nn.Parameter], forward: Callable[[], Tensor]) -> Variant:
    """A forward and a backward pass; gradients are dropped before it.

    The parameters change in between, as by an optimizer step, so that nothing computed from them (DoRA's
    norm) can be left over from the last pass.
    """
    parameters = [one for one in parameters if one.requires_grad]
    leaves = [*parameters, *(one for one in work.arguments.values() if getattr(one, "requires_grad", False))]

    @torch.no_grad()
    def clear() -> tuple[()]:
        for leaf in leaves:
            leaf.grad = None
        for parameter in parameters:
            parameter.add_(0.0)
        return ()

    def run() -> None:
        output = forward()
        output.backward(torch.ones_like(output))

    return Variant(run, clear)


def _flops(variant: Variant) -> int:
    with FlopCounterMode(display=False) as counter:
        variant.run()
    return counter.get_total_flops()
