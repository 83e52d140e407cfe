"""`--dry-run`: what a run would do, with time, memory and disk by one measured step of the real model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

from studio.adapters.report import PlanReport, plan_report
from studio.data.buckets import bucket_report
from studio.lighter import Fix, lighter
from studio.units import duration, size
from trainers.probe import disk_bytes, measure, previews
from trainers.sd_task import DiffusionTask, Sample, adapter_plan


@dataclass(frozen=True)
class Plan:
    """`adapter` says which layers are adapted and why. `seconds` are for the training steps alone, `sample_seconds`
    for all sample pictures; `memory_bytes` is the peak of the measured step, `disk_bytes` all that a run writes,
    each beside what there is. `fixes` make the run lighter, the cheapest first."""

    data: str
    buckets: str
    pictures: int
    left_out: Mapping[str, str]
    steps: int
    epochs: float
    adapter: PlanReport
    device: str
    seconds: float
    sample_seconds: float
    memory_bytes: int
    memory_free_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    fixes: tuple[Fix, ...]

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice."""
        return self.memory_bytes < self.memory_free_bytes and self.disk_bytes < self.disk_free_bytes

    def __str__(self) -> str:
        lines = [
            self.data,
            self.buckets,
            "Adapter:",
            indent(str(self.adapter), "  "),
            f"Steps:   {self.steps}, which is {self.epochs:.1f} epochs",
            f"Time:    about {duration(self.seconds)} on {self.device} by one measured step, and "
            f"{duration(self.sample_seconds)} of drawing samples",
            f"Memory:  {size(self.memory_bytes)} of {size(self.memory_free_bytes)} at the peak of that step",
            f"Disk:    {size(self.disk_bytes)} of {size(self.disk_free_bytes)}",
        ]
        if not self.fits:
            lines += ["It does not fit. What makes it lighter, the cheapest first:"]
            lines += [f"  {fix.flags}: {fix.effect}; {fix.cost}" for fix in self.fixes]
        return "\n".join(lines)


def make_plan(task: DiffusionTask) -> Plan:
    """Counts everything, and trains one step and draws one picture (both thrown away) to measure time and memory."""
    train, family, models = task.config.train, task.family, task.models
    epoch = task.batches(0, train.batch_size)
    largest = max(epoch, key=_pixels)
    adapter = plan_report(family.prefixes(models), adapter_plan(task.config, family, models), family.roles)
    probe = measure(task, largest)
    mean_batch = sum(map(_pixels, epoch)) / len(epoch) / _pixels(largest)
    device = next(task.parts["unet"].parameters()).device
    return Plan(
        data=task.images.report(),
        buckets=bucket_report(task.buckets),
        pictures=len(task.images.items),
        left_out={str(one.path): one.reason for one in task.images.left_out},
        steps=train.steps,
        epochs=train.steps * train.gradient_accumulation / len(epoch),
        adapter=adapter,
        device=str(device),
        seconds=probe.step_s * mean_batch * train.steps * train.gradient_accumulation,
        sample_seconds=probe.picture_s * previews(task),
        memory_bytes=probe.memory_bytes,
        memory_free_bytes=probe.memory_free_bytes,
        disk_bytes=disk_bytes(task, adapter.adapter_bytes, adapter.optimizer_bytes),
        disk_free_bytes=_free(Path(task.config.output.folder)),
        fixes=tuple(lighter(task.config, device.type)),
    )


def _free(folder: Path) -> int:
    """Bytes free on the disk of a folder that may not be there yet."""
    folder = folder.expanduser().resolve()
    return shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.exists())).free


def _pixels(batch: list[Sample]) -> int:
    """Pixels of a whole batch: what time and memory grow with."""
    width, height = batch[0].size
    return len(batch) * width * height
