"""`--dry-run`: what a run would do, with time and memory measured on one step of the real model."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from textwrap import indent

import psutil
import torch

from studio.adapters.report import PlanReport, plan_report, size
from studio.data.buckets import bucket_report
from trainers.sd_task import DiffusionTask, Sample, adapter_plan


@dataclass(frozen=True)
class Plan:
    """`adapter` says which layers are adapted and why. `seconds` are for the training steps alone; `memory_bytes`
    is the peak of the measured step."""

    data: str
    buckets: str
    pictures: int
    left_out: int
    steps: int
    epochs: float
    adapter: PlanReport
    device: str
    seconds: float
    memory_bytes: int

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        return "\n".join(
            [
                self.data,
                self.buckets,
                "Adapter:",
                indent(str(self.adapter), "  "),
                f"Steps:   {self.steps}, which is {self.epochs:.1f} epochs",
                f"Time:    about {minutes} min {seconds:02d} s on {self.device} by one measured step, without samples",
                f"Memory:  {size(self.memory_bytes)} at the peak of that step",
            ]
        )


def make_plan(task: DiffusionTask) -> Plan:
    """Counts everything, and trains one step (which is thrown away) to measure time and memory."""
    train = task.config.train
    epoch = task.batches(0, train.batch_size)
    largest = max(epoch, key=_pixels)
    seconds, memory = _measure(task, largest)
    seconds *= sum(map(_pixels, epoch)) / len(epoch) / _pixels(largest)  # the mean batch, by its size
    family, models = task.family, task.models
    return Plan(
        data=task.images.report(),
        buckets=bucket_report(task.buckets),
        pictures=len(task.images.items),
        left_out=len(task.images.left_out),
        steps=train.steps,
        epochs=train.steps * train.gradient_accumulation / len(epoch),
        adapter=plan_report(family.prefixes(models), adapter_plan(task.config, family, models), family.roles),
        device=str(next(task.parts["unet"].parameters()).device),
        seconds=seconds * train.steps * train.gradient_accumulation,
        memory_bytes=memory,
    )


def _pixels(batch: list[Sample]) -> int:
    """Pixels of a whole batch: what time and memory grow with."""
    width, height = batch[0].size
    return len(batch) * width * height


def _measure(task: DiffusionTask, batch: list[Sample]) -> tuple[float, int]:
    """(seconds, peak bytes) of one forward and backward pass; the first, which warms up, is not counted."""
    task.check(batch)
    task.adapters.train()
    on_cuda = next(task.parts["unet"].parameters()).is_cuda
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()  # loading and encoding are over
    started = 0.0
    for _ in range(2):
        started = time.perf_counter()
        task(batch, 0).mean().backward()
        task.adapters.zero_grad(set_to_none=True)
        if on_cuda:
            torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_allocated() if on_cuda else _peak_memory()


def _peak_memory() -> int:
    """Bytes that this process held at most."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
