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


def known_suffixes() -> frozenset[str]:
    """Every suffix that some method writes."""
    return frozenset().union(*(method.needed | method.optional for method in METHODS.values()))


def unknown_keys(keys: Iterable[str], total: int, source: str) -> ConfigError:
    """The error for keys that a format has no place for: the first five, and how many there are."""
    keys = list(keys)
    return ConfigError(
        f"{len(keys)} of the {total} keys in {source} are not those of an adapter for Stable Diffusion 1, 2 or XL: "
        f"{', '.join(keys[:5])}"
    )


def adapter_state(
    named: Mapping[tuple[str, str], Tensor], metadata: Mapping[str, str], source: str, family: str | None = None
) -> AdapterState:
    """The state from (full layer name, suffix) -> tensor; `family` where the file's keys tell it.

    A missing alpha of a LoRA means alpha = rank, as in sd-scripts. Raises ConfigError for layers whose
    suffixes are those of no method, naming the first five and what is missing.
    """
    entries: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for (name, suffix), tensor in named.items():
        entries[name][suffix] = tensor
    broken = {name: entry for name, entry in entries.items() if method_of(frozenset(entry)) is None}
    if broken or not entries:
        raise _incomplete(broken, len(entries), source)
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


_DEEP = re.compile(r"unet\..*\.transformer_blocks\.[1-9].*|unet\.add_embedding\..*|text_encoder_2\..*")


def guess_family(entries: Entries, metadata: Mapping[str, str]) -> str:
    """ "sd" or "sdxl", from `ss_base_model_version` where it is one of theirs, otherwise from names and shapes."""
    version = metadata.get("ss_base_model_version", "")
    if version.startswith("sdxl"):
        return "sdxl"
    deep = any(_DEEP.fullmatch(name) for name in entries)
    return "sdxl" if deep or text_width(entries) == 2048 else "sd"


# suffix -> which dimension of it a linear layer's input width, or the rank, is
_INPUT_WIDTH = {DOWN: 1, "hada_w1_b": 1, "diff": 1}
_RANK = {DOWN: 0, "hada_w1_b": 0, "lokr_w2_b": 0, "lokr_w1_b": 0}


def text_width(entries: Entries) -> int | None:
    """The width of the text that the U-Net reads (768: SD 1, 1024: SD 2, 2048: SDXL), where a layer tells."""
    for ends in (".attn2.to_k", ".attn2.to_v"), (".q_proj", ".k_proj", ".v_proj", ".fc1"):
        for name, entry in entries.items():
            if name.endswith(ends) and (width := _dimension(entry, _INPUT_WIDTH)):
                return width
    return None


def rank_of(entry: Mapping[str, Tensor]) -> int | None:
    """The rank that kohya's metadata states of a layer, the inner width of its factors, where it has any."""
    return _dimension(entry, _RANK)


def _dimension(entry: Mapping[str, Tensor], places: Mapping[str, int]) -> int | None:
    return next((entry[suffix].shape[place] for suffix, place in places.items() if suffix in entry), None)
