"""PEFT: its own folders, of the methods that our reading of them knows; alpha is in a folder's configuration."""

from __future__ import annotations

from studio.formats.consumers.effect import Effect, Reading, refused
from studio.formats.consumers.places import Base, Place, dotted, without_text_model
from studio.formats.consumers.subject import File, fits

_SHARED = "/base_model."  # before what all layers of a component share, which has no path of a module


def rule(file: File, base: Base) -> Reading:
    """The keys whose path is a module of the component; "" where the folder names none."""
    if not file.folder:
        return refused("it reads folders: studio convert FILE --to peft")
    reading = Reading()
    places: dict[str, Place] = {}
    for component in {key.partition("/")[0] for key in file.tensors}:
        for layers in [base.components[component]] if component else base.components.values():
            places |= dotted(f"{component}/base_model.model.", layers | without_text_model(layers))
    for key in file.tensors:
        place = _place(key, places)
        entry = file.meant.get(place.layer) if place else None
        if place and entry and fits(entry, place.spec):
            reading.keys.add(key)
            reading.effects[place.layer] = Effect(entry)
    if reading.keys:
        reading.keys.update(key for key in file.tensors if _SHARED in key and f"{_SHARED}model." not in key)
    return reading


def _place(key: str, places: dict[str, Place]) -> Place | None:
    """The module whose path the key begins with."""
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key)
