"""LyCORIS: its wrapper on diffusers' modules (`lycoris_`), and its network module in sd-scripts (kohya's names).

A module whose tensors it cannot build ends the loading: IA3's, an OFT whose blocks are larger than there are many of
them or that has no alpha, a DoRA on the input axis, a bias alone. The forward pass computes what is meant. Merging
does so too, but applies alpha / rank of LoHa and of LoKr's low-rank factors twice (lycoris_lora 4.1.3).
"""

from __future__ import annotations

from dataclasses import replace

from studio.adapters.methods.lokr import factorization
from studio.formats.consumers.effect import Reading, refused
from studio.formats.consumers.places import Base, Place, flat, without_text_model
from studio.formats.consumers.subject import Entry, File, Found
from studio.formats.reading import ALPHA, MAGNITUDE
from studio.formats.spellings import spelled

METHODS = ("dora", "tucker", "lora", "loha", "lokr", "oft", "diff", "norm")


def rule(file: File, base: Base) -> Reading:
    """The adapters under its names as its forward pass has them."""
    reading = Reading()
    places = _places(base)
    for found in file.adapters(places, spelled(METHODS), METHODS):
        if problem := _problem(found):
            return refused(problem)
        reading.add(found)
    modules = {key.partition(".")[0] for key in file.tensors}
    built = {key.partition(".")[0] for key in reading.keys}
    if strange := next((module for module in modules & places.keys() if module not in built), ""):
        return refused(f"{strange} has the tensors of no method that it can load there")
    return reading


def _places(base: Base) -> dict[str, Place]:
    places = flat("lycoris_", base.denoiser) | base.kohya_encoders
    clip = base.encoders.get("text_encoder", {})  # the wrapper adapts one model: a second encoder has a file of its own
    places |= flat("lycoris_", clip) | flat("lycoris_", without_text_model(clip))
    return places | flat("lora_unet_", base.denoiser if base.family == "sd" else base.original)


def _problem(found: Found) -> str:
    """Why it cannot build the module; "" where it can."""
    entry, spec = found.entry, found.place.spec
    if found.method == "dora" and entry[MAGNITUDE].shape[0] != spec.out_features:
        return "its DoRA has a magnitude for each output"
    if found.method == "oft" and ALPHA not in entry:
        return "an OFT without alpha"
    if found.method == "oft" and entry["oft_blocks"].ndim == 3:
        number, size, _ = entry["oft_blocks"].shape
        if factorization(spec.out_features, size) != (size, number):
            return f"{number} blocks of {size} outputs; it takes blocks that are no larger than their number"
    return ""


def merged(file: File, base: Base) -> Reading:
    """The adapters under its names as `merge_to` has them."""
    reading = rule(file, base)
    for layer, effect in reading.effects.items():
        entry = effect.entry
        rank = _rank(entry)
        if rank and ALPHA in entry and float(entry[ALPHA]) != rank:
            reading.effects[layer] = replace(effect, entry={**entry, ALPHA: entry[ALPHA] ** 2 / rank})
            reading.note("applies alpha / rank twice when it merges LoHa and low-rank LoKr; its forward pass does not")
    return reading


def _rank(entry: Entry) -> int:
    """The rank that scales a LoHa, or a LoKr that has low-rank factors; 0 for others."""
    factor = next((entry[name] for name in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in entry), None)
    return 0 if factor is None else factor.shape[0]
