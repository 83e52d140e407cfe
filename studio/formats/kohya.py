"""kohya's file: what sd-scripts, ComfyUI, A1111 and diffusers all read. One `.safetensors`.

A module is the flattened layer name after a prefix for its component. Stable Diffusion 1 and 2 keep
diffusers' names; SDXL, SD3 and FLUX have the original code's for the denoiser, because sd-scripts trains that. What
stands after the first dot is the method's own suffix, as kohya and LyCORIS write it: the format holds every method,
on fused layers those that `fused` can put together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from studio.errors import ConfigError
from studio.families.keys import LDMNames, flatten, known_layer, unflatten
from studio.formats.embeddings import bundled, split_bundle, with_bundle
from studio.formats.files import load_tensors, save_tensors
from studio.formats.metadata import with_hashes
from studio.formats.original import (
    DENOISERS,
    NAMES,
    Named,
    from_original,
    layer_names,
    original_name,
    to_original,
)
from studio.formats.peft import canonical_name
from studio.formats.reading import (
    Entries,
    Placed,
    adapter_state,
    family_of_version,
    guess_family,
    known_suffixes,
    unknown_keys,
)
from studio.formats.state import AdapterState

PREFIXES = {
    "sd": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    "flux": {"transformer": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"},
    "sd3": {
        "transformer": "lora_unet_",
        "text_encoder": "lora_te1_",
        "text_encoder_2": "lora_te2_",
        "text_encoder_3": "lora_te3_",
    },
}


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is meant to be of this format."""
    prefixes = tuple({prefix for family in PREFIXES.values() for prefix in family.values()})
    return any(key.startswith(prefixes) for key in keys)


def _named(name: str, family: str) -> Named | None:
    """(component, path) as the file has them, before flattening."""
    if family != "sd":
        return original_name(name, family)
    component, path = _below_component(name)
    return (component, path) if component in PREFIXES[family] and known_layer(name) else None


def _below_component(name: str) -> Named:
    component, _, path = name.partition(".")
    return component, path


def module_name(name: str, family: str) -> str | None:
    """ "unet.mid_block.attentions.0.proj_in" -> "lora_unet_mid_block_attentions_0_proj_in"; None without a name.

    For a part of a fused layer, the name of the whole.
    """
    named = _named(name, family)
    return None if named is None else PREFIXES[family][named[0]] + flatten(named[1])


def layers_of(module: str, family: str) -> tuple[str, ...]:
    """The full names of the layers that a module is for, several for a fused one; none for an unknown module."""
    place = _place(module, family)
    return (place,) if isinstance(place, str) else layer_names(place, family) if place else ()


def _place(module: str, family: str) -> Named | str | None:
    """What a module is for: a layer of the original code, or the full name of one of diffusers'; None for no such.

    SDXL's U-Net and the transformers may have diffusers' names too, as in sd-scripts and ComfyUI. CLIP may
    lack `text_model`, as tools write it that do not restore what transformers 5 leaves out.
    """
    component, prefix = next((pair for pair in PREFIXES[family].items() if module.startswith(pair[1])), ("", ""))
    flat = module.removeprefix(prefix)
    if component == DENOISERS[family] and family != "sd":
        names = NAMES[family]
        path = unflatten(flat) if isinstance(names, LDMNames) else names.unflatten(flat)
        if path and layer_names((component, path), family):
            return component, path
    name = canonical_name(component, unflatten(flat)) if component else None
    return name if name and _named(name, family) else None


def has_name(name: str, family: str) -> bool:
    """Whether the format can hold this layer of this family."""
    return module_name(name, family) is not None


def objection(layers: Entries, family: str) -> str:
    """What the format cannot hold of these layers: some methods on layers that are parts of a fused one."""
    try:
        if family != "sd":  # which keeps diffusers' names
            to_original(layers, family)
    except ConfigError as problem:
        return str(problem)
    return ""


def encode(state: AdapterState) -> dict[str, Tensor]:
    """File key -> tensor, for layers that have a name. Raises ConfigError for parts of a layer that it cannot fuse."""
    if state.family == "sd":
        named = {_below_component(name): entry for name, entry in state.tensors.items()}
    else:
        named = to_original(state.tensors, state.family)
    prefixes = PREFIXES[state.family]
    layers = {
        f"{prefixes[component]}{flatten(path)}.{suffix}": tensor
        for (component, path), entry in named.items()
        for suffix, tensor in entry.items()
    }
    return layers | bundled(state)


def decode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> AdapterState:
    """The state in a file's keys.

    Raises ConfigError for unknown keys, naming the first five, for a layer under two names, and as `from_original`.
    """
    layers, vectors = split_bundle(tensors)
    families = _families({key.partition(".")[0] for key in layers}, metadata)
    places: dict[str, Named | str] = {}
    named = Placed()
    suffixes, unknown = known_suffixes(), []
    for key, tensor in layers.items():
        module, _, suffix = key.partition(".")
        place = _place(module, families[0])
        if place is None or suffix not in suffixes:
            unknown.append(key)
            continue
        name = place if isinstance(place, str) else ".".join(place)
        places[name] = place
        named[name, suffix] = tensor
    if unknown:
        raise unknown_keys(unknown, len(tensors), source)
    state = adapter_state(named, metadata, source, families[0])
    own = {name: entry for name, entry in state.tensors.items() if isinstance(places[name], str)}
    fused = {place: state.tensors[name] for name, place in places.items() if not isinstance(place, str)}
    entries = from_original(fused, families[0])
    if twice := sorted(own.keys() & entries.keys()):
        raise ConfigError(f"{source} has {len(twice)} layers under two names: {', '.join(twice[:5])}")
    entries |= own
    guess = guess_family(entries, metadata)
    family = guess if guess in families else families[0]
    return with_bundle(replace(state, family=family, tensors=entries), vectors)


def _families(modules: Collection[str], metadata: Mapping[str, str]) -> list[str]:
    """The families that know the most of the modules, the one that the metadata state before others."""
    known = {family: sum(_place(module, family) is not None for module in modules) for family in PREFIXES}
    stated = family_of_version(metadata)
    return sorted((family for family in known if known[family] == max(known.values())), key=lambda one: one != stated)


def write(state: AdapterState, path: Path) -> None:
    """Writes one file, with `ss_*` and `modelspec.*` metadata and kohya's hashes."""
    tensors = encode(state)
    save_tensors(path, tensors, with_hashes(state, tensors))


def read(path: Path) -> AdapterState:
    """Reads what `write` wrote, and what other tools write in this format."""
    tensors, metadata = load_tensors(path)
    return decode(tensors, metadata, str(path))
