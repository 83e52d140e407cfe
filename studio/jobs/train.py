"""Training as a job: what `studio train-sd` does, with its progress in the run's log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from studio.config import TrainSDConfig
from studio.jobs.result import Result
from studio.runs import Run

if TYPE_CHECKING:
    from trainers.sd import TrainResult


def train_sd(config: TrainSDConfig, run: Run) -> Result:
    """Trains from the run's last checkpoint, or from the start."""
    from studio.progress import show_run
    from trainers import sd

    with show_run(run, config.train.batch_size * config.train.gradient_accumulation):
        return result_of(sd.train(config, run))


def result_of(made: TrainResult) -> Result:
    """The adapter first; no files for a run that was stopped."""
    files = [file for file in (made.file, made.sheet, made.loss_plot) if file]
    return Result(files, {"checks": made.checks})
