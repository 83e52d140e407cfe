"""Randomness as data: every draw is a function of names and numbers, never of a global stream.

Exact resume, equality of one and many processes, and dropout without stored masks follow from it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed, a function of `parts` only: `seed_of(run_seed, sample_id, step, "noise")`."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def sample_generator(*parts: str | int) -> torch.Generator:
    """A CPU generator seeded by `seed_of`. Draw on the CPU, then move: devices then agree on the draw."""
    import torch

    return torch.Generator().manual_seed(seed_of(*parts))
