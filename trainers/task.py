"""What a trainer gives to the loop: batches as data, a loss for each sample, previews and files."""

from __future__ import annotations

from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor, nn

from studio.adapters import AdapterSet, RankSchedule
from studio.runs import Run

Item = TypeVar("Item")


class Task(nn.Module, Generic[Item]):
    """A module that owns the models and their `AdapterSet`, so that one object is wrapped for many devices."""

    adapters: AdapterSet
    rank_schedule: RankSchedule | None = None

    def batches(self, epoch: int, batch_size: int) -> list[list[Item]]:
        """The batches of an epoch, a function of the arguments only, as many in every epoch."""
        raise NotImplementedError

    def forward(self, items: list[Item], step: int) -> Tensor:
        """The loss of each sample, shape (B,). Every random draw is a function of (seed, sample, step)."""
        raise NotImplementedError

    def check(self, items: list[Item]) -> None:
        """Raises ConfigError where an adapter would take no part in `forward`."""
        self.adapters.check_used(lambda: self(items, 0))

    def preview(self, run: Run, step: int) -> None:
        """Draws or writes samples of a step into `run.samples`; does nothing where they are there already."""
        raise NotImplementedError

    def save(self, path: Path, step: int) -> Path:
        """Exports the adapters below the name `path` (without suffix); returns the file or folder."""
        raise NotImplementedError
