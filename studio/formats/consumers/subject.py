"""The keys of a file, and the adapters that they make on the layers of a base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studio.adapters import METHODS, Adapter, LayerSpec
from studio.adapters.base import method_of
from studio.errors import ConfigError
from studio.families.base import ModelFamily, Models
from studio.formats import peft
from studio.formats.consumers.places import Place, Places
from studio.formats.files import load_tensors
from studio.formats.peft.forms import magnitude_from_peft
from studio.formats.reading import ALPHA, DOWN

Entry = Mapping[str, Tensor]

_FEW = 8  # values of a tensor that tells numbers (alpha, flags): those are needed to build an adapter without memory


@dataclass(frozen=True)
class Found:
    """An adapter in a file that fits its place: our suffix -> tensor, and our suffix -> key."""

    place: Place
    method: str
    entry: dict[str, Tensor]
    keys: dict[str, str]


@dataclass(frozen=True)
class File:
    """Tensors by key, in the file's order, and metadata.

    `meant`: full layer name -> entry, as we read the file; empty where we cannot. `folder`: a PEFT folder, its keys
    after "component/".
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    meant: Mapping[str, Entry] = field(default_factory=dict)
    folder: bool = False
    _known: dict[Any, Found | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def adapters(self, places: Places, spelling: Mapping[str, str], methods: Iterable[str]) -> Iterator[Found]:
        """The adapters of one of `methods` on one of `places` that fit the layer there.

        `spelling`: ending of a key after the module -> our suffix. Endings that the method has no place
        for are left out; the first method that fits decides.
        """
        for module, place in places.items():
            keys = {ours: module + ending for ending, ours in spelling.items() if module + ending in self.tensors}
            if keys and (found := self._first(keys, place, methods)):
                yield found

    def _first(self, keys: Mapping[str, str], place: Place, methods: Iterable[str]) -> Found | None:
        for method in (METHODS[name] for name in methods):
            own = {suffix: key for suffix, key in keys.items() if suffix in method.needed | method.optional}
            if not method.owns(frozenset(own)):
                continue
            question = (method.method, place.layer, *own.items())  # tools ask the same again and again
            if question not in self._known:
                self._known[question] = self._fitting(method, own, place)
            if found := self._known[question]:
                return found
        return None

    def _fitting(self, method: type[Adapter], keys: dict[str, str], place: Place) -> Found | None:
        entry = {suffix: self._tensor(key) for suffix, key in keys.items()}
        if not fits(entry, place.spec, method):
            return None
        if DOWN in entry and ALPHA not in entry:
            entry[ALPHA] = torch.tensor(float(entry[DOWN].shape[0]))
        return Found(place, method.method, entry, keys)

    def _tensor(self, key: str) -> Tensor:
        """The tensor as our own entries have it."""
        tensor = self.tensors[key]
        return magnitude_from_peft(tensor) if ".lora_magnitude_vector" in key else tensor


def fits(entry: Entry, spec: LayerSpec, method: type[Adapter] | None = None) -> bool:
    """Whether an entry, of the method that its suffixes tell unless one is given, has the shapes for such a layer."""
    method = method or method_of(frozenset(entry))
    assert method is not None, entry.keys()
    shapes = {suffix: one if one.numel() <= _FEW else one.to("meta") for suffix, one in entry.items()}
    try:
        with torch.device("meta"):
            method.from_export(spec, shapes)
    except ConfigError:
        return False
    return True


def read_file(path: Path, meant: Mapping[str, Entry]) -> File:
    """The subject of a file or a PEFT folder, and what we read in it."""
    if path.is_file():
        return File(*load_tensors(path), meant)
    tensors: dict[str, Tensor] = {}
    for component, folder in peft.folders(path).items():
        own, _ = load_tensors(folder / peft.WEIGHTS)
        tensors |= {f"{component}/{key}": tensor for key, tensor in own.items()}
    return File(tensors, {}, meant, folder=True)


_LARGE_SD3 = re.compile(r"(joint|transformer)_blocks[._](2[4-9]|3\d)[._]")
_SD35 = re.compile(r"blocks[._]\d+[._].*attn2[._]")


def published(file: File, family: ModelFamily) -> Models:
    """The published model that a file is for, on the meta device, as far as the file tells."""
    if family.name == "sd":
        return family.reference(_generation(file))
    if family.name == "sd3" and any(_LARGE_SD3.search(key) for key in file.tensors):
        return family.reference("sd35-large")
    if family.name == "sd3" and any(_SD35.search(key) for key in file.tensors):
        return family.reference("sd35-medium")
    return family.reference()


def _generation(file: File) -> str:
    """Stable Diffusion 2's U-Net reads text of width 1024, and its text encoder has 23 layers, 1's 12."""
    if version := file.metadata.get("ss_base_model_version"):
        return "sd2" if "v2" in version else "sd1"
    for key, tensor in file.tensors.items():
        if re.search(r"attn2[._]to_[kv]\b.*(down|lora_A)", key):
            return "sd2" if tensor.shape[1] == 1024 else "sd1"
    return "sd2" if any(re.search(r"encoder[._]layers[._](1[2-9]|2\d)[._]", key) for key in file.tensors) else "sd1"
