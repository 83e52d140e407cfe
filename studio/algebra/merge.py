"""Merging: adapters put into a base's own weights, W + strength * dW, and the base saved as it was otherwise.

The base is copied on disk and changed layer by layer where its tensors lie, with one layer in memory at a time:
what no adapter touches keeps its bytes. Every method merges, for dW is computed from the layer's own W.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from studio.adapters import AdapterSet
from studio.adapters.inject import adapter_of_entry
from studio.algebra.bases import Base, Place, SingleFile, local_base, open_base, write_base
from studio.algebra.strengths import Strengths, strengths
from studio.algebra.views import target_of
from studio.errors import ConfigError
from studio.formats.metadata import BLEND, OF_ONE_FILE, merged
from studio.formats.state import AdapterState
from studio.outputs import check_unused

Part = tuple[Mapping[str, Tensor], float]
"""A layer's entry, and the strength that it is merged with."""


@dataclass(frozen=True)
class Ingredient:
    """An adapter to merge: its name (for the file's metadata), what it holds, and how strongly it acts.

    `blocks` are further factors of its blocks or layers, by patterns as in `AdapterPlan.targets`.
    """

    name: str
    state: AdapterState
    strength: float = 1.0
    blocks: Strengths = field(default_factory=dict)


@dataclass(frozen=True)
class Merge:
    """What merging made. `lost` has each changed layer's share of the change that the base's precision lost,
    |stored - exact| / |exact - base|, the largest first."""

    path: Path
    lost: Mapping[str, float]

    @property
    def mean_loss(self) -> float:
        """The mean of `lost`."""
        return sum(self.lost.values()) / max(len(self.lost), 1)


@torch.no_grad()
def merge(source: str, ingredients: Sequence[Ingredient], target: Path, config: str | None = None) -> Merge:
    """Merges into the base `source` ("builtin", a diffusers folder, a `.safetensors` checkpoint, a hub id).

    `target` ending in `.safetensors` is written as a single file in the original code's names, anything else as a
    diffusers folder; whole or not at all. `config` is a diffusers folder for a single file that becomes a folder.
    Raises ConfigError for a target that exists, an adapter for another family, layers that the base does not have,
    trained tokens, a weight that overflows, and settings that match nothing.
    """
    check_unused(target)
    base = open_base(local_base(source))
    parts = _parts_by_layer(base, ingredients)
    with _whole(target) as partial:
        write_base(base, partial, config, _metadata(base, ingredients))
        copy = open_base(partial)
        lost = {name: _merge_layer(copy, name, found) for name, found in parts.items()}
    return Merge(target, dict(sorted(lost.items(), key=lambda item: -item[1])))


def _parts_by_layer(base: Base, ingredients: Sequence[Ingredient]) -> dict[str, list[Part]]:
    """Layer -> what is merged into it. Raises ConfigError unless the base can take everything."""
    parts: dict[str, list[Part]] = defaultdict(list)
    for one in ingredients:
        if one.state.family != base.family:
            raise ConfigError(f"{one.name}: the file is for {one.state.family}, the base is {base.family}")
        if one.state.embeddings:
            tokens = ", ".join(one.state.embeddings)
            raise ConfigError(f"{one.name} brings trained tokens ({tokens}), which a base cannot hold")
        missing = [name for name in one.state.tensors if not base.places(f"{name}.weight")]
        if missing:
            raise ConfigError(
                f"{one.name}: {len(missing)} of its {len(one.state.tensors)} layers are not in {base.path}: "
                f"{', '.join(missing[:5])}. The file is for another base."
            )
        for name, factor in strengths(one.state, one.strength, one.blocks).items():
            parts[name].append((one.state.tensors[name], factor))
    return parts


def _metadata(base: Base, ingredients: Sequence[Ingredient]) -> dict[str, str]:
    """A single file's own, less the hashes of what it was, and what was merged into it."""
    own = base.file.metadata if isinstance(base, SingleFile) else {"format": "pt"}
    kept = {key: value for key, value in own.items() if key == "format" or key not in OF_ONE_FILE}
    names, weights = [one.name for one in ingredients], [one.strength for one in ingredients]
    made = merged([one.state.metadata for one in ingredients], names, weights, "merge")
    provenance = json.loads(made[BLEND]) | {"base": str(base.path)}
    return {**kept, BLEND: json.dumps(provenance)}


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A path of the target's name to write to; it becomes the target when all went well, and is removed otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".merging-", dir=target.parent))
    try:
        yield folder / target.name
        os.replace(folder / target.name, target)
    finally:
        shutil.rmtree(folder)


# -- one layer -------------------------------------------------------------------------------


def _merge_layer(base: Base, name: str, parts: Sequence[Part]) -> float:
    """Merges into one layer, in every variant that the base has of it: the largest share that a precision lost."""
    weights, biases = (base.places(f"{name}.{part}") for part in ("weight", "bias"))
    pairs = zip_longest(weights, biases)  # a layer without a bias has none in any variant
    return max(_merge_variant(name, weight, bias, parts) for weight, bias in pairs)


def _merge_variant(name: str, weight: Place, bias: Place | None, parts: Sequence[Part]) -> float:
    target = target_of(name, weight.read(), None if bias is None else bias.read())
    layer, before, lost = target.layer, target.layer.bias, 0.0
    for entry, strength in parts:
        adapters = AdapterSet({name: target}, {name: adapter_of_entry(target, entry)}).attach()
        adapters.set_strength(strength)
        lost = adapters.merge().lost[name]  # of all that are merged by now
    _write(name, weight, layer.weight)
    if layer.bias is not before:
        assert bias is not None, "no adapter fits a layer without the bias that it changes"
        _write(name, bias, layer.bias)
    return lost


def _write(name: str, place: Place, tensor: Tensor) -> None:
    if not tensor.float().isfinite().all():
        raise ConfigError(
            f"{name}: merged, it has values beyond {tensor.dtype}: lower the strength, or take a base in bf16 or fp32"
        )
    place.write(tensor)
