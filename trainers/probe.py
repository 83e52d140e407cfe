"""One step and one picture of the real model, measured: what a run will need, before it begins."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import psutil
import torch

from studio.families.base import vae_factor
from trainers.checkpoint import KEPT
from trainers.optim import make_optimizer
from trainers.sd_task import DiffusionTask, Sample

FEW = 5  # sampler steps that are drawn
PNG_BYTES = 1.5  # a pixel of a drawn picture, compressed


@dataclass(frozen=True)
class Probe:
    """`step_s` is one batch forward and back with the optimizer's step, `picture_s` one sample picture;
    `memory_bytes` is the peak of both, `memory_free_bytes` what this process could have had."""

    step_s: float
    picture_s: float
    memory_bytes: int
    memory_free_bytes: int


def measure(task: DiffusionTask, batch: list[Sample]) -> Probe:
    """Trains a step of `batch` and draws a picture; the first of each warms up and is not counted.

    The adapters are changed by it: the task is for nothing else afterwards.
    """
    device = next(task.parts["unet"].parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # loading and encoding are over
    task.check(batch)
    step_s = _step(task, batch, device)
    picture_s = _picture(task)
    return Probe(step_s, picture_s, *_memory(device))


def _step(task: DiffusionTask, batch: list[Sample], device: torch.device) -> float:
    settings = task.config.optimizer
    optimizer = make_optimizer(settings, task.adapters.parameter_groups(settings.lr))
    task.adapters.train()
    started = 0.0
    for step in range(2):
        started = time.perf_counter()
        task(batch, step).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _picture(task: DiffusionTask) -> float:
    """Seconds of a sample picture, by one of a single sampler step and one of a few."""
    task.adapters.eval()
    steps = task.config.samples.steps
    few = min(FEW, steps)

    def timed(count: int) -> float:
        started = time.perf_counter()
        task.draw(task.preview_prompts()[0], 0, count)  # ends on the CPU, so nothing is under way any more
        return time.perf_counter() - started

    timed(1)
    short, long = timed(1), timed(few)
    a_step = max(long - short, 0.0) / max(few - 1, 1)  # the rest is the prompt, and decoding
    return long + a_step * (steps - few)


def _memory(device: torch.device) -> tuple[int, int]:
    """(peak bytes, bytes that this process has and could have) on the device; on a CPU, of the whole process."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return torch.cuda.max_memory_allocated(device), free + torch.cuda.memory_reserved(device)
    return _peak_memory(), psutil.virtual_memory().available + psutil.Process().memory_info().rss


def _peak_memory() -> int:
    """Bytes that this process held at most."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def previews(task: DiffusionTask) -> int:
    """How many sample pictures a run draws: at the start, at the end, and every so many steps."""
    train = task.config.train
    between = (train.steps - 1) // train.sample_every if train.sample_every else 0
    return (2 + between) * len(task.preview_prompts())


def disk_bytes(task: DiffusionTask, adapter_bytes: int, optimizer_bytes: int) -> int:
    """What a run writes: adapters and states of its checkpoints, pictures, and latents into the cache."""
    train, data = task.config.train, task.config.data
    checkpoints = -(-train.steps // train.checkpoint_every) if train.checkpoint_every else 1
    files = (checkpoints + 1) * adapter_bytes  # each checkpoint's, and the last one under its own name
    states = min(checkpoints, KEPT) * (adapter_bytes + optimizer_bytes)
    pictures = previews(task) * data.resolution**2 * PNG_BYTES
    channels = task.models.parts["vae"].config.latent_channels
    pixels = sum(width * height * len(items) for (width, height), items in task.buckets.items())
    latents = pixels / vae_factor(task.models) ** 2 * channels * 4 * (1 + data.flip)
    return round(files + states + pictures + latents)
