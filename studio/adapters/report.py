"""What a plan would do to a model: which layer gets what and why, at what cost, and what stays as it is.

Nothing is attached and no weight is read, so a model on the meta device does as well as one in memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from studio.adapters.base import AdapterConfig
from studio.adapters.cost import Cost, cost_of
from studio.adapters.layers import Target
from studio.adapters.quantized import is_quantized, layer_shape
from studio.adapters.targets import AdapterPlan, Roles, match_targets, named_targets, select
from studio.errors import ConfigError
from studio.units import size

One = TypeVar("One")
Key = TypeVar("Key")
Sets = Mapping[str, Collection[str]]  # pattern -> the names that it means


@dataclass(frozen=True)
class PlanRow:
    """One adapted layer. `targets` are the patterns and roles that chose it, `overrides` those that changed its
    settings, in the plan's order; `alpha` is scale * rank; `tied` names the layers that hold the very same weight.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    targets: tuple[str, ...]
    overrides: tuple[str, ...]
    method: str
    rank: int
    alpha: float
    cost: Cost
    tied: tuple[str, ...]

    @property
    def adapter(self) -> str:
        """The settings in words."""
        return f"{self.method} rank {self.rank} alpha {self.alpha:g}"


@dataclass(frozen=True)
class LeftOut:
    """A layer that `targets` meet and that gets no adapter: `exclusion` removes it, or else `method` cannot adapt
    its kind; the other of the two is empty."""

    name: str
    kind: str
    targets: tuple[str, ...]
    exclusion: str
    method: str


@dataclass(frozen=True)
class Partial:
    """A layer of the blocks, such as "attn1.to_q", that is adapted in some of them; `missing` names the others."""

    name: str
    adapted: int
    total: int
    missing: tuple[str, ...]


@dataclass(frozen=True)
class PlanReport:
    """`unadapted` counts the layers without an adapter by kind. `parameters` train: in fp32 they take
    `adapter_bytes`, and AdamW keeps `optimizer_bytes`. As text, layers with the same reasons and settings are one
    line, and its flops are relative to those of the layers themselves."""

    rows: tuple[PlanRow, ...]
    left_out: tuple[LeftOut, ...]
    partial: tuple[Partial, ...]
    unadapted: Mapping[str, int]
    parameters: int
    base_parameters: int
    adapter_bytes: int
    optimizer_bytes: int

    def __str__(self) -> str:
        total = (
            f"{len(self.rows)} layers with {self.parameters:,} parameters, "
            f"{self.parameters / max(self.base_parameters, 1):.2%} of the base's {self.base_parameters:,}: "
            f"{size(self.adapter_bytes)} in fp32, and {size(self.optimizer_bytes)} of AdamW's state"
        )
        return "\n".join([*_table(self.rows), total, *self._notes()])

    def _notes(self) -> Iterator[str]:
        for (exclusion, method), members in _groups(self.left_out, lambda one: (one.exclusion, one.method)):
            reason = f"Excluded by {exclusion}" if exclusion else f"Met, but {method} cannot adapt them"
            yield f"{reason}: {_counts(Counter(one.kind for one in members))}"
        for (adapted, total), parts in _groups(self.partial, lambda one: (one.adapted, one.total)):
            names = _some([one.name for one in parts])
            yield f"Adapted in {adapted} of {total} layers only: {names}; not in {_some(parts[0].missing, 1)}"
        for row in self.rows:
            if row.tied:
                yield f"{row.name} holds the same weight as {_some(row.tied)}: the adapter acts on the first alone"
        yield f"Without an adapter: {_counts(self.unadapted) or 'no layer'}"


def plan_report(modules: Mapping[str, nn.Module], plan: AdapterPlan, roles: Roles) -> PlanReport:
    """What `inject` would do with the same arguments. Raises ConfigError as `match_targets` does, and for settings
    that a method refuses."""
    targets = named_targets(modules)
    chosen = match_targets(modules, plan, roles)
    met = {pattern: select(pattern, targets, roles) for pattern in plan.targets}
    changed = {pattern: select(pattern, targets, roles) for pattern in plan.overrides}
    costs: dict[str, Cost] = {}
    rows = [
        _row(target, config, _holding(met, name), _holding(changed, name), costs)
        for name, (target, config) in chosen.items()
    ]
    parameters = sum(row.cost.parameters for row in rows)
    return PlanReport(
        rows=tuple(rows),
        left_out=tuple(_left_out(targets, chosen, plan, roles, met, changed)),
        partial=tuple(_partial(targets, chosen)),
        unadapted=Counter(target.spec.kind for name, target in targets.items() if name not in chosen),
        parameters=parameters,
        base_parameters=_base_parameters(modules.values()),
        adapter_bytes=4 * parameters,
        optimizer_bytes=8 * parameters,  # two moments
    )


