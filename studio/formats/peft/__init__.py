"""PEFT's folders: one subfolder a component, each with `adapter_config.json` and `adapter_model.safetensors`.

`PeftModel.from_pretrained(unet, folder, subfolder="unet")` loads one. Paths are those of the modules
that the installed transformers builds: its version 5 flattened CLIPTextModel. A component has one method, of
those that PEFT has in a form equal to ours (`PEFT_METHODS`).
"""

from __future__ import annotations

import json
import re
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
from studio.formats.peft.forms import Layers, PeftMethod
from studio.formats.peft.forms import magnitude_from_peft as magnitude_from_peft
from studio.formats.peft.projected import ProjectedForm
from studio.formats.peft.table import PEFT_METHODS
from studio.formats.reading import Entries, adapter_state, unknown_keys
from studio.formats.state import AdapterState

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
COMPONENTS = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.components))
_TYPES = {form.peft_type: form for form in PEFT_METHODS.values()}
_PREFIX = "base_model.model."
_ADAPTER_NAME = re.compile(r"\.default(?=\.weight$|$)")  # in the keys of a model's own state dict


def by_component(entries: Entries) -> dict[str, dict[str, Mapping[str, Tensor]]]:
    """Component -> path below it -> suffix -> tensor."""
    components: dict[str, dict[str, Mapping[str, Tensor]]] = {}
    for name, entry in entries.items():
        component, _, path = name.partition(".")
        components.setdefault(component, {})[path] = entry
    return components


def canonical_name(component: str, path: str) -> str | None:
    """The full layer name of a module path, or None; without a component ("") the first that has such a layer.

    CLIP's paths may lack their `text_model.`, as transformers 5 builds it.
    """
    for owner in (component,) if component else ("unet", "transformer", *COMPONENTS):
        for name in (f"{owner}.{path}", f"{owner}.text_model.{path}"):
            if known_layer(name):
                return name
    return None


def has_name(name: str, family: str) -> bool:
    """Whether the format can hold this layer of this family."""
    return known_layer(name) and name.partition(".")[0] in FAMILIES[family].components


def objection(layers: Entries, family: str) -> str:
    """What PEFT cannot hold of these layers, in words; "" where it holds them all."""
    projected = 0
    for component, own in by_component(layers).items():
        methods = sorted({method.method if (method := method_of(frozenset(one))) else "?" for one in own.values()})
        if others := [name for name in methods if name not in PEFT_METHODS]:
            return f"the method '{others[0]}'"
        forms = {id(PEFT_METHODS[name]) for name in methods}
        if len(forms) > 1:
            return f"{' and '.join(map(repr, methods))} in one component ({component})"
        form = PEFT_METHODS[methods[0]]
        projected += isinstance(form, ProjectedForm)
        if projected > 1:
            return f"a {methods[0]} whose random matrices several components share"
        try:
            form.settings(own)
        except ConfigError as problem:
            return f"{problem} ({component})"
    return ""


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is meant to be of this format."""
    return any(key.startswith(_PREFIX) for key in keys)


def write(state: AdapterState, path: Path) -> None:
    """Writes a folder with one subfolder for each component."""
    for component, layers in by_component(state.tensors).items():
        flat = component == "text_encoder" and state.family != "sd3" and _text_model_is_flat()
        own = {name.removeprefix("text_model.") if flat else name: entry for name, entry in layers.items()}
        form = _form(own)
        tensors = {f"{_PREFIX}{name}.{key}": one for name in own for key, one in form.to_peft(name, own[name]).items()}
        config = {"peft_type": form.peft_type, "task_type": None, "inference_mode": True, "target_modules": sorted(own)}
        metadata = {"format": "pt", **describing(state)}
        save_tensors(path / component / WEIGHTS, tensors | form.shared(own), metadata)
        text = json.dumps({**config, **form.settings(own)}, indent=2, sort_keys=True)
        (path / component / CONFIG).write_text(text, encoding="utf-8")


def _form(layers: Layers) -> PeftMethod:
    method = method_of(frozenset(next(iter(layers.values()))))
    assert method is not None, "objection() has seen them"
    return PEFT_METHODS[method.method]


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
        own, metadata = _read_folder(component, folder)
        named |= own
    return adapter_state(named, metadata, str(path))


def _read_folder(component: str, folder: Path) -> tuple[dict[tuple[str, str], Tensor], dict[str, str]]:
    """((full layer name, suffix) -> tensor, the metadata) of one component."""
    config = _read_config(folder / CONFIG)
    form = _TYPES[config["peft_type"]]
    pickled = folder / "adapter_model.bin"  # PEFT's before safetensors
    weights = pickled if pickled.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS
    tensors, metadata = load_tensors(weights)
    layers: dict[tuple[str, str], dict[str, Tensor]] = {}  # (full name, PEFT's path) -> PEFT's suffix -> tensor
    shared, unknown = {}, []
    for key, tensor in tensors.items():
        path, suffix = _split(_ADAPTER_NAME.sub("", key), form)
        name = canonical_name(component, path) if path else None
        if name is not None:
            layers.setdefault((name, path), {})[suffix] = tensor
        elif f"base_model.{key.rpartition('.')[2]}" in form.shared_keys:
            shared[key] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise unknown_keys(unknown, len(tensors), str(weights))
    taken = len(shared) + sum(map(len, layers.values()))
    if len({name for name, _ in layers}) < len(layers) or taken < len(tensors):
        raise ConfigError(f"{weights} has a layer under two names")
    try:
        known = form.with_shared(shared, config)
        entries = {name: form.from_peft(path, own, known) for (name, path), own in layers.items()}
    except ConfigError as problem:
        raise ConfigError(f"{folder}: {problem}") from problem
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as problem:
        raise ConfigError(f"{folder}: {CONFIG} and {weights.name} do not fit each other ({problem!r})") from problem
    return {(name, suffix): tensor for name, entry in entries.items() for suffix, tensor in entry.items()}, metadata


def _split(key: str, form: PeftMethod) -> tuple[str, str]:
    """(module path, PEFT's suffix) of a key; ("", "") where it is none of this form's."""
    key = key.removesuffix(".weight") if key.endswith("lora_magnitude_vector.weight") else key
    for suffix in form.suffixes:
        if key.startswith(_PREFIX) and key.endswith(f".{suffix}"):
            return key[len(_PREFIX) : -len(suffix) - 1], suffix
    return "", ""


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{path} is not JSON: {problem}") from problem
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ConfigError(f"{path} is of the type {kind}; {', '.join(_TYPES)} can be read")
    return config
