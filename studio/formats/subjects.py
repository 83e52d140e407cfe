"""What a consumer's rule looks at: the file in question, and the layers of the base it is for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from studio.adapters import METHODS, LayerSpec, named_targets
from studio.errors import ConfigError
from studio.families.base import DiffusionFamily, Models
from studio.families.keys import LDMNames, flatten
from studio.formats import peft
from studio.formats.files import opened

Specs = dict[str, LayerSpec]  # a name -> the layer that it means

_FEW = 8  # values of a tensor that tells numbers (alpha, flags): those are read, of all others the shape


@dataclass(frozen=True)
class File:
    """Tensors by key, in the file's order, those of more than a few values on the meta device; and metadata."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def applied(self, modules: Specs, spelling: Mapping[str, str], methods: Iterable[str]) -> set[str]:
        """The keys that make an adapter of one of `methods` on one of `modules`, and fit its layer.

        `spelling`: ending of a key after the module -> our suffix. Endings that the method has no place
        for do not count; the first method that fits decides.
        """
        used: set[str] = set()
        for module, spec in modules.items():
            keys = {ours: module + ending for ending, ours in spelling.items() if module + ending in self.tensors}
            if keys:
                used |= self._adapter_keys(keys, spec, methods)
        return used

    def _adapter_keys(self, keys: Mapping[str, str], spec: LayerSpec, methods: Iterable[str]) -> set[str]:
        for method in (METHODS[name] for name in methods):
            own = keys.keys() & (method.needed | method.optional)
            if not method.owns(frozenset(own)):
                continue
            try:
                with torch.device("meta"):
                    method.from_export(spec, {suffix: self._tensor(keys[suffix]) for suffix in own})
            except ConfigError:
                continue
            return {keys[suffix] for suffix in own}
        return set()

    def _tensor(self, key: str) -> Tensor:
        """The tensor as our own entries have it."""
        tensor = self.tensors[key]
        return peft.magnitude_from_peft(tensor) if ".lora_magnitude_vector" in key else tensor


def read_file(path: Path) -> File:
    """The subject of a `.safetensors` file."""
    with opened(path) as file:
        tensors = {}
        for key in file.keys():  # noqa: SIM118
            shape = file.get_slice(key).get_shape()
            few = torch.Size(shape).numel() <= _FEW
            tensors[key] = file.get_tensor(key) if few else torch.empty(shape, device="meta")
        return File(tensors, file.metadata() or {})


def read_folder(path: Path) -> File:
    """A PEFT adapter as one file, its keys after "component/"."""
    tensors: dict[str, Tensor] = {}
    for component, folder in peft.folders(path).items():
        tensors |= {f"{component}/{key}": tensor for key, tensor in read_file(folder / peft.WEIGHTS).tensors.items()}
    return File(tensors, {})


def variant(file: File) -> str:
    """Stable Diffusion 2's U-Net reads text of width 1024, and its text encoder has 23 layers, 1's 12."""
    if version := file.metadata.get("ss_base_model_version"):
        return "sd2" if "v2" in version else "sd1"
    for key, tensor in file.tensors.items():
        if re.search(r"attn2[._]to_[kv]\b.*(down|lora_A)", key):
            return "sd2" if tensor.shape[1] == 1024 else "sd1"
    return "sd2" if any(re.search(r"encoder[._]layers[._](1[2-9]|2\d)[._]", key) for key in file.tensors) else "sd1"


class Base:
    """The layers of a base by component."""

    def __init__(self, family: DiffusionFamily, models: Models) -> None:
        self.components: dict[str, Specs] = {component: {} for component in family.components}
        for name, target in named_targets(family.prefixes(models)).items():
            component, _, path = name.partition(".")
            self.components[component][path] = target.spec
        self.unet = self.components["unet"]
        names = LDMNames(models.parts["unet"].config)
        self.unet_ldm = {ldm: spec for path, spec in self.unet.items() if (ldm := names.to_ldm(path)) is not None}
        self.is_xl = "text_encoder_2" in self.components
        # the layers that tools have names for: not the embeddings, nor the norms, nor the projection
        self.encoders = {
            component: {path: spec for path, spec in layers.items() if ".layers." in path and spec.kind == "linear"}
            for component, layers in self.components.items()
            if component != "unet"
        }

    def kohya_encoders(self) -> Specs:
        """The text encoders' layers by their kohya names."""
        numbers = {"text_encoder": "1" if self.is_xl else "", "text_encoder_2": "2"}
        return {
            f"lora_te{numbers[component]}_{flatten(path)}": spec
            for component, layers in self.encoders.items()
            for path, spec in layers.items()
        }
