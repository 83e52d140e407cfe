"""`--dry-run`: what a run would do, with time and memory measured on one step of the real model."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from dataclasses import dataclass

import psutil
import torch

from studio.data.buckets import bucket_report
from trainers.sd_task import DiffusionTask, Sample


@dataclass(frozen=True)
class Plan:
    """`seconds` are for the training steps alone; `memory_bytes` is the peak of the measured step."""

    data: str
    buckets: str
    pictures: int
    left_out: int
    steps: int
    epochs: float
    layers: dict[str, int]
    adapters: dict[str, int]
    parameters: int
    file_bytes: int
    device: str
    seconds: float
    memory_bytes: int

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        layers = ", ".join(f"{role} {count}" for role, count in self.layers.items())
        adapters = ", ".join(f"{count} x {adapter}" for adapter, count in self.adapters.items())
        return "\n".join(
            [
                self.data,
                self.buckets,
                f"Layers:  {layers}",
                f"Adapter: {adapters}; {self.parameters:,} parameters, file of {_size(self.file_bytes)}",
                f"Steps:   {self.steps}, which is {self.epochs:.1f} epochs",
                f"Time:    about {minutes} min {seconds:02d} s on {self.device} by one measured step, without samples",
                f"Memory:  {_size(self.memory_bytes)} at the peak of that step",
            ]
        )


def make_plan(task: DiffusionTask) -> Plan:
    """Counts everything, and trains one step (which is thrown away) to measure time and memory."""
    train = task.config.train
    epoch = task.batches(0, train.batch_size)
    largest = max(epoch, key=_pixels)
    seconds, memory = _measure(task, largest)
    seconds *= sum(map(_pixels, epoch)) / len(epoch) / _pixels(largest)  # the mean batch, by its size
    parameters = sum(parameter.numel() for parameter in task.adapters.parameters())
    settings = Counter(
        f"{adapter.method} rank {adapter.config.rank} alpha {adapter.config.scale * adapter.config.rank:g}"
        for _, adapter in task.adapters.items()
    )
    return Plan(
        data=task.images.report(),
        buckets=bucket_report(task.buckets),
        pictures=len(task.images.items),
        left_out=len(task.images.left_out),
        steps=train.steps,
        epochs=train.steps * train.gradient_accumulation / len(epoch),
        layers=_by_role(task),
        adapters=dict(settings),
        parameters=parameters,
        file_bytes=parameters * 4,
        device=str(next(task.parts["unet"].parameters()).device),
        seconds=seconds * train.steps * train.gradient_accumulation,
        memory_bytes=memory,
    )


def _by_role(task: DiffusionTask) -> dict[str, int]:
    """Adapted layers by the first role of the family that has them; "other" for those that none has."""
    counts: Counter[str] = Counter()
    for name in task.adapters.names:
        roles = (
            role
            for role, expressions in task.family.roles.items()
            if any(re.fullmatch(expression, name) for expression in expressions)
        )
        counts[next(roles, "other")] += 1
    return dict(counts)


def _pixels(batch: list[Sample]) -> int:
    """Pixels of a whole batch: what time and memory grow with."""
    width, height = batch[0].size
    return len(batch) * width * height


def _measure(task: DiffusionTask, batch: list[Sample]) -> tuple[float, int]:
    """(seconds, peak bytes) of one forward and backward pass; the first, which warms up, is not counted."""
    task.check(batch)
    task.adapters.train()
    started = 0.0
    for _ in range(2):
        started = time.perf_counter()
        task(batch, 0).mean().backward()
        task.adapters.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if torch.cuda.is_available():
        return seconds, torch.cuda.max_memory_allocated()
    return seconds, _peak_memory()


def _peak_memory() -> int:
    """Bytes that this process held at most."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
