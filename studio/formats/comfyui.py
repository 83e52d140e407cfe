"""ComfyUI's generic file: the keys of its own checkpoints, `diffusion_model.<original module>.lora_A.weight`.

It knows every layer of the denoiser by the original code's dotted name, and those of text encoders as
`text_encoders.<encoder>.transformer.<module>`. LoRA's factors are `lora_A` and `lora_B`, with `alpha` and
`dora_scale`; other methods have LyCORIS's suffixes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from studio.adapters.base import method_of
from studio.errors import ConfigError
from studio.formats.embeddings import ENCODERS, bundled, split_bundle, with_bundle
from studio.formats.files import load_tensors, save_tensors
from studio.formats.metadata import with_hashes
from studio.formats.original import DENOISERS, from_original, layer_names, original_name, to_original
from studio.formats.reading import (
    DOWN,
    UP,
    Entries,
    Placed,
    adapter_state,
    family_of_version,
    known_suffixes,
    text_width,
    unknown_keys,
)
from studio.formats.spellings import LORA_ENDINGS, plain_endings, split_key
from studio.formats.state import AdapterState

_DENOISER = "diffusion_model."
_KEY = re.compile(r"text_encoders\.(?P<encoder>\w+)\.transformer\.(?P<path>.+)")
_CLIP_H = "clip_h"  # Stable Diffusion 2's, of width 1024, where 1 has `clip_l`
_FACTORS = {DOWN: "lora_A.weight", UP: "lora_B.weight"}
_ORDER = ("sd", "sdxl", "flux", "sd3")  # the family for names that several have


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is meant to be of this format."""
    return any(key.startswith((_DENOISER, "text_encoders.")) for key in keys)


def has_name(name: str, family: str) -> bool:
    """Whether the format can hold this layer of this family."""
    return original_name(name, family) is not None


def objection(layers: Entries, family: str) -> str:
    """What the format cannot hold of these layers: methods of several layers that have no form for them fused."""
    try:
        to_original(layers, family)
    except ConfigError as problem:
        return str(problem)
    return ""


def encode(state: AdapterState) -> dict[str, Tensor]:
    """File key -> tensor. Raises ConfigError as `to_original` does."""
    tensors: dict[str, Tensor] = {}
    for (component, path), entry in to_original(state.tensors, state.family).items():
        module = _module(component, path, state)
        method = method_of(frozenset(entry))
        names = _FACTORS if method and method.method in ("lora", "dora") else {}
        tensors |= {f"{module}.{names.get(suffix, suffix)}": tensor for suffix, tensor in entry.items()}
    return tensors | bundled(state)


def _module(component: str, path: str, state: AdapterState) -> str:
    if component == DENOISERS[state.family]:
        return _DENOISER + path
    encoder = {own: name for name, own in ENCODERS[state.family].items()}[component]
    encoder = _CLIP_H if state.family == "sd" and text_width(state.tensors) == 1024 else encoder
    return f"text_encoders.{encoder}.transformer.{path}"


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> AdapterState:
    """The state in a file's keys, with the factors in every spelling that ComfyUI reads."""
    layers, vectors = split_bundle(tensors)
    endings = {**plain_endings(known_suffixes()), **LORA_ENDINGS}
    parts = {key: split_key(key, endings) for key in layers}
    family = _family([module for module, _, _ in parts.values()], layers, metadata)
    named = Placed()
    places: dict[str, tuple[str, str]] = {}
    unknown = []
    for key, (module, _, suffix) in parts.items():
        place = _place(module, family)
        if place is None or not layer_names(place, family):
            unknown.append(key)
            continue
        name = ".".join(place)
        places[name] = place
        named[name, suffix] = layers[key]
    if unknown:
        raise unknown_keys(unknown, len(tensors), source)
    state = adapter_state(named, metadata, source, family)
    entries = from_original({places[name]: entry for name, entry in state.tensors.items()}, family)
    return with_bundle(replace(state, tensors=entries), vectors)


def _place(module: str, family: str) -> tuple[str, str] | None:
    """(component, original path) of a file's module name; None for none of the family's."""
    if module.startswith(_DENOISER):
        return DENOISERS[family], module.removeprefix(_DENOISER)
    match = _KEY.fullmatch(module)
    encoders = ENCODERS[family] | ({_CLIP_H: "text_encoder"} if family == "sd" else {})
    component = encoders.get(match["encoder"]) if match else None
    return None if match is None or component is None else (component, match["path"])


def _family(modules: Iterable[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The family that has all modules, or the most; of several the one that metadata, widths or depths tell."""
    modules = set(modules)
    places = {family: [_place(module, family) for module in modules] for family in _ORDER}
    known = {
        family: sum(place is not None and bool(layer_names(place, family)) for place in own)
        for family, own in places.items()
    }
    fitting = [family for family in _ORDER if known[family] == max(known.values())]
    stated = family_of_version(metadata)
    if stated in fitting:
        return str(stated)
    return "sdxl" if "sdxl" in fitting and _looks_like_xl(tensors) else fitting[0]


def _looks_like_xl(tensors: Mapping[str, Tensor]) -> bool:
    """Several transformer blocks in a row, or text of width 2048: SDXL's, where names are Stable Diffusion's too."""
    deep = any(re.search(r"\.transformer_blocks\.[1-9]", key) for key in tensors)
    text = re.compile(r".*\.attn2\.to_[kv]\..*(down|lora_A|hada_w1_b|diff).*")
    return deep or any(text.fullmatch(key) and tensor.shape[1:2] == (2048,) for key, tensor in tensors.items())


def write(state: AdapterState, path: Path) -> None:
    """Writes one file."""
    tensors = encode(state)
    save_tensors(path, tensors, with_hashes(state, tensors))


def read(path: Path) -> AdapterState:
    """Reads what `write` wrote, and what ComfyUI and trainers write in this format."""
    tensors, metadata = load_tensors(path)
    return decode(tensors, metadata, str(path))
