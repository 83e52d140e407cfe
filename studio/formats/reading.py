"""What all formats do with the keys of a file once they have names: check them and build the state."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from studio.adapters.base import METHODS, method_of
from studio.errors import ConfigError
from studio.formats.state import AdapterState

DOWN, UP, ALPHA, MAGNITUDE = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"

Entries = Mapping[str, Mapping[str, Tensor]]


class Placed(dict[tuple[str, str], Tensor]):
    """(full layer name, suffix) -> tensor, filled key by key. Raises ConfigError where two keys mean the same place."""

    def __setitem__(self, place: tuple[str, str], tensor: Tensor) -> None:
        if place in self:
            raise ConfigError(f"two keys of the file mean the {place[1]} of {place[0]}: it has this layer twice")
        super().__setitem__(place, tensor)


def known_suffixes() -> frozenset[str]:
    """Every suffix that some method writes."""
    return frozenset().union(*(method.needed | method.optional for method in METHODS.values()))


def unknown_keys(keys: Iterable[str], total: int, source: str) -> ConfigError:
    """The error for keys that a format has no place for: the first five, and how many there are."""
    keys = list(keys)
    return ConfigError(
        f"{len(keys)} of the {total} keys in {source} are not those of an adapter for Stable Diffusion or FLUX.1: "
        f"{', '.join(keys[:5])}"
    )


def adapter_state(
    named: Mapping[tuple[str, str], Tensor], metadata: Mapping[str, str], source: str, family: str | None = None
) -> AdapterState:
    """The state from (full layer name, suffix) -> tensor; `family` where the file's keys tell it.

    A missing alpha of a LoRA means alpha = rank, as in sd-scripts. Raises ConfigError for layers whose
    suffixes are those of no method, or whose tensors are no such adapter's whatever the layer, naming the first five.
    """
    entries: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for (name, suffix), tensor in named.items():
        entries[name][suffix] = tensor
    broken = {name: entry for name, entry in entries.items() if method_of(frozenset(entry)) is None}
    if broken or not entries:
        raise _incomplete(broken, len(entries), source)
    if malformed := [f"{name}: {fault}" for name, entry in entries.items() if (fault := _fault(entry))]:
        raise ConfigError(
            f"{len(malformed)} of the {len(entries)} layers in {source} are malformed: {'; '.join(malformed[:5])}"
        )
    for entry in entries.values():
        if DOWN in entry:
            entry.setdefault(ALPHA, torch.tensor(float(entry[DOWN].shape[0])))
    return AdapterState(family or guess_family(entries, metadata), dict(entries), dict(metadata))


def _incomplete(broken: Mapping[str, Iterable[str]], total: int, source: str) -> ConfigError:
    """The error for layers whose suffixes fit no method."""
    first = dict(list(broken.items())[:5])
    count = f"{len(broken)} of the {total} layers in {source}"
    if all(len({DOWN, UP}.intersection(entry)) == 1 for entry in broken.values()):
        return ConfigError(f"{count} lack one of their two factors: {', '.join(first)}. The file is incomplete.")
    named = "; ".join(f"{name}: {_misfit(frozenset(entry))}" for name, entry in first.items())
    return ConfigError(f"{count} have the entries of no method: {named}")


def _misfit(suffixes: frozenset[str]) -> str:
    """What separates `suffixes` from those of the method that they resemble most."""
    nearest = max(METHODS.values(), key=lambda one: (len(suffixes & (one.needed | one.optional)), -len(one.needed)))
    missing = sorted(nearest.needed - suffixes)
    strange = sorted(suffixes - nearest.needed - nearest.optional)
    if not missing and not strange:  # a method whose entries have several forms
        return f"{', '.join(sorted(suffixes))} are not all of {nearest.method}"
    parts = [f"without {', '.join(missing)}"] * bool(missing) + [f"with {', '.join(strange)}"] * bool(strange)
    return f"{nearest.method} {' and '.join(parts)}"


_MATRICES = re.compile(r"(lora|hada|lokr|oft|hira|miss|c3a)_.+|randlora_(lambda|gamma)|mora_weight|token_rows|diff")
_MOST_DIMS = 5  # of the kernel of a three-dimensional convolution
_MOST_ALPHA = 1e9  # whose square is far from fp32's largest number


def _fault(entry: Mapping[str, Tensor]) -> str:
    """What is wrong with an adapter's tensors, whatever the layer it is for; "" where nothing is."""
    method = method_of(frozenset(entry))
    for suffix, tensor in entry.items():
        shape = tuple(tensor.shape)
        if suffix == ALPHA:
            if tensor.numel() != 1 or tensor.ndim > _MOST_DIMS or not abs(float(tensor)) <= _MOST_ALPHA:
                return f"{suffix} of the shape {shape} is not one number of up to {_MOST_ALPHA:g}"
        elif tensor.is_floating_point() == (method is not None and suffix in method.integers):
            return f"{suffix} holds numbers of the type {tensor.dtype}"
        elif tensor.ndim > _MOST_DIMS or (tensor.ndim < 2 and _MATRICES.fullmatch(suffix)):
            return f"{suffix} has the shape {shape}"
    if DOWN in entry and not _ranks_agree(entry[DOWN].shape, entry[UP].shape):
        return f"its factors are {tuple(entry[DOWN].shape)} and {tuple(entry[UP].shape)}, of different ranks"
    return ""


