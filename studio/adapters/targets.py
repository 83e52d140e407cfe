"""Which layers get which adapter."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from studio.adapters.base import METHODS, AdapterConfig
from studio.adapters.layers import Target, describe, describe_parameter
from studio.errors import ConfigError, nearest

Roles = Mapping[str, tuple[str, ...]]
"""Role name ("attention") -> regular expressions over full layer names, matched whole."""


@dataclass(frozen=True)
class AdapterPlan:
    """Which layers get which adapter.

    `targets` and `exclude` hold role names of the family ("attention"), globs over full layer
    names ("unet.mid_block.*.to_q"; without a wildcard, the end of a name: "to_q"), or regular
    expressions after "re:". A parameter that its module uses itself (experts, fused projections) has
    the module's name and its own. `overrides` maps such a pattern to fields of `AdapterConfig` that
    differ there; a later entry wins.
    """

    targets: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    config: AdapterConfig = field(default_factory=AdapterConfig)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def named_targets(modules: Mapping[str, nn.Module]) -> dict[str, Target]:
    """Full name -> target, for every place of an adapter; `modules` maps a name prefix to a model."""
    targets: dict[str, Target] = {}
    for prefix, module in modules.items():
        users: dict[nn.Module, nn.Module] = {}
        for path, layer in module.named_modules(prefix=prefix):
            path = path.replace("._orig_mod", "")  # of a compiled model, and of blocks compiled on their own
            if isinstance(layer, nn.MultiheadAttention):
                users[layer.out_proj] = layer  # which multiplies with its weight, and never calls it
            spec = describe(layer)
            if spec is not None:
                user = users.get(layer)
                targets[path] = Target(path, layer, replace(spec, called=False) if user else spec, user=user)
                continue
            for name in layer._parameters:
                spec = describe_parameter(layer, name)
                if spec is not None:
                    targets[f"{path}.{name}"] = Target(f"{path}.{name}", layer, spec, name)
    return _with_ties(targets)


def _with_ties(targets: dict[str, Target]) -> dict[str, Target]:
    """The targets, each with the names of the others that hold its tensor."""
    holders: dict[int, list[str]] = {}
    for name, target in targets.items():
        holders.setdefault(id(target.layer._parameters.get(target.parameter, target)), []).append(name)
    for names in holders.values():
        for name in names if len(names) > 1 else ():
            targets[name] = replace(targets[name], tied=tuple(other for other in names if other != name))
    return targets


def named_layers(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Full name -> layer, for every layer that is called with an input."""
    return {name: target.layer for name, target in named_targets(modules).items() if target.spec.called}


def select(pattern: str, names: Iterable[str], roles: Roles) -> set[str]:
    """The names that one pattern means; raises ConfigError with near misses when there are none."""
    names = list(names)
    if pattern in roles:
        expressions = [re.compile(expression) for expression in roles[pattern]]
        found = {name for name in names if any(expression.fullmatch(name) for expression in expressions)}
    elif pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as problem:
            raise ConfigError(f"target '{pattern}' is not a regular expression: {problem}") from problem
        found = {name for name in names if expression.fullmatch(name)}
    elif any(sign in pattern for sign in "*?["):
        found = set(fnmatch.filter(names, pattern))
    else:
        found = {name for name in names if name == pattern or name.endswith("." + pattern)}
    if not found:
        ends = {".".join(name.split(".")[-depth:]) for name in names for depth in (1, 2)}
        known = ", ".join(sorted(roles)) or "none"
        raise ConfigError(
            f"target '{pattern}' matches none of the {len(names)} layers."
            f"{nearest(pattern, [*roles, *ends])} Roles of this family: {known}."
        )
    return found


def match_targets(
    modules: Mapping[str, nn.Module], plan: AdapterPlan, roles: Roles
) -> dict[str, tuple[Target, AdapterConfig]]:
    """Full name -> (target, its settings), in the order of the model.

    A pattern may also meet layers of a kind that the method cannot adapt (a norm, for LoRA): they are
    left out, unless nothing else is met. Raises ConfigError for a target, exclusion or override that
    matches nothing, or nothing that can be adapted.
    """
    targets = named_targets(modules)
    chosen: dict[str, set[str]] = {pattern: select(pattern, targets, roles) for pattern in plan.targets}
    everything = set().union(*chosen.values())
    for pattern in plan.exclude:
        everything -= _among(everything, pattern, targets, roles, "exclusion")
    configs = dict.fromkeys(everything, plan.config)
    for pattern, changes in plan.overrides.items():
        unknown = set(changes) - set(AdapterConfig.__dataclass_fields__)
        if unknown:
            key = sorted(unknown)[0]
            raise ConfigError(
                f"override '{pattern}' has an unknown setting '{key}'."
                f"{nearest(key, AdapterConfig.__dataclass_fields__)}"
            )
        for name in _among(everything, pattern, targets, roles, "override"):
            configs[name] = replace(configs[name], **changes)
    if not everything:
        raise ConfigError("no layer is left to adapt: the exclusions remove every target")
    fits = {name for name, config in configs.items() if METHODS[config.method].supports(targets[name].spec)}
    for pattern, names in chosen.items():
        if names & everything and not names & fits:
            kinds = sorted({targets[name].spec.kind for name in names & everything})
            method = configs[min(names & everything)].method
            raise ConfigError(f"target '{pattern}' meets only layers that '{method}' cannot adapt: {', '.join(kinds)}")
    return {name: (target, configs[name]) for name, target in targets.items() if name in fits}


def _among(chosen: set[str], pattern: str, names: Iterable[str], roles: Roles, what: str) -> set[str]:
    """The chosen layers that a pattern means; raises ConfigError where there are none."""
    found = select(pattern, names, roles) & chosen
    if not found:
        raise ConfigError(f"the {what} '{pattern}' touches none of the {len(chosen)} layers that the targets choose")
    return found
