"""PEFT's folders: one subfolder a component, each with `adapter_config.json` and `adapter_model.safetensors`.

`PeftModel.from_pretrained(unet, folder, subfolder="unet")` loads one. Paths are those of the modules
that the installed transformers builds: its version 5 flattened CLIPTextModel. LoRA and DoRA are held;
`use_dora` is one setting for all layers of a component.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studio.adapters.base import method_of
from studio.errors import ConfigError
from studio.families import FAMILIES
from studio.families.keys import known_layer
from studio.formats.files import load_tensors, save_tensors
from studio.formats.metadata import describing
from studio.formats.reading import ALPHA, DOWN, MAGNITUDE, UP, Entries, adapter_state, unknown_keys
from studio.formats.state import AdapterState

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
SUFFIXES = {"lora_A.weight": DOWN, "lora_B.weight": UP, "lora_magnitude_vector": MAGNITUDE}
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.(?P<suffix>lora_[AB]\.weight|lora_magnitude_vector)")


def by_component(entries: Entries) -> dict[str, dict[str, Mapping[str, Tensor]]]:
    """Component -> path below it -> suffix -> tensor."""
    components: dict[str, dict[str, Mapping[str, Tensor]]] = {}
    for name, entry in entries.items():
        component, _, path = name.partition(".")
        components.setdefault(component, {})[path] = entry
    return components


def lora_config(layers: Entries) -> dict[str, Any]:
    """The fields of `peft.LoraConfig` that describe `layers` (module path -> suffix -> tensor)."""
    ranks = {path: entry[DOWN].shape[0] for path, entry in layers.items()}
    alphas = {path: _plain(float(entry[ALPHA])) for path, entry in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(layers),
        "rank_pattern": {path: own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {path: own for path, own in alphas.items() if own != alpha},
        "use_dora": any(MAGNITUDE in entry for entry in layers.values()),
    }


def magnitude_to_peft(scale: Tensor) -> Tensor:
    """A `dora_scale` (out, 1) as PEFT's (out,), and that of a convolution (out, 1, ...) as (1, out, 1, ...)."""
    return scale.flatten() if scale.ndim == 2 else scale.transpose(0, 1)


def magnitude_from_peft(vector: Tensor) -> Tensor:
    """The inverse of `magnitude_to_peft`."""
    return vector[:, None] if vector.ndim == 1 else vector.transpose(0, 1)


def alpha_of(path: str, rank: int, config: Mapping[str, Any]) -> Tensor:
    """A layer's alpha under a `LoraConfig`; with rsLoRA, the alpha that gives its scale as alpha / rank."""
    alpha = config.get("lora_alpha", rank)
    for pattern, own in config.get("alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):  # PEFT's rule
            alpha = own
            break
    return torch.tensor(float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1))


def _plain(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def has_name(name: str, family: str) -> bool:
    """Whether the format can hold this layer of this family."""
    is_embedding = ".embeddings." in name  # PEFT's factors of an embedding have other names and shapes
    return known_layer(name) and not is_embedding and name.partition(".")[0] in FAMILIES[family].components


def objection(layers: Entries) -> str:
    """What PEFT's LoRA cannot hold of these layers, in words; "" where it holds them all.

    That is any method but LoRA and DoRA, both in one component, and a DoRA with a magnitude for each input channel.
    """
    found: dict[str, set[str]] = {}
    for name, entry in layers.items():
        method = method_of(frozenset(entry))
        found.setdefault(name.partition(".")[0], set()).add(method.method if method else "?")
        if MAGNITUDE in entry and entry[MAGNITUDE].shape[0] != entry[UP].shape[0]:
            return f"a DoRA with a magnitude for each input channel ({name})"
    for component, methods in found.items():
        if others := sorted(methods - {"lora", "dora"}):
            return f"the method '{others[0]}'"
        if len(methods) > 1:
            return f"'lora' and 'dora' in one component ({component})"
    return ""


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is meant to be of this format."""
    return any(key.startswith("base_model.model.") for key in keys)


def write(state: AdapterState, path: Path) -> None:
    """Writes a folder with one subfolder for each component."""
    for component, layers in by_component(state.tensors).items():
        flat = component == "text_encoder" and _text_model_is_flat()
        own = {name.removeprefix("text_model.") if flat else name: entry for name, entry in layers.items()}
        tensors = {
            f"base_model.model.{name}.{suffix}": tensor
            for name, entry in own.items()
            for suffix, tensor in peft_entry(entry).items()
        }
        config = {"peft_type": "LORA", "task_type": None, "bias": "none", "inference_mode": True, **lora_config(own)}
        save_tensors(path / component / WEIGHTS, tensors, {"format": "pt", **describing(state)})
        text = json.dumps(config, indent=2, sort_keys=True)
        (path / component / CONFIG).write_text(text, encoding="utf-8")


def peft_entry(entry: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's suffix -> tensor."""
    return {
        suffix: magnitude_to_peft(entry[ours]) if ours == MAGNITUDE else entry[ours]
        for suffix, ours in SUFFIXES.items()
        if ours in entry
    }


def _text_model_is_flat() -> bool:
    """Whether the installed transformers builds CLIPTextModel without a module `text_model`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return not hasattr(CLIPTextModel(CLIPTextConfig(num_hidden_layers=1)), "text_model")


def folders(path: Path) -> dict[str, Path]:
    """Component ("" where the folder does not say) -> folder with an adapter; empty for other folders."""
    found = {component: path / component for component in COMPONENTS if (path / component / CONFIG).is_file()}
    return found or ({"": path} if (path / CONFIG).is_file() else {})


def read(path: Path) -> AdapterState:
    """Reads the subfolders of `path`, or `path` itself; keys tell the component where folders do not."""
    named: dict[tuple[str, str], Tensor] = {}
    metadata: dict[str, str] = {}
    for component, folder in folders(path).items():
        config = _read_config(folder / CONFIG)
        tensors, metadata = load_tensors(folder / WEIGHTS)
        unknown = []
        for key, tensor in tensors.items():
            match = _KEY.fullmatch(key)
            name = _layer_name(component, match["path"]) if match else None
            if match is None or name is None:
                unknown.append(key)
                continue
            ours = SUFFIXES[match["suffix"]]
            named[name, ours] = magnitude_from_peft(tensor) if ours == MAGNITUDE else tensor
            if ours == DOWN:
                named[name, ALPHA] = alpha_of(match["path"], tensor.shape[0], config)
        if unknown:
            raise unknown_keys(unknown, len(tensors), str(folder / WEIGHTS))
    return adapter_state(named, metadata, str(path))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ConfigError(f"{path} is not JSON: {problem}") from problem
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{path} is of the type {config.get('peft_type')}; only LORA can be read")
    return config


def _layer_name(component: str, path: str) -> str | None:
    if path.startswith("encoder."):
        path = f"text_model.{path}"
    if not component:
        component = "text_encoder" if path.startswith("text_model.") else "unet"
    name = f"{component}.{path}"
    return name if known_layer(name) else None
