"""diffusers' `load_lora_weights`: LoRA, and DoRA in its own naming; a file is in kohya's names, or in its own.

It loads with PEFT, which needs one alpha for all layers and a table of exceptions. Those of kohya's names do not
reach attention layers nor text encoders: such a layer gets the alpha that most have. `dora_scale` is dropped with
a warning. FLUX's kohya names are converted with their alphas, for the published widths alone, and the layers outside
of blocks are lost on the way; SD3's are not known. A key that the conversion leaves over ends the loading.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from studio.formats.consumers.effect import Reading, refused
from studio.formats.consumers.places import Base, Place, dotted, flat, without_text_model
from studio.formats.consumers.subject import File, Found
from studio.formats.diffusers import LOADED
from studio.formats.reading import ALPHA, MAGNITUDE
from studio.formats.spellings import (
    DIFFUSERS,
    ENCODER,
    KOHYA,
    LORA,
    PEFT,
    PEFT_MAGNITUDE,
    PROCESSOR,
    with_processor,
)

_KOHYA_PREFIXES = ("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")


def rule(file: File, base: Base) -> Reading:
    """The adapters of a file in kohya's names where it has those, and in diffusers' own otherwise."""
    without = {key: tensor for key, tensor in file.tensors.items() if "dora_scale" not in key}
    plain = File(without, file.metadata, file.meant, file.folder)
    if base.has_unet and all(key.startswith(_KOHYA_PREFIXES) for key in without):
        reading = _from_kohya(plain, base)
    elif base.family == "flux" and any(".lora_down.weight" in key for key in without):
        reading = _flux_from_kohya(plain, base)
    else:
        reading = _own(plain, base)
    if reading.keys and len(without) < len(file.tensors):
        reading.note("drops dora_scale: it computes the LoRA without its magnitudes")
    return reading


# -- its own names ---------------------------------------------------------------------------


def _own(file: File, base: Base) -> Reading:
    """The first key of the denoiser decides for all: with PEFT's endings, keys with diffusers' are not translated."""
    needed = any if base.family == "flux" else all
    if not needed("lora" in key for key in file.tensors):
        return refused("not all of its keys are those of a LoRA")
    reading = Reading()
    vectors = {PEFT_MAGNITUDE: MAGNITUDE, PEFT_MAGNITUDE.removesuffix(".weight"): MAGNITUDE}
    for component in LOADED[base.family]:
        if component.startswith("text_encoder"):
            layers = base.encoders.get(component, {})
            places = dotted(f"{component}.", layers | without_text_model(layers))
            spellings = [({**pair, PEFT_MAGNITUDE: MAGNITUDE}, places) for pair in (ENCODER, PEFT)]
        else:
            places = dotted(f"{component}.", base.denoiser)
            spellings = [({**PEFT, **vectors}, places)]
            if "lora_A" not in next((key for key in file.tensors if key.startswith(f"{component}.")), ""):
                processors = {with_processor(name): place for name, place in places.items()}
                spellings += [({**DIFFUSERS, **vectors}, places), (PROCESSOR, processors)]
        for spelling, names in spellings:
            for found in file.adapters(names, spelling, LORA):
                reading.add(found, {**found.entry, **_stated_alpha(file, found)})
    return reading


def _stated_alpha(file: File, found: Found) -> Mapping[str, Tensor]:
    """The alpha of a file's `lora_adapter_metadata`, which we read as diffusers does."""
    alpha = file.meant.get(found.place.layer, {}).get(ALPHA)
    return {} if alpha is None else {ALPHA: alpha}


# -- kohya's names of a U-Net ----------------------------------------------------------------

_LDM_BLOCK = re.compile("input_blocks|middle_block|output_blocks")
_UNET_BLOCK = re.compile("input_blocks|middle_block|output_blocks|down_blocks|mid_block|up_blocks")
_UNREACHED = re.compile(r"unet\..+\.attn\d\.to_.+|text_encoder.+")  # by the table of exceptions


def _from_kohya(file: File, base: Base) -> Reading:
    if strange := next((key for key in file.tensors if not key.endswith(tuple(KOHYA))), ""):
        return refused(f"it cannot rename {strange}")
    is_mixed = len({bool(_LDM_BLOCK.search(key)) for key in file.tensors if _UNET_BLOCK.search(key)}) > 1
    # block names of LDM are translated for SDXL only, and left out where diffusers' stand beside them
    places = flat("lora_unet_", base.denoiser)
    if base.family == "sdxl" and not is_mixed:
        places |= flat("lora_unet_", base.original)
    founds = list(file.adapters(places | _encoders(base), KOHYA, ["lora"]))
    reading = Reading()
    for component in ("unet", "text_encoder", "text_encoder_2"):
        own = [found for found in founds if found.place.layer.partition(".")[0] == component]
        if component != "unet" and own and not any(re.search(r"out_proj|mlp", one.place.layer) for one in own):
            return refused(f"it does not recognise a {component} without output projections")
        common = _common_alpha(own)
        for found in own:
            _take(found, common, reading)
    return reading


def _encoders(base: Base) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for component, layers in base.encoders.items():
        prefixes = ("lora_te2_",) if component == "text_encoder_2" else ("lora_te_", "lora_te1_")
        for prefix in prefixes:
            places |= flat(prefix, layers | without_text_model(layers))
    return places


def _common_alpha(founds: list[Found]) -> float | None:
    """The most frequent alpha among those that the file states; None where it states none."""
    stated = Counter(float(found.entry[ALPHA]) for found in founds if ALPHA in found.keys)
    return stated.most_common(1)[0][0] if stated else None


def _take(found: Found, common: float | None, reading: Reading) -> None:
    """Adds a LoRA with the alpha that it gets: the common one, unless its own is among the exceptions."""
    own = float(found.entry[ALPHA])
    reached = ALPHA in found.keys and not _UNREACHED.fullmatch(found.place.layer)
    if common is None or own == common or reached:
        reading.add(found)
        return
    reading.add(found, {**found.entry, ALPHA: torch.tensor(common)})
    reading.keys.discard(found.keys.get(ALPHA, ""))
    reading.note(f"takes {common:g} for the alpha of attention and text-encoder layers that have another")


# -- kohya's names of FLUX -------------------------------------------------------------------

_LINEAR1 = 3 * 3072 + 12288  # the width that the conversion is written for
_OUTSIDE = re.compile(
    r"lora_unet_(guidance_in|img_in|txt_in|time_in|vector_in|final_layer)_.*|lora_unet_(img|txt)_in\..*"
)


def _flux_from_kohya(file: File, base: Base) -> Reading:
    reading = Reading()
    blocks = {path: place for path, place in base.original.items() if "_blocks." in path}
    for found in file.adapters(flat("lora_unet_", blocks) | _encoders(base), KOHYA, ["lora"]):
        if found.place.layer.endswith(".linear1") and found.place.spec.out_features != _LINEAR1:
            return refused(f"it converts single blocks of {_LINEAR1} outputs only, as FLUX.1 has them")
        reading.add(found)
    left = [key for key in file.tensors if key not in reading.keys and not _OUTSIDE.match(key)]
    if strange := next((key for key in left if not key.startswith("lora_te") or key.endswith(".alpha")), ""):
        return refused(f"it cannot convert {strange}")
    if any(map(_OUTSIDE.match, file.tensors)):
        reading.note("loses the layers outside of FLUX's blocks when it converts kohya's names")
    return reading