def _ranks_agree(down: torch.Size, up: torch.Size) -> bool:
    """(rank, in, ...) and (out, rank / groups, ...), or (experts, rank, in) and (experts, out, rank)."""
    groups, rest = divmod(down[0], up[1])
    of_convolution = rest == 0 and up[0] % groups == 0 and (groups == 1 or len(down) > 2)
    of_experts = len(down) == len(up) == 3 and down[0] == up[0] and down[1] == up[2]
    return of_convolution or of_experts


_FAMILIES = {"sd_v": "sd", "sdxl": "sdxl", "flux1": "flux", "medium": "sd3", "5-medium": "sd3", "5-large": "sd3"}


def family_of_version(metadata: Mapping[str, str]) -> str | None:
    """The family that sd-scripts' `ss_base_model_version` names, as far as it is one of ours."""
    version = metadata.get("ss_base_model_version", "")
    return next((family for start, family in _FAMILIES.items() if version.startswith(start)), None)


_SIGNS = {
    "flux": re.compile(r"transformer\.(single_transformer_blocks|x_embedder).*|text_encoder_2\.encoder\..*"),
    "sd3": re.compile(r"transformer\.(pos_embed|.*\.attn2\.).*|text_encoder_3\..*"),
    "sdxl": re.compile(r"unet\.(.*\.transformer_blocks\.[1-9]|add_embedding).*|text_encoder_2\.text_model\..*"),
}
_FLUX_WIDTH = 3072


def guess_family(entries: Entries, metadata: Mapping[str, str]) -> str:
    """The family, from `ss_base_model_version` where it names one with such layers, otherwise from names and shapes."""
    of_transformer = any(name.startswith("transformer.") for name in entries)
    possible = ("flux", "sd3") if of_transformer else tuple(_SIGNS)
    stated = family_of_version(metadata)
    if stated in possible:
        return stated
    for family in possible:
        if any(_SIGNS[family].fullmatch(name) for name in entries):
            return family
    if of_transformer:
        return "flux" if _width(entries, (".attn.to_q", ".attn.to_k", ".attn.to_v")) == _FLUX_WIDTH else "sd3"
    return "sdxl" if text_width(entries) == 2048 else "sd"


# suffix -> which dimension of it a linear layer's input width, or the rank, is
_INPUT_WIDTH = {DOWN: 1, "hada_w1_b": 1, "diff": 1}
_RANK = {DOWN: 0, "hada_w1_b": 0, "lokr_w2_b": 0, "lokr_w1_b": 0}


def text_width(entries: Entries) -> int | None:
    """The width of the text that the U-Net reads (768: SD 1, 1024: SD 2, 2048: SDXL), where a layer tells."""
    places = (".attn2.to_k", ".attn2.to_v"), (".q_proj", ".k_proj", ".v_proj", ".fc1")
    return next((width for ends in places if (width := _width(entries, ends))), None)


def _width(entries: Entries, ends: tuple[str, ...]) -> int | None:
    """The input width of the first layer of such a name that tells it."""
    widths = (_dimension(entry, _INPUT_WIDTH) for name, entry in entries.items() if name.endswith(ends))
    return next(filter(None, widths), None)


def rank_of(entry: Mapping[str, Tensor]) -> int | None:
    """The rank that kohya's metadata states of a layer, the inner width of its factors, where it has any."""
    return _dimension(entry, _RANK)


def _dimension(entry: Mapping[str, Tensor], places: Mapping[str, int]) -> int | None:
    return next((entry[suffix].shape[place] for suffix, place in places.items() if suffix in entry), None)
