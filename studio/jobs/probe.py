"""A job that measures what a training would take; its result is `train-sd --dry-run`'s, less the table of layers."""

from __future__ import annotations

from studio.config import TrainSDConfig
from studio.jobs.result import Result
from studio.runs import Run


def probe(config: TrainSDConfig, run: Run) -> Result:
    """Loads the base, trains a step and draws a picture. Raises what the training would raise before it begins."""
    run.update_status(message="loading the base and the pictures")
    from trainers import sd

    plan = sd.plan(config)
    adapter = plan.adapter
    layers = {"layers": len(adapter.rows), "parameters": adapter.parameters, "adapter_bytes": adapter.adapter_bytes}
    return Result([], {**vars(plan), "adapter": layers, "fits": plan.fits})
