"""CPU time of several variants of one computation, on a machine that others use too.

Every round runs each variant once, in an order drawn anew, so that a slow spell hits them all. A
variant's figure is the median over the rounds of its time divided by the reference's in the same
round. The reference takes part twice (A/A): how far the second one's figure may be from 1 by
chance is the spread, below which no difference is claimed.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

AGAIN = "again"
"""The name of the reference's second row."""


@dataclass(frozen=True)
class Variant:
    """`run(*setup())` is timed; `setup` is not."""

    run: Callable[..., Any]
    setup: Callable[[], tuple[Any, ...]] = tuple


@dataclass(frozen=True)
class Samples:
    """CPU seconds of each variant, one for each round."""

    reference: str
    seconds: Mapping[str, list[float]]

    def ratio(self, name: str, to: str | None = None) -> float:
        """The median over the rounds of `name`'s time over `to`'s (without it, the reference's)."""
        return median(self._ratios(name, to or self.reference))

    def ratio_of_minima(self, name: str, to: str | None = None) -> float:
        """`name`'s least time over `to`'s (without it, the reference's)."""
        return min(self.seconds[name]) / min(self.seconds[to or self.reference])

    def spread(self) -> float:
        """The end farther from 1 of the 95% bootstrap interval of the A/A ratio, minus 1: 0.02 is 2%."""
        ratios, draw = self._ratios(AGAIN, self.reference), random.Random(0)
        medians = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
        return max(abs(medians[24] - 1), abs(medians[974] - 1))

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """Variant -> median and minimum, in ms."""
        return {
            name: {"median_ms": 1e3 * median(times), "min_ms": 1e3 * min(times)} for name, times in self.seconds.items()
        }

    def _ratios(self, name: str, to: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)]


def interleave(
    variants: Mapping[str, Variant],
    rounds: int,
    resolution: float = 1.0,
    clock: Callable[[], float] = time.process_time,
) -> Samples:
    """Times `variants`, of which the first is the reference and one is called `AGAIN`.

    After one round that is thrown away come `rounds` >= 1, and as many again, up to three times,
    until the spread is at most `resolution`. `clock` counts seconds of CPU time.
    """
    order, draw = list(variants), random.Random(0)
    samples = Samples(order[0], {name: [] for name in order})
    gc.collect()
    gc.freeze()  # so that collecting before each run is quick
    for done in range(3 * rounds + 1):
        draw.shuffle(order)
        for name in order:
            seconds = _time(variants[name], clock)
            if done:
                samples.seconds[name].append(seconds)
        if done and done % rounds == 0 and samples.spread() <= resolution:
            break
    gc.unfreeze()
    return samples


def _time(variant: Variant, clock: Callable[[], float]) -> float:
    arguments = variant.setup()
    gc.collect()
    gc.disable()  # a collection would land on whichever variant is running
    try:
        start = clock()
        variant.run(*arguments)
        return clock() - start
    finally:
        gc.enable()
