"""A base on disk, as merging needs it: where each layer's tensors lie, and the same base in another form.

A base is a diffusers folder or a single file in the original code's names. Copied in its own form, it keeps its
keys, dtypes and metadata; nothing is loaded as a model.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studio.errors import ConfigError
from studio.families.base import FAMILIES
from studio.families.checkpoint import CLIP, CheckpointNames, names_of
from studio.families.loading import family_of, open_pipeline
from studio.families.sd import StableDiffusion
from studio.formats.files import save_tensors
from studio.formats.in_place import TensorFile, copy_with_metadata
from studio.hub import hub_reason, load_errors
from studio.paths import assets


@dataclass(frozen=True)
class Place:
    """Where a layer keeps a tensor: a key of a file, some of its rows, or its transpose."""

    file: TensorFile
    key: str
    rows: slice | None = None
    transposed: bool = False

    def read(self) -> Tensor:
        """The tensor as the layer has it. Raises ConfigError for a weight that is stored with a scale beside it."""
        layer = self.key.removesuffix(".weight")
        if beside := [f"{layer}.{name}" for name in ("scale_weight", "weight_scale") if f"{layer}.{name}" in self.file]:
            raise ConfigError(
                f"{self.file.path}: {self.key} is quantised ({beside[0]}): merge into a bf16 or fp16 base"
            )
        tensor = self.file.read(self.key, self.rows)
        return tensor.mT.contiguous() if self.transposed else tensor

    def write(self, tensor: Tensor) -> None:
        """Replaces the tensor, in its own dtype."""
        self.file.write(self.key, tensor.mT if self.transposed else tensor, self.rows)


class DiffusersFolder:
    """A diffusers pipeline on disk: a folder for each component, whose files may be sharded or come in variants."""

    def __init__(self, path: Path) -> None:
        self.path, self.family = path, family_of(str(path))
        self._variants: dict[str, list[dict[str, TensorFile]]] = {}

    def places(self, name: str) -> list[Place]:
        """Where "unet.conv_in.weight" lies, once in each variant ("fp16") of the weights that the folder holds."""
        component, _, path = name.partition(".")
        if component not in self._variants:
            self._variants[component] = [
                {key: file for shard in files for file in [TensorFile(shard)] for key in file}
                for files in weight_files(self.path / component).values()
            ]
        spellings = (path, path.removeprefix("text_model."))  # transformers 5 saves some encoders without it
        return [
            Place(keys[key], key)
            for keys in self._variants[component]
            for key in [next((one for one in spellings if one in keys), None)]
            if key is not None
        ]


class SingleFile:
    """A checkpoint of Stable Diffusion 1, 2 or XL in the names of the original code.

    Raises ConfigError for other families.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.family = path, family_of(str(path))
        if self.family not in CLIP:
            raise ConfigError(f"{path} is a single file of the family '{self.family}': give a diffusers folder instead")
        self.file = TensorFile(path)
        self._names = names_of(self.file, self.family)

    def places(self, name: str) -> list[Place]:
        """Where "unet.conv_in.weight" lies: one place, or none."""
        component, _, path = name.partition(".")
        slot = self._names.slot(component, path)
        if slot is None or slot.key not in self.file:
            return []
        third = self.file.shape(slot.key)[0] // 3
        rows = None if slot.part is None else slice(slot.part * third, (slot.part + 1) * third)
        return [Place(self.file, slot.key, rows, slot.transposed)]


Base = DiffusersFolder | SingleFile


def open_base(path: Path) -> Base:
    """The base in a folder or a single file. Raises ConfigError for what is neither."""
    return SingleFile(path) if path.is_file() else DiffusersFolder(path)


def local_base(source: str) -> Path:
    """The folder or file of "builtin", a path or a hub id, downloaded where it is not here yet. Raises ConfigError."""
    path = assets() / "base" if source == "builtin" else Path(source).expanduser()
    family_of(str(path) if path.exists() else source)
    if path.exists():
        return path
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(source))
    except load_errors() as problem:
        raise ConfigError(f"the hub did not give '{source}': {hub_reason(problem)}") from problem


