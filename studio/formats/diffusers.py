"""diffusers' file for `pipeline.load_lora_weights`: one `.safetensors`, one naming, alpha in the metadata.

Keys are `unet.<module>.lora.down.weight` and `text_encoder.<module>.lora_linear_layer.down.weight`, with
`lora_magnitude_vector.weight` beside them for DoRA (transformers loads it under that name alone). No key
holds alpha: without `lora_adapter_metadata`, for every component, diffusers would take alpha = rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from studio.errors import ConfigError
from studio.families.keys import known_layer
from studio.formats.files import load_tensors, save_tensors
from studio.formats.metadata import with_hashes
from studio.formats.peft import COMPONENTS, alpha_of, by_component, lora_config, magnitude_from_peft, peft_entry
from studio.formats.peft import has_name as has_name  # both write dotted names of the same layers
from studio.formats.peft import objection as objection  # diffusers loads with PEFT
from studio.formats.reading import ALPHA, DOWN, MAGNITUDE, UP, adapter_state, unknown_keys
from studio.formats.state import AdapterState

CONFIG_KEY = "lora_adapter_metadata"
_KEY = re.compile(
    rf"(?P<component>{'|'.join(COMPONENTS)})\.(?P<path>.+)"
    r"\.(?P<suffix>(lora|lora_linear_layer)\.(down|up)\.weight|lora_[AB]\.weight|lora_magnitude_vector(\.weight)?)"
)

_INFIXED = {
    "lora_A.weight": "{}.down.weight",
    "lora_B.weight": "{}.up.weight",
    "lora_magnitude_vector": "lora_magnitude_vector.weight",
}


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is meant to be of this format."""
    return any(key.startswith(tuple(f"{component}." for component in COMPONENTS)) for key in keys)


def encode(state: AdapterState) -> tuple[dict[str, Tensor], str]:
    """(file key -> tensor, the JSON of `lora_adapter_metadata`).

    The configuration's paths leave out `text_model.`, which diffusers takes off the keys where
    transformers built the encoder without it: PEFT matches the end of a path, so they fit both.
    """
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for component, layers in by_component(state.tensors).items():
        infix = "lora" if component == "unet" else "lora_linear_layer"
        for path, entry in layers.items():
            for suffix, tensor in peft_entry(entry).items():
                tensors[f"{component}.{path}.{_INFIXED[suffix].format(infix)}"] = tensor
        own = lora_config({path.removeprefix("text_model."): entry for path, entry in layers.items()})
        config |= {f"{component}.{field}": value for field, value in own.items()}
    return tensors, json.dumps(config, indent=2, sort_keys=True)


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> AdapterState:
    """The state in a file's keys; alpha = rank without `lora_adapter_metadata`, as diffusers has it."""
    try:
        config = json.loads(metadata.get(CONFIG_KEY, "{}"))
    except ValueError as problem:
        raise ConfigError(f"{source}: its {CONFIG_KEY} is not JSON: {problem}") from problem
    named, unknown = {}, []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        path = match["path"] if match else ""
        path = f"text_model.{path}" if path.startswith("encoder.") else path
        name = f"{match['component']}.{path}" if match else ""
        if match is None or not known_layer(name):
            unknown.append(key)
        elif match["suffix"].startswith("lora_magnitude_vector"):
            named[name, MAGNITUDE] = magnitude_from_peft(tensor)
        elif match["suffix"].endswith(("down.weight", "lora_A.weight")):
            own = _below(config, match["component"])
            named[name, DOWN] = tensor
            named[name, ALPHA] = alpha_of(path, tensor.shape[0], own)
        else:
            named[name, UP] = tensor
    if unknown:
        raise unknown_keys(unknown, len(tensors), source)
    return adapter_state(named, metadata, source)


def _below(config: Mapping[str, Any], component: str) -> dict[str, Any]:
    prefix = f"{component}."
    return {field.removeprefix(prefix): value for field, value in config.items() if field.startswith(prefix)}


def write(state: AdapterState, path: Path) -> None:
    """Writes one file."""
    tensors, config = encode(state)
    save_tensors(path, tensors, {**with_hashes(state, tensors), CONFIG_KEY: config})


def read(path: Path) -> AdapterState:
    """Reads what `write` wrote, and PEFT names (`lora_A`, `lora_B`) below the component's too."""
    tensors, metadata = load_tensors(path)
    return decode(tensors, metadata, str(path))
