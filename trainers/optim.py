"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

from typing import Any

import torch

from studio.config import OptimizerConfig, ScheduleConfig


def make_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) over parameter groups that bring their own learning rates."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def make_schedule(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule over `steps` optimizer steps; its factor is a function of the step alone."""
    from transformers import get_scheduler

    return get_scheduler(config.name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)