def _row(
    target: Target, config: AdapterConfig, met: tuple[str, ...], changed: tuple[str, ...], costs: dict[str, Cost]
) -> PlanRow:
    """`costs` keeps what was counted for layers of one shape and the same settings."""
    key = repr((target.spec, config))
    if key not in costs:
        try:
            costs[key] = cost_of(target.spec, config)
        except ConfigError as problem:
            raise ConfigError(f"{target.name}: {problem}") from problem
    spec, alpha = target.spec, config.scale * config.rank
    return PlanRow(
        target.name,
        spec.kind,
        spec.weight_shape,
        met,
        changed,
        config.method,
        config.rank,
        alpha,
        costs[key],
        target.tied,
    )


def _left_out(
    targets: Mapping[str, Target], chosen: Collection[str], plan: AdapterPlan, roles: Roles, met: Sets, changed: Sets
) -> Iterator[LeftOut]:
    excluded = {pattern: select(pattern, targets, roles) for pattern in plan.exclude}
    for name, target in targets.items():
        reasons = _holding(met, name)
        if name in chosen or not reasons:
            continue
        exclusion = next(iter(_holding(excluded, name)), "")
        method = plan.config.method
        for pattern in _holding(changed, name):
            method = plan.overrides[pattern].get("method", method)
        yield LeftOut(name, target.spec.kind, reasons, exclusion, "" if exclusion else method)


def _partial(targets: Mapping[str, Target], chosen: Collection[str]) -> Iterator[Partial]:
    for name, members in _groups(targets, _in_block):
        missing = tuple(one for one in members if one not in chosen)
        if 0 < len(missing) < len(members):
            yield Partial(name, len(members) - len(missing), len(members), missing)


def _in_block(name: str) -> str:
    """The last two words of a name, "attn1.to_out.0" or "resnets.*.conv1": what blocks have in common."""
    words = name.split(".")
    named = [place for place, word in enumerate(words) if not word.isdigit()][-2:]
    tail = words[named[0] : named[-1]]
    return ".".join([*("*" if word.isdigit() else word for word in tail), *words[named[-1] :]])


def _holding(sets: Sets, name: str) -> tuple[str, ...]:
    return tuple(pattern for pattern, names in sets.items() if name in names)


def _base_parameters(modules: Iterable[nn.Module]) -> int:
    """The parameters of the models, each tensor once; a quantised matrix has as many as it has entries."""
    counts: dict[int, int] = {}
    for layer in (layer for module in modules for layer in module.modules()):
        if is_quantized(layer):
            counts[id(layer)] = math.prod(layer_shape(layer))
        else:
            counts |= {id(parameter): parameter.numel() for parameter in layer.parameters(recurse=False)}
    return sum(counts.values())


# -- as text ----------------------------------------------------------------------------------


def _table(rows: Iterable[PlanRow]) -> list[str]:
    cells = [("Target", "Layers", "Adapter", "Parameters", "Flops")]
    for (target, overrides, kind, adapter), members in _groups(
        rows, lambda row: (row.targets[0], row.overrides, row.kind, row.adapter)
    ):
        why = f"{target} ({', '.join(overrides)})" if overrides else target
        parameters = sum(row.cost.parameters for row in members)
        cells.append((why, f"{len(members)} {kind}", adapter, f"{parameters:,}", _flops([row.cost for row in members])))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def _flops(costs: Collection[Cost]) -> str:
    """The share that a position costs more, and what a call costs whatever its length."""
    position, call, base = (sum(getattr(one, name) for one in costs) for name in ("position", "call", "base"))
    share = f"+{position / base:.1%}" if base else f"{position:,} a position"
    parts = [share] if base or position else []
    return ", ".join([*parts, *([f"{call / 1e6:,.1f} M a call"] if call else [])])


def _groups(items: Iterable[One], key: Callable[[One], Key]) -> Iterable[tuple[Key, list[One]]]:
    """Items of the same key, in the order in which the keys come."""
    groups: dict[Key, list[One]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups.items()


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _some(names: Collection[str], most: int = 3) -> str:
    shown = ", ".join(list(names)[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