def weight_files(folder: Path) -> dict[str, list[Path]]:
    """Variant -> its `.safetensors` files in a component's folder, shards in order; the plain one, "", comes first.

    Raises ConfigError where there are none.
    """
    variants: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(folder.glob("*.safetensors")):
        _, _, variant = file.stem.partition(".")  # model.fp16.safetensors, model-00001-of-00002.safetensors
        variants[variant].append(file)
    if not variants:
        raise ConfigError(f"{folder} holds no .safetensors weights")
    return dict(sorted(variants.items()))


# -- the same base elsewhere -----------------------------------------------------------------


def write_base(base: Base, target: Path, config: str | None, metadata: Mapping[str, str]) -> None:
    """The base again: at a `.safetensors` path as a single file with `metadata`, else as a diffusers folder.

    `config` is a diffusers folder that lends a single file its configurations and tokenizers where it becomes a folder.
    Raises ConfigError for a form that the base does not have.
    """
    single = target.suffix == ".safetensors"
    if isinstance(base, DiffusersFolder) and single:
        save_tensors(target, dict(_as_checkpoint(base)), metadata)
    elif isinstance(base, DiffusersFolder):
        _copy_folder(base.path, target)
    elif single:
        copy_with_metadata(base.path, target, metadata)
    else:
        family = FAMILIES[base.family]
        assert isinstance(family, StableDiffusion)
        dtype = base.places("unet.conv_in.weight")[0].read().dtype
        open_pipeline(family.pipeline, str(base.path), dtype, config, family.left_out).save_pretrained(target)


_UNREACHED = (".bin", ".ckpt", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".pb", ".xml")


def _copy_folder(source: Path, target: Path) -> None:
    """The pipeline's own components, and texts beside them; not the same weights in formats that merging leaves."""
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    components = {name for name, value in index.items() if isinstance(value, list) and value[0]}

    def others(folder: str, names: list[str]) -> list[str]:
        if Path(folder) == source:
            return [name for name in names if name not in components and Path(name).suffix not in (".json", ".md", "")]
        merged = any(name.endswith(".safetensors") for name in names)
        return [name for name in names if merged and Path(name).suffix in _UNREACHED]

    shutil.copytree(source, target, ignore=others)


def _as_checkpoint(base: DiffusersFolder) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder under its name in a single file."""
    if base.family not in CLIP:
        raise ConfigError(f"there is no single file for the family '{base.family}': write a diffusers folder")
    names = _names_of_folder(base)
    stacked: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for component in (*FAMILIES[base.family].components, "vae"):
        for name, tensor in _weights(base.path / component):
            slot = names.slot(component, name)
            if slot is None:
                raise ConfigError(f"{base.path}: a single file has no place for {component}.{name}")
            if slot.part is not None:
                stacked[slot.key][slot.part] = tensor
            elif slot.pointwise:
                yield slot.key, tensor.reshape(*tensor.shape[:2], 1, 1)
            else:
                yield slot.key, tensor.mT if slot.transposed else tensor
    for key, parts in stacked.items():
        yield key, torch.cat([parts[part] for part in range(3)])


def _names_of_folder(base: DiffusersFolder) -> CheckpointNames:
    def config(component: str) -> dict[str, Any]:
        return json.loads((base.path / component / "config.json").read_text(encoding="utf-8"))

    open_clip = base.family == "sdxl" or config("text_encoder").get("hidden_act") == "gelu"
    levels = len(config("vae")["block_out_channels"])
    return CheckpointNames(base.family, config("unet"), levels, open_clip)


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a component by name, of the plain variant where there are several."""
    files, *_ = weight_files(folder).values()
    for file in map(TensorFile, files):
        for key in file:
            if not key.endswith("position_ids"):  # 0, 1, 2, ...: a buffer of older transformers
                yield key, file.read(key)
