"""Adapters as the user gives them: read, weighted, with the factors of their layers, and the base they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from studio.errors import ConfigError

if TYPE_CHECKING:
    from studio.adapters import WeightView
    from studio.formats import AdapterState

    Bases = Mapping[str, WeightView] | None


@dataclass(frozen=True)
class Given:
    """The adapters that the user gave."""

    states: list[AdapterState]
    weights: list[float]
    names: list[str]
    strengths: list[dict[str, float]]

    @property
    def recipe(self) -> str:
        """ "ink 0.8 + wash -0.3"."""
        return " + ".join(f"{name} {weight:g}" for name, weight in zip(self.names, self.weights, strict=True))


def read_given(adapters: Sequence[str], strength: Sequence[str]) -> Given:
    """The files with their weights and the factors of their layers."""
    from studio.diffusion.lora import lora_name, parse_lora
    from studio.formats import read_adapter

    pairs = [parse_lora(text) for text in adapters]
    names = [lora_name(source) for source, _ in pairs]
    states = [read_adapter(source) for source, _ in pairs]
    return Given(states, [weight for _, weight in pairs], names, _strengths(strength, names, states))


def _strengths(texts: Sequence[str], names: Sequence[str], states: Sequence[AdapterState]) -> list[dict[str, float]]:
    """For each adapter, pattern -> factor. A pattern without a name must match layers of some adapter."""
    from studio.algebra.strengths import strengths
    from studio.diffusion.prompts import finite_number

    found: list[dict[str, float]] = [{} for _ in names]
    for text in texts:
        where, _, number = text.rpartition("=")
        factor = finite_number(number)
        if not where or factor is None:
            raise ConfigError(f"'{text}' is not a strength: write PATTERN=NUMBER, as in text-encoder=0.5")
        name, _, rest = where.partition(":")
        if name in names:
            found[names.index(name)][rest] = factor
            continue
        problems = []
        for own, state in zip(found, states, strict=True):
            try:
                strengths(state, 1.0, {where: factor})
                own[where] = factor
            except ConfigError as problem:
                problems.append(problem)
        if len(problems) == len(states):
            raise problems[0]
    return found


def bases_for(source: str | None, given: Given) -> Bases:
    """The weights of the base by layer, where it is named. Raises ConfigError where it is needed and is not."""
    from studio.algebra.bases import local_base, open_base
    from studio.algebra.views import base_views

    if source is not None:
        base = open_base(local_base(source))
        for name, state in zip(given.names, given.states, strict=True):
            if state.family != base.family:
                raise ConfigError(f"{name}: the file is for {state.family}, the base is {base.family}")
        return base_views(base, dict.fromkeys(layer for state in given.states for layer in state.tensors))
    for name, state in zip(given.names, given.states, strict=True):
        if methods := _of_the_base(state):
            raise ConfigError(
                f"what {', '.join(methods)} in {name} changes is known only with the base: name it with --base"
            )
    return None


def _of_the_base(state: AdapterState) -> list[str]:
    """The methods of the state whose change the file alone does not tell."""
    from studio.adapters.base import method_of
    from studio.adapters.methods import Full, LoRA

    methods = {method for entry in state.tensors.values() if (method := method_of(frozenset(entry)))}
    return sorted(method.method for method in methods if method is not LoRA and not issubclass(method, Full))
