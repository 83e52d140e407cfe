"""OneTrainer's file (its layout "legacy"): diffusers' flattened names after kohya's prefixes.

For Stable Diffusion 1 and 2 it is kohya's file, for SDXL kohya's with diffusers' names in the U-Net; both are
read as such. Transformers have the prefix `lora_transformer_`, which ComfyUI and SD.Next know, and text encoders
are counted: FLUX's T5 is `lora_te2_`, which is `lora_te3_` in kohya's file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from studio.families.keys import flatten, known_layer, unflatten
from studio.formats import flat
from studio.formats.files import load_tensors, save_tensors
from studio.formats.metadata import with_hashes
from studio.formats.peft import canonical_name
from studio.formats.reading import Entries
from studio.formats.state import AdapterState

_COMPONENTS = {
    "lora_transformer_": "transformer",
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
PREFIXES = {
    family: {component: prefix for prefix, component in _COMPONENTS.items() if prefix != other}
    for family, other in {"sd": "lora_te1_", "sdxl": "lora_te_", "flux": "lora_te_", "sd3": "lora_te_"}.items()
}
_SCALED = ".oft_R.scaled_oft"


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is meant to be of this format, and not kohya's."""
    return any(key.startswith("lora_transformer_") for key in keys)


def module_name(name: str, family: str) -> str:
    """ "transformer.proj_out" -> "lora_transformer_proj_out"."""
    component, _, path = name.partition(".")
    return PREFIXES[family][component] + flatten(path)


def layer_name(module: str) -> str | None:
    """The inverse of `module_name`; None for a module that no model here has."""
    match = re.match("|".join(_COMPONENTS), module)
    return canonical_name(_COMPONENTS[match[0]], unflatten(module.removeprefix(match[0]))) if match else None


def has_name(name: str, family: str) -> bool:
    """Whether the format can hold this layer of this family."""
    return known_layer(name) and name.partition(".")[0] in PREFIXES[family]


def objection(layers: Entries, family: str) -> str:
    """What the format cannot hold of these layers: nothing, whatever their methods."""
    return ""


def write(state: AdapterState, path: Path) -> None:
    """Writes one file, with `ss_*` and `modelspec.*` metadata and kohya's hashes."""
    tensors = flat.encode(state, module_name)
    save_tensors(path, tensors, with_hashes(state, tensors))


def read(path: Path) -> AdapterState:
    """Reads what `write` wrote, and what OneTrainer writes; its `ot_*` metadata stay."""
    tensors, metadata = load_tensors(path)
    return flat.decode(_unscaled(tensors), metadata, str(path), layer_name)


def _unscaled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of OFT that is marked as scaled, what it means: `oft_R` over 2 sqrt(b - 1), for b (b - 1) / 2 columns."""
    modules = {key.removesuffix(_SCALED) for key in tensors if key.endswith(_SCALED)}
    plain = {key: tensor for key, tensor in tensors.items() if not key.endswith(_SCALED)}
    for key in [f"{module}.oft_R.weight" for module in modules if f"{module}.oft_R.weight" in plain]:
        size = (1 + math.isqrt(1 + 8 * plain[key].shape[-1])) // 2
        plain[key] = plain[key] / (2 * math.sqrt(size - 1))
    return plain
