"""The adapters that a blend is made of: their weights, names, and factors layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from studio.algebra.change import Entry
from studio.algebra.strengths import Strengths, strengths
from studio.errors import ConfigError
from studio.formats.state import AdapterState


@dataclass(frozen=True)
class Inputs:
    """Several adapters, each with a name and a weight, and the factors of its layers besides."""

    states: Sequence[AdapterState]
    weights: Sequence[float]
    names: Sequence[str]
    factors: Sequence[Mapping[str, float]]

    @property
    def layers(self) -> list[str]:
        """The layers that any of them has, in the order of their files."""
        return list(dict.fromkeys(name for state in self.states for name in state.tensors))

    def entries(self, layer: str) -> dict[int, Entry]:
        """Place of an input -> what its file has for the layer, for those that have it."""
        return {place: state.tensors[layer] for place, state in enumerate(self.states) if layer in state.tensors}

    def partial(self) -> dict[str, tuple[str, ...]]:
        """Layer -> the names of the inputs that have it, where not all do."""
        having = {layer: self.entries(layer) for layer in self.layers}
        return {
            layer: tuple(self.names[place] for place in places)
            for layer, places in having.items()
            if len(places) < len(self.states)
        }

    def embeddings(self) -> dict[str, Mapping[str, Tensor]]:
        """The trained tokens of all. Raises ConfigError where two inputs mean different vectors by one token."""
        tokens: dict[str, Mapping[str, Tensor]] = {}
        for token, vectors in (item for state in self.states for item in state.embeddings.items()):
            if not _equal(tokens.setdefault(token, vectors), vectors):
                raise ConfigError(f"two of the adapters have trained the token '{token}': rename it in one of them")
        return tokens


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[component], other[component]) for component in one)


def check_inputs(
    states: Sequence[AdapterState],
    weights: Sequence[float],
    names: Sequence[str] | None,
    blocks: Sequence[Strengths] | None,
) -> Inputs:
    """The inputs; without `names` they are called "1", "2", ...

    Raises ConfigError for anything but one weight, name and set of strengths for each state, for states of
    different families, and for a pattern that matches none of a state's layers.
    """
    names = [str(place + 1) for place in range(len(states))] if names is None else names
    blocks = [{} for _ in states] if blocks is None else blocks
    for what, given in {"weights": weights, "names": names, "sets of strengths": blocks}.items():
        if not states or len(states) != len(given):
            raise ConfigError(f"{len(states)} adapters and {len(given)} {what}: give one for each adapter")
    families = sorted({state.family for state in states})
    if len(families) > 1:
        raise ConfigError(f"adapters for different families cannot be combined: {', '.join(families)}")
    return Inputs(states, weights, names, [strengths(one, 1.0, own) for one, own in zip(states, blocks, strict=True)])
