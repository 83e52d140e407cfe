"""Blends of adapters, one layer in memory at a time, each with a report and its provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from studio.adapters import WeightView
from studio.algebra.blends import Blend, find_blend
from studio.algebra.change import Change, Layer, aligned, change_of, gram, located, weighted_sum
from studio.algebra.cut import Cut
from studio.algebra.inputs import Inputs, check_inputs
from studio.algebra.product import one_thread
from studio.algebra.report import CombinedState, Tally
from studio.algebra.strengths import Strengths
from studio.errors import ConfigError
from studio.formats.metadata import merged
from studio.formats.state import AdapterState
from studio.seeds import sample_generator


@torch.no_grad()
def blend(
    states: Sequence[AdapterState],
    weights: Sequence[float],
    method: str = "linear",
    *,
    rank: int | None = None,
    energy: float | None = None,
    strengths: Sequence[Strengths] | None = None,
    bases: Mapping[str, WeightView] | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> CombinedState:
    """The blend of `states` by one of `BLENDS`, on the true dW of every method.

    Low-rank inputs stay so under "linear" and "slerp": the exact LoRA, of the sum of the ranks, or the best one
    of `rank`, or of the smallest rank that keeps a share `energy` of the squared norm (with `rank` at most).
    Everything else becomes a full difference (`diff`), as large as the layer, or with `rank` or `energy` the best
    LoRA, unless a bias changes too; norms and biases stay as they are.

    `strengths`: for each input, further factors of its blocks or layers, by patterns as in `AdapterPlan.targets`.
    `bases` (layer -> weight of the base) is needed for methods other than LoRA, full differences, norms and
    biases, whose dW is not in the file alone. `names` call the inputs in report and metadata; `seed` fixes the
    random masks, layer by layer. `dtype` is that of the result's tensors, fp32 as a default, which rounds
    nothing. `settings` are those of the method. Raises ConfigError for states of different families or shapes,
    a base that is missing, a pattern that matches nothing, and settings that make no sense.
    """
    way, cut, inputs = find_blend(method), Cut(rank, energy), check_inputs(states, weights, names, strengths)
    settings = way.with_settings(settings, weights)
    blender, tally, entries = _Blender(inputs, way, settings, bases or {}, seed), Tally(), {}
    with one_thread() if way.coefficients else nullcontext():
        for names_at_once in _slices(inputs.layers, AT_ONCE if way.coefficients else 1):
            blended = blender.layers(names_at_once, tally)
            for name, change in tally.cut(blended, cut).items():
                with located(name):
                    entries[name] = tally.entry(change, dtype)
    if not entries and not inputs.embeddings():
        raise ConfigError("nothing is left: every weight is 0")
    stated = cut.stated() | settings | ({} if way.coefficients else {"seed": seed})
    stated |= ({"strengths": list(strengths)} if strengths else {}) | ({"dtype": str(dtype)} if dtype else {})
    report = tally.report(inputs.partial(), [name for name in inputs.layers if name not in entries])
    metadata = merged([state.metadata for state in states], inputs.names, weights, method, stated)
    return CombinedState(states[0].family, entries, metadata, report, embeddings=inputs.embeddings())


def combine(
    states: Sequence[AdapterState],
    weights: Sequence[float],
    rank: int | None = None,
    bases: Mapping[str, WeightView] | None = None,
) -> CombinedState:
    """The sum of weight * dW over `states`, exact or the best of `rank`: `blend` by "linear"."""
    return blend(states, weights, rank=rank, bases=bases)


AT_ONCE = 8
"""So many layers are shortened together: equal shapes then share the calls, and the memory stays small."""


def _slices(names: Sequence[str], length: int) -> Iterator[Sequence[str]]:
    return (names[start : start + length] for start in range(0, len(names), length))


@dataclass(frozen=True)
class _Blender:
    """Blends layers, whatever the method."""

    inputs: Inputs
    way: Blend
    settings: Mapping[str, Any]
    bases: Mapping[str, WeightView]
    seed: int

    def layers(self, names: Sequence[str], tally: Tally) -> dict[str, tuple[Layer, Change]]:
        """What is known of each layer, and its blend, but for those where every weight is 0."""
        blended = {}
        for name in names:
            with located(name):
                if found := self._layer(name, tally):
                    blended[name] = found
        return blended

    def _layer(self, name: str, tally: Tally) -> tuple[Layer, Change] | None:
        entries = self.inputs.entries(name)
        layer = Layer.of(name, self.bases.get(name), entries.values())
        changes = {place: change_of(entry, layer) for place, entry in entries.items()}
        shares = {place: share for place, share in self._shares(name, changes).items() if share}
        changes = {place: changes[place] for place in shares}
        if not changes:
            return None
        if self.way.coefficients:
            total = weighted_sum(list(changes.values()), list(shares.values()))
        else:
            changes = {place: replace(change, weight=change.dense()) for place, change in changes.items()}
            norm = any(change.norm for change in changes.values())
            weight, bias = (self._by_entries(name, part, changes, shares) for part in ("weight", "bias"))
            total = Change(weight, bias, norm)
        tally.compare(name, changes, shares, sample=self.way.coefficients)
        return layer, total

    def _shares(self, name: str, changes: Mapping[int, Change]) -> dict[int, float]:
        """Place of an input -> what its change of the layer is multiplied with."""
        weights = self.inputs.weights
        if self.way.coefficients:
            weights = self.way.function(weights, lambda: gram(changes, len(weights)), **self.settings)
        return {place: weights[place] * self.inputs.factors[place][name] for place in changes}

    def _by_entries(
        self, name: str, part: str, changes: Mapping[int, Change], shares: Mapping[int, float]
    ) -> Tensor | None:
        """The blend of the changes' "weight" or "bias"; None where none has it."""
        tensors = {place: getattr(change, part) for place, change in changes.items()}
        places = [place for place, tensor in tensors.items() if tensor is not None]
        if not places:
            return None
        deltas = [aligned(tensors[place].float(), tensors[places[0]]) for place in places]

        def draw(index: int) -> torch.Generator:
            return sample_generator(self.seed, name, part, places[index])

        return self.way.function(deltas, [shares[place] for place in places], draw, **self.settings)
