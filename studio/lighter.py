"""Settings that make a run need less memory, and what each costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from studio.config import TrainSDConfig

SMALLEST = 256  # pixels: below, a full-size base no longer draws what it knows


@dataclass(frozen=True)
class Fix:
    """`settings` maps dotted keys to values; `effect` and `cost` are in words."""

    name: str
    settings: Mapping[str, Any]
    effect: str
    cost: str

    @property
    def flags(self) -> str:
        """The settings as the command line takes them."""
        return " ".join(f"--set {key}={str(value).lower()}" for key, value in self.settings.items())


def lighter(config: TrainSDConfig, device: str = "cpu") -> list[Fix]:
    """What can still be made lighter in a config, the cheapest first. `device` is "cuda", "cpu", ..."""
    train, found = config.train, []
    if train.batch_size > 1:
        half, batches = train.batch_size // 2, train.gradient_accumulation * 2
        same = {"train.batch_size": half, "train.gradient_accumulation": batches}
        found.append(Fix("Half the batch, twice as often", same, "less memory", "learns the same, a little slower"))
    if config.model.precision == "fp32" or (config.model.precision == "auto" and device == "cpu"):
        found.append(Fix("Compute in bf16", {"model.precision": "bf16"}, "about half the memory", "rounds more"))
    if not train.gradient_checkpointing:
        on = {"train.gradient_checkpointing": True}
        found.append(Fix("Gradient checkpointing", on, "much less memory", "about a third slower"))
    if train.batch_size > 1:
        fewer = {"train.batch_size": train.batch_size // 2}
        found.append(Fix("Smaller batch", fewer, "less memory, half the time", "noisier steps"))
    if (side := _smaller(config.data.resolution, config.data.bucket_step)) >= SMALLEST:
        lower = {"data.resolution": side}
        found.append(Fix(f"Resolution {side}", lower, "half the memory of a step, half the time", "fewer details"))
    return found


def _smaller(resolution: int, step: int) -> int:
    """Three quarters of a resolution, as a multiple of the buckets' step."""
    return resolution * 3 // 4 // step * step
