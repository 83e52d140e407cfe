"""What all formats do with the keys of a file once they have names: check them and build the state."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from studio.errors import ConfigError
from studio.formats.state import AdapterState

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
LORA_SUFFIXES = (DOWN, UP, ALPHA)

Entries = Mapping[str, Mapping[str, Tensor]]


def unknown_keys(keys: Iterable[str], total: int, source: str) -> ConfigError:
    """The error for keys that a format has no place for: the first five, and how many there are."""
    keys = list(keys)
    return ConfigError(
        f"{len(keys)} of the {total} keys in {source} are not those of a LoRA for Stable Diffusion 1, 2 or XL: "
        f"{', '.join(keys[:5])}"
    )


def lora_state(
    named: Mapping[tuple[str, str], Tensor], metadata: Mapping[str, str], source: str, family: str | None = None
) -> AdapterState:
    """The state of a LoRA from (full layer name, suffix) -> tensor; `family` where the file's keys tell it.

    A missing alpha means alpha = rank, as in sd-scripts. Raises ConfigError for a layer without both factors.
    """
    entries: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for (name, suffix), tensor in named.items():
        entries[name][suffix] = tensor
    broken = [name for name, entry in entries.items() if DOWN not in entry or UP not in entry]
    if broken or not entries:
        raise ConfigError(
            f"{len(broken)} of the {len(entries)} layers in {source} lack one of their two factors: "
            f"{', '.join(broken[:5])}. The file is incomplete."
        )
    for entry in entries.values():
        entry.setdefault(ALPHA, torch.tensor(float(entry[DOWN].shape[0])))
    return AdapterState("lora", family or guess_family(entries, metadata), dict(entries), dict(metadata))


_DEEP = re.compile(r"unet\..*\.transformer_blocks\.[1-9].*|unet\.add_embedding\..*|text_encoder_2\..*")


def guess_family(entries: Entries, metadata: Mapping[str, str]) -> str:
    """ "sd" or "sdxl", from `ss_base_model_version` where it is one of theirs, otherwise from names and shapes."""
    version = metadata.get("ss_base_model_version", "")
    if version.startswith("sdxl"):
        return "sdxl"
    deep = any(_DEEP.fullmatch(name) for name in entries)
    return "sdxl" if deep or text_width(entries) == 2048 else "sd"


def text_width(entries: Entries) -> int | None:
    """The width of the text that the U-Net reads (768: SD 1, 1024: SD 2, 2048: SDXL), where a layer tells."""
    for ends in (".attn2.to_k", ".attn2.to_v"), (".q_proj", ".k_proj", ".v_proj", ".fc1"):
        for name, entry in entries.items():
            if name.endswith(ends):
                return entry[DOWN].shape[1]
    return None
