"""diffusers' file for `pipeline.load_lora_weights`: one `.safetensors`, one naming, alpha in the metadata.

Keys are `unet.<module>.lora.down.weight`, `text_encoder.<module>.lora_linear_layer.down.weight` and, for
transformers, `transformer.<module>.lora_A.weight`, with `lora_magnitude_vector.weight` beside them for DoRA
(transformers loads it under that name alone). No key holds alpha: without `lora_adapter_metadata`, for every
component, diffusers would take alpha = rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from studio.adapters.base import method_of
from studio.errors import ConfigError
from studio.families.keys import known_layer
from studio.formats.files import load_tensors, save_tensors
from studio.formats.metadata import with_hashes
from studio.formats.peft import by_component, canonical_name
from studio.formats.peft.forms import alpha_of, magnitude_from_peft, magnitude_to_peft
from studio.formats.peft.settings import is_embedding
from studio.formats.peft.table import LOW_RANK
from studio.formats.reading import ALPHA, DOWN, MAGNITUDE, UP, Entries, Placed, adapter_state, unknown_keys
from studio.formats.spellings import LORA_ENDINGS, OF_PROCESSOR, split_key, without_processor
from studio.formats.state import AdapterState

CONFIG_KEY = "lora_adapter_metadata"
LOADED = {  # the components of its pipelines for which diffusers loads adapters
    "sd": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "flux": ("transformer", "text_encoder"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2"),
}
_COMPONENTS = tuple(dict.fromkeys(component for components in LOADED.values() for component in components))
_VECTOR = ".lora_magnitude_vector"
_ENDINGS = {**LORA_ENDINGS, _VECTOR: MAGNITUDE, f"{_VECTOR}.weight": MAGNITUDE}
_NAMES = {  # component -> its endings of (down, up), where they are not those of the text encoders
    "unet": ("lora.down.weight", "lora.up.weight"),
    "transformer": ("lora_A.weight", "lora_B.weight"),
}
_TEXT_NAMES = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is meant to be of this format: today's, or that of bare attention processors."""
    prefixes = tuple(f"{component}." for component in _COMPONENTS)
    return any(key.startswith(prefixes) or (".processor." in key and f"{OF_PROCESSOR}." in key) for key in keys)


def has_name(name: str, family: str) -> bool:
    """Whether diffusers loads an adapter of this layer of this family: not of embeddings, and not of a T5."""
    component, _, path = name.partition(".")
    return component in LOADED[family] and known_layer(name) and not is_embedding(path)


def objection(layers: Entries, family: str) -> str:
    """What diffusers cannot hold of these layers, in words; "" where it holds them all."""
    for component, own in by_component(layers).items():
        methods = {method.method if (method := method_of(frozenset(entry))) else "?" for entry in own.values()}
        if others := sorted(methods - {"lora", "dora"}):
            return f"the method '{others[0]}'"
        try:
            LOW_RANK.settings(own)
        except ConfigError as problem:
            return f"{problem} ({component})"
    return ""


def encode(state: AdapterState) -> tuple[dict[str, Tensor], str]:
    """(file key -> tensor, the JSON of `lora_adapter_metadata`).

    The configuration's paths leave out `text_model.`, which diffusers takes off the keys where
    transformers built the encoder without it: PEFT matches the end of a path, so they fit both.
    """
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for component, layers in by_component(state.tensors).items():
        down, up = _NAMES.get(component, _TEXT_NAMES)
        for path, entry in layers.items():
            module = f"{component}.{path}"
            tensors |= {f"{module}.{down}": entry[DOWN], f"{module}.{up}": entry[UP]}
            if MAGNITUDE in entry:
                tensors[f"{module}{_VECTOR}.weight"] = magnitude_to_peft(entry[MAGNITUDE])
        own = {path.removeprefix("text_model."): entry for path, entry in layers.items()}
        fields = {**LOW_RANK.settings(own), "target_modules": sorted(own)}
        config |= {f"{component}.{field}": value for field, value in fields.items()}
    return tensors, json.dumps(config, indent=2, sort_keys=True)


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> AdapterState:
    """The state in a file's keys, in every spelling that diffusers has had.

    An alpha is that of a key, else of `lora_adapter_metadata`, else the rank, as diffusers has it.
    """
    config = _config(metadata, source)
    named = Placed()
    unknown = []
    for key, tensor in tensors.items():
        module, ending, suffix = split_key(key, _ENDINGS)
        name = _layer_name(module, ending)
        if name is None:
            unknown.append(key)
            continue
        named[name, suffix] = magnitude_from_peft(tensor) if ending.startswith(_VECTOR) else tensor
    if unknown:
        raise unknown_keys(unknown, len(tensors), source)
    for name, suffix in list(named):
        if suffix == DOWN and (name, ALPHA) not in named:
            component, _, path = name.partition(".")
            named[name, ALPHA] = alpha_of(path, named[name, DOWN].shape[0], _below(config, component))
    return adapter_state(named, metadata, source)


def _layer_name(module: str, ending: str) -> str | None:
    """The full layer name of what stands before the ending of a key; the oldest files name no component."""
    component, _, path = module.partition(".")
    if component not in _COMPONENTS:
        component, path = "unet", module if ending.startswith(OF_PROCESSOR) else ""
    path = path.removeprefix("base_model.model.")
    return canonical_name(component, without_processor(path) if ending.startswith(OF_PROCESSOR) else path)


def _config(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    try:
        config = json.loads(metadata.get(CONFIG_KEY, "{}"))
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{source}: its {CONFIG_KEY} is not JSON: {problem}") from problem
    if not isinstance(config, dict):
        raise ConfigError(f"{source}: its {CONFIG_KEY} is no JSON object")
    return config


def _below(config: Mapping[str, Any], component: str) -> dict[str, Any]:
    prefix = f"{component}."
    return {field.removeprefix(prefix): value for field, value in config.items() if field.startswith(prefix)}


def write(state: AdapterState, path: Path) -> None:
    """Writes one file."""
    tensors, config = encode(state)
    save_tensors(path, tensors, {**with_hashes(state, tensors), CONFIG_KEY: config})


def read(path: Path) -> AdapterState:
    """Reads what `write` wrote, and diffusers' older spellings and PEFT's names below the component's too."""
    tensors, metadata = load_tensors(path)
    return decode(tensors, metadata, str(path))
