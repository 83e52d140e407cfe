"""The strength of each layer: one for the whole adapter, times factors for the blocks that patterns name."""

from __future__ import annotations

from collections.abc import Mapping

from studio.adapters.targets import select
from studio.families import FAMILIES
from studio.formats.state import AdapterState

Strengths = Mapping[str, float]
"""Pattern over layers, as in `AdapterPlan.targets` -> factor; a later entry wins, and layers that none names have 1."""


def strengths(state: AdapterState, strength: float, blocks: Strengths) -> dict[str, float]:
    """Layer -> strength. Raises ConfigError with near misses for a pattern that matches none of the state's layers."""
    roles = FAMILIES[state.family].roles if state.family in FAMILIES else {}
    found = dict.fromkeys(state.tensors, strength)
    for pattern, factor in blocks.items():
        found.update(dict.fromkeys(select(pattern, state.tensors, roles), strength * factor))
    return found
