"""What both training programs of the build share: a resumable loop with a time budget and an EMA."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def cosine(step: int, total: int, warmup: int = 100, floor: float = 0.01) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def train(
    modules: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    file: Path,
    steps: int,
    lr: float,
    ema_decay: float,
    report: Callable[[int, nn.Module], None],
    every: int = 500,
    weight_decay: float = 0.01,
) -> nn.Module:
    """Runs `loss(step)` to `steps`, checkpointing to `file`; returns the averaged modules.

    `loss` draws its data from `step` alone, so a killed build resumes to the same weights.
    """
    ema = torch.optim.swa_utils.AveragedModel(
        modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay), use_buffers=False
    )
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    start = 0
    if file.exists():
        saved = torch.load(file, map_location="cpu", weights_only=True)
        modules.load_state_dict(saved["modules"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    mean, since = None, time.monotonic()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps)
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update_parameters(modules)
        mean = value.item() if mean is None else 0.98 * mean + 0.02 * value.item()
        if (step + 1) % 50 == 0:
            rate = 50 / (time.monotonic() - since)
            since = time.monotonic()
            print(f"{file.stem} {step + 1}/{steps} loss {mean:.5f} {rate:.2f} steps/s", flush=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            _save(file, modules, ema, optimizer, step + 1)
            report(step + 1, ema.module)
            since = time.monotonic()
    return ema.module


def _save(file: Path, modules: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "modules": modules.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)
