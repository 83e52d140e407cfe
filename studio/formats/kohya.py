"""kohya's file: what sd-scripts, ComfyUI, A1111 and diffusers all read. One `.safetensors`.

A module is the flattened layer name after a prefix for its component. Stable Diffusion 1 and 2 keep
diffusers' names; SDXL has LDM's for the U-Net, because sd-scripts trains its own. What stands after the
first dot is the method's own suffix, as kohya and LyCORIS write it: the format holds every method.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from studio.families.keys import LDMNames, flatten, known_layer, unflatten
from studio.families.sdxl import SDXL_UNET
from studio.formats.files import load_tensors, save_tensors
from studio.formats.metadata import with_hashes
from studio.formats.reading import Entries, adapter_state, known_suffixes, unknown_keys
from studio.formats.state import AdapterState

PREFIXES = {
    "sd": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
_COMPONENTS = {prefix: component for family in PREFIXES.values() for component, prefix in family.items()}
_LDM = LDMNames(SDXL_UNET)
_LDM_MODULE = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks|time_embed_|label_emb|out_)")


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is meant to be of this format."""
    return any(key.startswith(tuple(_COMPONENTS)) for key in keys)


def module_name(name: str, family: str) -> str | None:
    """ "unet.mid_block.attentions.0.proj_in" -> "lora_unet_mid_block_attentions_0_proj_in"; None without a name."""
    component, _, path = name.partition(".")
    if not known_layer(name) or component not in PREFIXES[family]:
        return None
    if family == "sdxl" and component == "unet":
        ldm = _LDM.to_ldm(path)
        if ldm is None:
            return None
        path = ldm
    return PREFIXES[family][component] + flatten(path)


def layer_name(module: str) -> str | None:
    """The inverse of `module_name`; also reads diffusers' U-Net names in an SDXL file, as sd-scripts does."""
    prefix = next((prefix for prefix in _COMPONENTS if module.startswith(prefix)), None)
    if prefix is None:
        return None
    component, path = _COMPONENTS[prefix], unflatten(module.removeprefix(prefix))
    if path.startswith("encoder."):
        path = f"text_model.{path}"  # written under transformers 5 by tools that do not restore the name
    if component == "unet":
        path = _LDM.to_diffusers(path) or path
    name = f"{component}.{path}"
    return name if known_layer(name) else None


def has_name(name: str, family: str) -> bool:
    """Whether the format can hold this layer of this family."""
    return module_name(name, family) is not None


def objection(layers: Entries) -> str:
    """What the format cannot hold of these layers: nothing, whatever their methods."""
    return ""


def encode(state: AdapterState) -> dict[str, Tensor]:
    """File key -> tensor, for layers that have a name."""
    return {
        f"{module_name(name, state.family)}.{suffix}": tensor
        for name, entry in state.tensors.items()
        for suffix, tensor in entry.items()
    }


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> AdapterState:
    """The state in a file's keys. Raises ConfigError for unknown keys, naming the first five."""
    suffixes = known_suffixes()
    named, unknown = {}, []
    for key, tensor in tensors.items():
        module, _, suffix = key.partition(".")
        name = layer_name(module)
        if name is None or suffix not in suffixes:
            unknown.append(key)
        else:
            named[name, suffix] = tensor
    if unknown:
        raise unknown_keys(unknown, len(tensors), source)
    of_xl = any(key.startswith(("lora_te1_", "lora_te2_")) or _LDM_MODULE.match(key) for key in tensors)
    return adapter_state(named, metadata, source, "sdxl" if of_xl else None)


def write(state: AdapterState, path: Path) -> None:
    """Writes one file, with `ss_*` and `modelspec.*` metadata and kohya's hashes."""
    tensors = encode(state)
    save_tensors(path, tensors, with_hashes(state, tensors))


def read(path: Path) -> AdapterState:
    """Reads what `write` wrote, and what other tools write in this format."""
    tensors, metadata = load_tensors(path)
    return decode(tensors, metadata, str(path))
