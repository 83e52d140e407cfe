"""What a tool would compute from a file, and how far that is from what the file means.

Both are the change dW of each layer's weight, and db of its bias. The file's meaning is what our own reading
of it says; a tool's is an entry as the tool understands it, with the tool's own formula where that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from studio.adapters import Adapter, Target, WeightView
from studio.adapters.base import method_of
from studio.adapters.layers import wide
from studio.errors import ConfigError
from studio.formats.consumers.places import Place
from studio.formats.consumers.subject import Entry, Found
from studio.formats.original import from_original

Change = tuple[Tensor, Tensor | None]
Formula = Callable[[Adapter, WeightView], Change]


def defined(adapter: Adapter, weight: WeightView) -> Change:
    """dW and db as the method defines them."""
    return adapter.delta_weight(weight), adapter.delta_bias(weight)


@dataclass(frozen=True)
class Effect:
    """A layer's entry as a tool understands it, and how it computes with that."""

    entry: Entry
    formula: Formula = defined


@dataclass
class Reading:
    """The keys of a file that a tool uses, full layer name -> effect, and what there is to say of it."""

    keys: set[str] = field(default_factory=set)
    effects: dict[str, Effect] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, found: Found, entry: Entry | None = None, formula: Formula = defined) -> None:
        """Takes an adapter as used; `entry` is what the tool takes it for, and has the keys that it uses."""
        entry = found.entry if entry is None else entry
        self.keys.update(key for suffix, key in found.keys.items() if suffix in entry)
        self.effects |= {layer: Effect(own, formula) for layer, own in _by_layer(found.place, entry).items()}

    def note(self, text: str) -> None:
        """Says something once."""
        if text not in self.notes:
            self.notes.append(text)


def _by_layer(place: Place, entry: Entry) -> Mapping[str, Entry]:
    """The entry for each of the layers there; none where it cannot be cut, and so has no meaning of ours either."""
    if not place.original:
        return {place.layer: entry}
    component, _, path = place.layer.partition(".")
    try:
        return from_original({(component, path): entry}, place.original)
    except ConfigError:
        return {}


def refused(reason: str) -> Reading:
    """The reading of a tool that loads nothing of the file."""
    return Reading(notes=[f"refuses the file: {reason}"])


@dataclass(frozen=True)
class Deviation:
    """The largest |dW_tool - dW| over the largest |dW|, both over all layers, and the layer where it is.

    `error` is None where it depends on a base that is not at hand.
    """

    error: float | None
    layer: str = ""


def deviations(
    meant: Mapping[str, Entry], readings: Iterable[Reading], targets: Mapping[str, Target]
) -> list[Deviation]:
    """How far each reading is from `meant`, full layer name -> entry; biases count as weights do.

    `targets` may be on the meta device: what depends on their values is then not known.
    """
    compared = [_Comparison(reading, meant) for reading in readings]
    largest: float | None = 0.0  # of our own reading
    for name, entry in {} if all(one.settled for one in compared) else meant.items():
        view = _view(targets[name]) if name in targets else None
        own = _change(Effect(entry), view)
        largest = None if own is None or largest is None else max(largest, _size(own))
        for one in compared:
            one.meet(name, entry, own, view)
    return [one.settled or one.deviation(largest) for one in compared]


class _Comparison:
    """A reading, and its largest error so far; None once an error is not known."""

    def __init__(self, reading: Reading, meant: Mapping[str, Entry]) -> None:
        self.effects = reading.effects
        self.largest: float | None = 0.0
        self.layer = ""
        self.settled: Deviation | None = None
        """Known without computing anything: all of it as it is meant, or none of it."""
        if all(name in self.effects and _same(self.effects[name], entry) for name, entry in meant.items()):
            self.settled = Deviation(0.0)
        elif self.effects.keys().isdisjoint(meant):
            self.settled = Deviation(1.0)

    def meet(self, name: str, entry: Entry, own: Change | None, view: WeightView | None) -> None:
        """Compares the effect on one layer with its own change."""
        effect = self.effects.get(name)
        if self.settled or self.largest is None or (effect is not None and _same(effect, entry)):
            return
        theirs = None if effect is None else _change(effect, view)
        if own is None or (effect is not None and theirs is None):
            self.largest = None
            return
        wrong = _size(own if theirs is None else _difference(theirs, own))
        if wrong > self.largest:
            self.largest, self.layer = wrong, name

    def deviation(self, largest: float | None) -> Deviation:
        if self.largest is None or largest is None:
            return Deviation(None)
        return Deviation(self.largest / largest if largest else 0.0, self.layer)


class _Unknown(WeightView):
    """The weight of a base of which only the shapes are known."""

    def dense(self) -> Tensor:
        raise _NeedsBase


class _NeedsBase(Exception):
    pass


def _view(target: Target) -> WeightView:
    return _Unknown(target) if target.device.type == "meta" else WeightView(target)


@torch.no_grad()
def _change(effect: Effect, view: WeightView | None) -> Change | None:
    """What the effect computes; None where it needs the values of a base that is not at hand, or another base."""
    method = method_of(frozenset(effect.entry))
    if view is None or method is None:
        return None
    try:
        adapter = method.from_export(view.target.spec, dict(effect.entry))
        return effect.formula(adapter if isinstance(view, _Unknown) else adapter.to(view.target.device), view)
    except (ConfigError, _NeedsBase):
        return None


def _same(effect: Effect, entry: Entry) -> bool:
    """Whether the effect is, without computing it, what the entry means."""
    own = effect.entry
    return (
        effect.formula is defined
        and own.keys() == entry.keys()
        and all(tensor is entry[key] or torch.equal(wide(tensor), wide(entry[key])) for key, tensor in own.items())
    )


def _difference(one: Change, other: Change) -> Change:
    biases = [bias for bias in (one[1], other[1]) if bias is not None]
    bias = None if not biases else biases[0] if len(biases) == 1 else biases[0] - biases[1]
    return one[0] - other[0], bias


def _size(change: Change) -> float:
    return max(float(part.abs().max()) for part in change if part is not None)
