"""PEFT's folders: one subfolder a component, each with `adapter_config.json` and `adapter_model.safetensors`.

`PeftModel.from_pretrained(unet, folder, subfolder="unet")` loads one. Paths are those of the modules
that the installed transformers builds: its version 5 flattened CLIPTextModel.
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

from studio.errors import ConfigError
from studio.families import FAMILIES
from studio.families.keys import known_layer
from studio.formats.files import load_tensors, save_tensors
from studio.formats.metadata import describing
from studio.formats.reading import ALPHA, DOWN, UP, Entries, lora_state, unknown_keys
from studio.formats.state import AdapterState

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_SUFFIXES = {"lora_A.weight": DOWN, "lora_B.weight": UP}
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.(?P<suffix>lora_[AB]\.weight)")


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
    }


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
    return known_layer(name) and name.partition(".")[0] in FAMILIES[family].components


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is meant to be of this format."""
    return any(key.startswith("base_model.model.") for key in keys)


def write(state: AdapterState, path: Path) -> None:
    """Writes a folder with one subfolder for each component."""
    for component, layers in by_component(state.tensors).items():
        flat = component == "text_encoder" and _text_model_is_flat()
        own = {name.removeprefix("text_model.") if flat else name: entry for name, entry in layers.items()}
        tensors = {
            f"base_model.model.{name}.{suffix}": entry[ours]
            for name, entry in own.items()
            for suffix, ours in _SUFFIXES.items()
        }
        config = {"peft_type": "LORA", "task_type": None, "bias": "none", "inference_mode": True, **lora_config(own)}
        save_tensors(path / component / WEIGHTS, tensors, {"format": "pt", **describing(state)})
        text = json.dumps(config, indent=2, sort_keys=True)
        (path / component / CONFIG).write_text(text, encoding="utf-8")


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
            named[name, _SUFFIXES[match["suffix"]]] = tensor
            if match["suffix"] == "lora_A.weight":
                named[name, ALPHA] = alpha_of(match["path"], tensor.shape[0], config)
        if unknown:
            raise unknown_keys(unknown, len(tensors), str(folder / WEIGHTS))
    return lora_state(named, metadata, str(path))


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
