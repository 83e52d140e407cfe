"""Layers under the names of the original code: BFL's FLUX, Stability's MMDiT, and LDM's U-Net.

kohya's files have these names flattened, ComfyUI's dotted. Where the original code has one fused layer for
several of diffusers', its adapter is cut into theirs, and theirs are put together (`fused`); where it has the
halves of a modulation the other way round, they change places.
"""

from __future__ import annotations

from collections.abc import Mapping

from studio.errors import ConfigError
from studio.families import FAMILIES
from studio.families.dit import FLUX_NAMES, LAST_MODULATION, SD3_NAMES, DiTNames
from studio.families.keys import LDMNames, known_layer
from studio.families.sd import SD1_UNET
from studio.families.sdxl import SDXL_UNET
from studio.formats.fused import Entry, expansion, fuse, reversed_halves, split

Named = tuple[str, str]  # (component, path below it)

DENOISERS = {"sd": "unet", "sdxl": "unet", "flux": "transformer", "sd3": "transformer"}
NAMES: dict[str, LDMNames | DiTNames] = {
    "sd": LDMNames(SD1_UNET),
    "sdxl": LDMNames(SDXL_UNET),
    "flux": FLUX_NAMES,
    "sd3": SD3_NAMES,
}


def original_name(name: str, family: str) -> Named | None:
    """The layer's name in the original code, that of the fused layer which it is a part of; None where there is none.

    Text encoders keep their names.
    """
    component, _, path = name.partition(".")
    if not known_layer(name) or component not in FAMILIES[family].components:
        return None
    if component != DENOISERS[family]:
        return component, path
    names = NAMES[family]
    original = names.to_ldm(path) if isinstance(names, LDMNames) else names.to_original(path)
    return None if original is None else (component, original)


def layer_names(named: Named, family: str) -> tuple[str, ...]:
    """The full layer names that an original layer is made of, in the order of its outputs; none for unknown ones."""
    component, path = named
    paths: tuple[str | None, ...] = (path,)
    if component == DENOISERS[family]:
        names = NAMES[family]
        paths = (names.to_diffusers(path),) if isinstance(names, LDMNames) else names.to_diffusers(path)
    layers = tuple(f"{component}.{one}" for one in paths)
    return layers if all(original_name(layer, family) == named for layer in layers) else ()


def to_original(entries: Mapping[str, Entry], family: str) -> dict[Named, Entry]:
    """(component, dotted original name) -> entry, in the order of `entries` (full layer name -> entry).

    Raises ConfigError for a layer without an original name, and for layers that cannot be put together exactly.
    """
    originals: dict[Named, Entry] = {}
    for name in entries:
        named = original_name(name, family)
        if named is None:
            raise ConfigError(f"{name} has no name in the original code of '{family}'")
        if named not in originals:
            layers = layer_names(named, family)
            parts = [entries.get(layer) for layer in layers]
            try:
                originals[named] = _in_order(named, fuse(parts, _shares(layers)) if len(parts) > 1 else entries[name])
            except ConfigError as problem:
                raise ConfigError(f"{', '.join(layers)} in one as {'.'.join(named)}: {problem}") from problem
    return originals


def from_original(originals: Mapping[Named, Entry], family: str) -> dict[str, Entry]:
    """Full layer name -> entry: the inverse of `to_original`.

    Raises ConfigError for an unknown name, and for an adapter of a fused layer that cannot be cut exactly.
    """
    entries: dict[str, Entry] = {}
    for named, entry in originals.items():
        layers = layer_names(named, family)
        if not layers:
            raise ConfigError(f"{'.'.join(named)} is no layer of the original code of '{family}'")
        try:
            ordered = _in_order(named, entry)
            parts = split(ordered, _shares(layers)) if len(layers) > 1 else [ordered]
        except ConfigError as problem:
            raise ConfigError(
                f"{'.'.join(named)} is {', '.join(layers)} in one, which cannot be cut: {problem}. Merge it into its "
                "base with a tool that loads it so, and extract the difference from that (studio extract)"
            ) from problem
        entries |= {layer: part for layer, part in zip(layers, parts, strict=True) if part is not None}
    return entries


def _shares(layers: tuple[str, ...]) -> tuple[int, ...]:
    """The ratio of the outputs: a feed-forward is four times as wide as query, key and value."""
    return tuple(4 if layer.endswith(".proj_mlp") else 1 for layer in layers)


def _in_order(named: Named, entry: Entry) -> Entry:
    """With the halves of a last modulation the other way round: shift and scale there, scale and shift in diffusers.

    The text's half of SD3's last block has such a modulation too, of two vectors and not six.
    """
    _, path = named
    if path == LAST_MODULATION:
        return reversed_halves(entry)
    if not path.endswith(".context_block.adaLN_modulation.1"):
        return entry
    vectors = expansion(entry)
    if vectors is None:
        raise ConfigError("its tensors do not show whether it is the last block's, whose halves change places")
    return reversed_halves(entry) if vectors == 2 else entry
