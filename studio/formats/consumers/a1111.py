"""A1111: kohya's flattened names, diffusers' and LDM's; all of LyCORIS's methods, and its own arithmetic for some.

A module that it knows with endings of none of its methods ends the loading. The norm of DoRA runs over the input axis
whatever the magnitudes' axis is. IA3 never gates a bias, nor the outputs of a convolution. OpenCLIP keeps q, k
and v in one tensor: a text encoder of that kind takes an attention block whole, without its biases, or not at all.
Of SD3 it knows the attention layers by diffusers' names, of FLUX nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from studio.adapters import METHODS as ALL_METHODS
from studio.adapters import Adapter, WeightView
from studio.adapters.layers import wide
from studio.adapters.methods import DoRA, LoRA
from studio.formats.consumers.effect import Change, Reading, refused
from studio.formats.consumers.places import Base, Place, flat
from studio.formats.consumers.subject import File, Found
from studio.formats.embeddings import BUNDLE
from studio.formats.reading import MAGNITUDE
from studio.formats.spellings import PEFT, spelled

METHODS = ("dora", "tucker", "lora", "loha", "ia3", "lokr", "diff", "norm", "oft")
_OF_SD3 = re.compile(r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj)")
_ATTENTION = re.compile(r"(?P<block>(?P<component>\w+)\..+\.self_attn)\.(?P<part>q|k|v|out)_proj")


def rule(file: File, base: Base) -> Reading:
    """Every adapter under one of the names."""
    if base.family == "flux":
        return refused("it has no FLUX: use Forge")
    reading = Reading()
    if base.family == "sd3":
        attention = {f"transformer.{path}": one for path, one in base.denoiser.items() if _OF_SD3.fullmatch(path)}
        for found in file.adapters(
            attention, {key: PEFT[key] for key in (".lora_A.weight", ".lora_B.weight")}, ["lora"]
        ):
            reading.add(found)
        return reading
    places = _places(base)
    if strange := _strange(file, places):
        return refused(f"{strange} has the tensors of no method that it knows")
    reading.keys.update(key for key in file.tensors if key.startswith(BUNDLE))
    founds = list(file.adapters(places, spelled(METHODS), METHODS))
    layers = {found.place.layer for found in founds}
    for found in founds:
        stacked = base.open_clip and _ATTENTION.fullmatch(found.place.layer)
        if not stacked or stacked["component"] != base.open_clip:
            _take(found, reading)
        elif all(f"{stacked['block']}.{part}_proj" in layers for part in ("q", "k", "v", "out")):
            _take_stacked(found, stacked["part"], reading)
        else:
            reading.note("takes the attention of an OpenCLIP text encoder only where q, k, v and out are all there")
    return reading


def _places(base: Base) -> dict[str, Place]:
    foreign = ("add_embedding", "conv_norm_out")
    translated = {path: place for path, place in base.denoiser.items() if not path.startswith(foreign)}
    return flat("lora_unet_", translated) | flat("lora_unet_", base.original) | base.kohya_encoders


def _strange(file: File, places: dict[str, Place]) -> str:
    """A module that it knows with endings that are enough for none of its methods; "" without any."""
    suffixes: dict[str, set[str]] = {}
    for module, _, suffix in (key.partition(".") for key in file.tensors):
        suffixes.setdefault(module, set()).add(suffix)
    return next((one for one in suffixes.keys() & places.keys() if not _of_one(suffixes[one], METHODS)), "")


def _of_one(suffixes: set[str], methods: Iterable[str]) -> bool:
    """Whether the suffixes are enough for one of the methods; it passes over others."""
    known = (ALL_METHODS[name] for name in methods)
    return any(method.owns(frozenset(suffixes & (method.needed | method.optional))) for method in known)


def _take(found: Found, reading: Reading) -> None:
    """Adds an adapter as A1111 computes it."""
    entry = dict(found.entry)
    if found.method == "dora" and entry[MAGNITUDE].shape[0] == found.place.spec.out_features:
        reading.note("takes the norm of DoRA over the input axis, whatever axis the magnitudes have")
        return reading.add(found, formula=by_input_norm)
    if found.method == "ia3":
        entry.pop("on_bias", None)
        if found.place.spec.kind == "conv" and not bool(entry["on_input"]):
            return reading.note("cannot gate the outputs of a convolution with IA3")
    return reading.add(found, entry)


def _take_stacked(found: Found, part: str, reading: Reading) -> None:
    """Adds an adapter of OpenCLIP's attention: q, k and v keep their biases."""
    entry = {suffix: tensor for suffix, tensor in found.entry.items() if suffix != "diff_b" or part == "out"}
    _take(replace(found, entry=entry), reading)


def by_input_norm(adapter: Adapter, weight: WeightView) -> Change:
    """m (W + dW) / ||W + dW|| - W where m has a magnitude for each output and the norms are of the input channels."""
    assert isinstance(adapter, DoRA)
    dense = wide(weight.dense())
    changed = dense + LoRA.delta_weight(adapter, weight)
    norm = changed.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *(1,) * (dense.ndim - 2))
    return adapter.dora_scale / norm * changed - dense, None
