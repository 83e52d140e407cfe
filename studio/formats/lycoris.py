"""LyCORIS's own file, which its wrapper and SimpleTuner write: `lycoris_` and diffusers' flattened names.

The wrapper adapts one model and does not say which: the denoiser's names and those of a CLIP cannot be taken for
each other, a second encoder's could. ComfyUI reads it for the denoisers of Stable Diffusion, SD3 and FLUX.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from studio.families.keys import flatten, known_layer, unflatten
from studio.formats import flat
from studio.formats.files import load_tensors, save_tensors
from studio.formats.metadata import with_hashes
from studio.formats.original import DENOISERS
from studio.formats.peft import canonical_name
from studio.formats.reading import Entries
from studio.formats.state import AdapterState

PREFIX = "lycoris_"


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is meant to be of this format."""
    return any(key.startswith(PREFIX) for key in keys)


def module_name(name: str, family: str) -> str:
    """ "unet.mid_block.attentions.0.proj_in" -> "lycoris_mid_block_attentions_0_proj_in"."""
    return PREFIX + flatten(name.partition(".")[2])


def layer_name(module: str) -> str | None:
    """The inverse of `module_name`; None for a module that no model here has."""
    path = unflatten(module.removeprefix(PREFIX))
    return canonical_name("", path) if module.startswith(PREFIX) else None


def has_name(name: str, family: str) -> bool:
    """Whether the format can hold this layer of this family: the denoiser's, and the first text encoder's."""
    return known_layer(name) and name.partition(".")[0] in (DENOISERS[family], "text_encoder")


def objection(layers: Entries, family: str) -> str:
    """What the format cannot hold of these layers: nothing, whatever their methods."""
    return ""


def write(state: AdapterState, path: Path) -> None:
    """Writes one file, with `ss_*` and `modelspec.*` metadata and kohya's hashes."""
    tensors = flat.encode(state, module_name)
    save_tensors(path, tensors, with_hashes(state, tensors))


def read(path: Path) -> AdapterState:
    """Reads what `write` wrote, and what LyCORIS and SimpleTuner write."""
    tensors, metadata = load_tensors(path)
    return flat.decode(tensors, metadata, str(path), layer_name)
