"""Checkpoints: all that a run needs to go on to the same bits.

Every random draw is a function of (seed, sample, step), so weights, optimizer, schedule and the
step itself are the whole state.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)
STATE = "state.pt"
KEPT = 2  # the newest may be the one that a power cut damaged


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes `folder`/step-000123/, whole or not at all, and removes all but the newest `KEPT` states."""
    place = folder / f"step-{step:06d}"
    partial = folder / f".step-{step:06d}.{os.getpid()}.part"
    for left in folder.glob(".step-*.part"):  # of a process that was killed while it saved
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    with (partial / STATE).open("wb") as file:
        torch.save({**state, "step": step}, file)
        file.flush()
        os.fsync(file.fileno())
    if place.exists():
        (partial / STATE).replace(place / STATE)
        partial.rmdir()
    else:
        partial.rename(place)
    for old in _states(folder)[KEPT:]:
        old.unlink()
        if not any(old.parent.iterdir()):
            old.parent.rmdir()
    return place


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None; a damaged one is named in the log and passed over."""
    for file in _states(folder):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as problem:
            log.warning("checkpoint %s cannot be read (%s): trying the one before", file, problem)
    return None


def _states(folder: Path) -> list[Path]:
    """State files, the newest first."""
    return sorted(folder.glob(f"step-*/{STATE}"), key=lambda file: int(file.parent.name[5:]), reverse=True)
