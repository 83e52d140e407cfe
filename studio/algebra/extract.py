"""An adapter out of two checkpoints: the best LoRA of what fine-tuning changed, layer by layer.

Checkpoints are mappings from full tensor names ("unet.conv_in.weight") to tensors, read one at a time: a
base on disk (`base_weights`), or loaded models (`model_weights`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from studio.adapters.targets import select
from studio.algebra.bases import Base, DiffusersFolder, SingleFile, local_base, open_base, weight_files
from studio.algebra.change import Change, Layer, located
from studio.algebra.cut import Cut
from studio.algebra.report import CombinedState, Tally
from studio.errors import ConfigError
from studio.families import FAMILIES, ModelFamily
from studio.families.base import Models
from studio.formats.files import load_keys
from studio.formats.metadata import merged

Weights = Mapping[str, Tensor]


@torch.no_grad()
def extract(
    base: Weights,
    tuned: Weights,
    family: str,
    rank: int | None = None,
    *,
    energy: float | None = None,
    sv_ratio: float | None = None,
    frobenius: float | None = None,
    targets: Sequence[str] = (),
    norms: bool = False,
    biases: bool = False,
    min_diff: float = 0.0,
    names: tuple[str, str] = ("base", "tuned"),
    dtype: torch.dtype | None = None,
) -> CombinedState:
    """`tuned` - `base` as an adapter: a LoRA of the ranks that `Cut` chooses, or without any, full differences.

    `targets` are patterns as in `AdapterPlan.targets`; without any, every layer is looked at. A tensor counts as
    changed where some entry differs by more than `min_diff`, which keeps out what another precision has rounded.
    `norms` takes changed norms too; `biases` changed biases, and layers where both change then stay full
    differences, for no file holds a LoRA and a bias of one layer. Changed tensors that are not taken are
    in the report's `left_out`. `names` call the two in the metadata. Raises ConfigError for checkpoints of
    different layers or shapes, for targets that match nothing, and where nothing has changed.
    """
    _check_alike(base, tuned, names)
    layers = _layers(base)
    chosen = _chosen(layers, targets, family)
    cut, tally, entries, left_out = Cut(rank, energy, sv_ratio, frobenius), Tally(), {}, []
    for name, keys in layers.items():
        changed = _changed(keys, base, tuned, min_diff)
        norm = "weight" in changed and changed["weight"].ndim == 1
        wanted = {"weight": norms if norm else True, "bias": norms if norm else biases}
        taken = {part: tensor for part, tensor in changed.items() if name in chosen and wanted.get(part)}
        left_out += [keys[part] for part in changed if part not in taken]
        if taken:
            change = Change(taken.get("weight"), taken.get("bias"), norm)
            layer = Layer(None, Layer.of(name, None, []).kind or "layer")
            with located(name):
                entries[name] = tally.entry(tally.cut({name: (layer, change)}, cut)[name], dtype)
    if not entries:
        raise ConfigError(f"{names[1]} changes nothing of {names[0]} in the layers that were looked at")
    facts = {**cut.stated(), "targets": list(targets), "norms": norms, "biases": biases, "min_diff": min_diff}
    metadata = merged([{}, {}], names, [-1.0, 1.0], "extract", facts | ({"dtype": str(dtype)} if dtype else {}))
    return CombinedState(family, entries, metadata, tally.report(left_out=left_out))


def _check_alike(base: Weights, tuned: Weights, names: tuple[str, str]) -> None:
    differing = sorted(base.keys() ^ tuned.keys())
    if differing:
        where = [f"{key} (only in {names[0 if key in base else 1]})" for key in differing[:5]]
        raise ConfigError(f"{len(differing)} tensors are in one of the two checkpoints only: {', '.join(where)}")


def _layers(weights: Iterable[str]) -> dict[str, dict[str, str]]:
    """Layer -> "weight", "bias" or another of its tensors -> full tensor name."""
    layers: dict[str, dict[str, str]] = defaultdict(dict)
    for key in weights:
        name, _, part = key.rpartition(".")
        layers[name][part] = key
    return layers


def _chosen(layers: Iterable[str], targets: Sequence[str], family: str) -> set[str]:
    names = set(layers)
    roles = FAMILIES[family].roles if family in FAMILIES else {}
    return set().union(*(select(target, names, roles) for target in targets)) if targets else names


def _changed(keys: Mapping[str, str], base: Weights, tuned: Weights, min_diff: float) -> dict[str, Tensor]:
    """What was added to the tensors of a layer, in fp32, of those where some entry changes by over `min_diff`."""
    changed = {}
    for part, key in keys.items():
        before, after = base[key], tuned[key]
        if before.shape != after.shape:
            raise ConfigError(f"{key} is {tuple(before.shape)} in one checkpoint and {tuple(after.shape)} in the other")
        if before.is_floating_point() and bool(((added := after.float() - before.float()).abs() > min_diff).any()):
            changed[part] = added
    return changed


# -- where the tensors are -------------------------------------------------------------------


def model_weights(family: ModelFamily, models: Models) -> Weights:
    """The tensors of loaded models under their full names."""
    return {
        f"{prefix}.{name}": tensor
        for prefix, module in family.prefixes(models).items()
        for name, tensor in module.state_dict().items()
    }


def checkpoints(base: str, tuned: str) -> tuple[Weights, Weights, str]:
    """The tensors of two bases as the user names them, and their family. Raises ConfigError where these differ."""
    places = [open_base(local_base(source)) for source in (base, tuned)]
    one, other = (place.family for place in places)
    if one != other:
        raise ConfigError(f"{base} is {one} and {tuned} is {other}: nothing to compare")
    return base_weights(places[0]), base_weights(places[1]), one


def base_weights(base: Base) -> Weights:
    """The tensors of a base on disk under their full names. Raises ConfigError for a U-Net of unknown structure."""
    return _OnDisk(base, _folder_names(base) if isinstance(base, DiffusersFolder) else _single_file_names(base))


def _folder_names(base: DiffusersFolder) -> Iterator[str]:
    """CLIP always with `text_model.`, which transformers 5 leaves out of some files."""
    for component in FAMILIES[base.family].components:
        files, *_ = weight_files(base.path / component).values()
        for key in (key for file in files for key in load_keys(file)):
            below = component.startswith("text_encoder") and not key.startswith(("text_model.", "text_projection"))
            yield f"{component}.text_model.{key}" if below else f"{component}.{key}"


def _single_file_names(base: SingleFile) -> list[str]:
    """Those of the published models that the file has."""
    family = FAMILIES[base.family]
    references = [family.reference(variant) for variant in (("sd1", "sd2") if base.family == "sd" else ("",))]
    known = {name for models in references for name in model_weights(family, models)}
    found = {name: places[0].key for name in known if (places := base.places(name))}
    unknown = {key for key in base.file if key.startswith("model.diffusion_model.")} - set(found.values())
    if unknown:
        raise ConfigError(
            f"{base.path}: {len(unknown)} tensors are of no known U-Net: {', '.join(sorted(unknown)[:5])}"
        )
    return sorted(found)


class _OnDisk(Mapping[str, Tensor]):
    """The tensors of a base on disk, each read when it is asked for."""

    def __init__(self, base: Base, names: Iterable[str]) -> None:
        self._base, self._names = base, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._base.places(name)[0].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
