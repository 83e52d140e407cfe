"""A progressive rank: training starts with few ranks, and more join (or leave) at given steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.optim import Optimizer

from studio.adapters.adapter_set import AdapterSet
from studio.adapters.surgery import changeable, grow, shrink
from studio.errors import ConfigError


@dataclass(frozen=True)
class RankSchedule:
    """The rank of all LoRA and DoRA layers as a function of the step, which counts from 0.

    `ranks` maps a step to the rank from that step on: {0: 4, 500: 8, 1000: 16}. It keeps no state: with the
    adapters and the optimizer restored, a run resumes to the same bits. Raises ConfigError without a step 0, or
    for a step or rank out of range.
    """

    ranks: Mapping[int, int]
    seed: int = 0

    def __post_init__(self) -> None:
        if 0 not in self.ranks:
            raise ConfigError("the rank schedule has no step 0: its entry is the rank to start with")
        for step, rank in self.ranks.items():
            if step < 0 or rank < 1:
                raise ConfigError(f"the rank schedule has rank {rank} at step {step}; ranks are >= 1 and steps >= 0")

    def rank_at(self, step: int) -> int:
        """The rank that step `step` trains with."""
        return self.ranks[max(start for start in self.ranks if start <= step)]

    def check(self, adapters: AdapterSet, optimizer: Optimizer | None) -> None:
        """Raises ConfigError where one of the changes to come would fail."""
        falls = any(self.rank_at(step) < self.rank_at(step - 1) for step in self.ranks if step)
        for rank in self.ranks.values():
            changeable(adapters, optimizer, rank, exchanged=falls, truncated=falls)

    def after_step(self, adapters: AdapterSet, step: int, optimizer: Optimizer | None) -> None:
        """To be called after every step, also where fp16 gradients overflowed: brings the rank of the next one.

        Layers that have more (or fewer, where it falls) keep theirs. Raises ConfigError as `check` does, already
        after the first step.
        """
        if step == 0:  # the optimizer has a state from here on
            self.check(adapters, optimizer)
        before, rank = self.rank_at(step), self.rank_at(step + 1)
        if rank > before:
            grow(adapters, rank, optimizer, self.seed)
        elif rank < before:
            shrink(adapters, rank, optimizer=optimizer, seed=self.seed)
