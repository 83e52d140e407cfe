"""The adapter section of a trainer's config, as the engine takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from studio.adapters import METHODS, AdapterConfig, RankSchedule
from studio.adapters.base import read_options
from studio.config import MethodConfig


def adapter_settings(adapter: MethodConfig, steps: int) -> tuple[AdapterConfig, dict[str, dict[str, Any]]]:
    """The settings of all layers, and pattern -> what differs there. An override's method has its own options.

    A method that asks for `total_steps` (AdaLoRA) gets the `steps` of the run where its options don't
    say. Raises ConfigError for a method or an option that is not there; needs no base.
    """
    settings = AdapterConfig(
        adapter.method,
        adapter.rank,
        adapter.alpha,
        adapter.dropout,
        adapter.rslora,
        options=_checked(adapter.method, adapter.options, steps),
    )
    overrides = {pattern: one.model_dump(exclude_none=True) for pattern, one in adapter.overrides.items()}
    for changes in overrides.values():
        method = replace(settings, **{**changes, "options": {}}).method
        if "method" in changes or "options" in changes:
            changes["options"] = _checked(method, changes.get("options", {}), steps)
    return settings, overrides


def rank_schedule(adapter: MethodConfig, seed: int) -> RankSchedule | None:
    """The progressive rank that the config asks for, or None."""
    return RankSchedule({0: adapter.rank, **adapter.rank_schedule}, seed) if adapter.rank_schedule else None


def _checked(method: str, options: Mapping[str, Any], steps: int) -> Mapping[str, Any]:
    chosen = AdapterConfig(method).method  # raises for an unknown one
    if any(field.name == "total_steps" for field in fields(METHODS[chosen].Options)):
        options = {"total_steps": steps, **options}
    read_options(METHODS[chosen], options)
    return options
