"""ComfyUI: several names for every layer, LyCORIS's methods but IA3, and its own reading of DoRA and OFT.

Attention layers of a U-Net have their dotted name only as `.processor.to_q`. Keys that are left over are logged.
It computes the new weight once. On the output axis, DoRA divides by ||W|| where the method has ||W + dW||; a
magnitude without a second dimension ends in a mismatch on layers that are not square. OFT's alpha is the largest norm
of Q itself, where LyCORIS has it times the outputs, and a `rescale` beside `oft_blocks` of three dimensions is read
and left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from studio.adapters import Adapter, WeightView
from studio.adapters.layers import wide
from studio.adapters.methods import DoRA, LoRA
from studio.formats.consumers.effect import Change, Reading
from studio.formats.consumers.places import Base, Place, dotted, flat
from studio.formats.consumers.subject import File, Found
from studio.formats.embeddings import ENCODERS
from studio.formats.reading import ALPHA, MAGNITUDE
from studio.formats.spellings import (
    DIFFUSERS,
    ENCODER,
    LORA,
    MOCHI,
    PEFT,
    PEFT_MODEL,
    PROCESSOR,
    spelled,
    with_processor,
)

METHODS = ("dora", "tucker", "lora", "loha", "lokr", "oft", "diff", "bias", "norm")
PAIRS = (PROCESSOR, PEFT, DIFFUSERS, ENCODER)
_OWN_PAIRS = (MOCHI, PEFT_MODEL)
_CLIP_H = {"sd": {"clip_h": "text_encoder"}}  # what it calls Stable Diffusion 2's
CLIPS = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
# the encoder that is no CLIP, by family: component -> prefixes
T5: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "flux": {"text_encoder_2": ("lora_te2_", "lora_te3_")},
    "sd3": {"text_encoder_3": ("lora_te3_",)},
}


def rule(file: File, base: Base) -> Reading:
    """Every adapter under one of the names."""
    reading = Reading()
    places = denoiser(base) | encoders(base, T5.get(base.family, {}))
    for name, component in {**ENCODERS[base.family], **_CLIP_H.get(base.family, {})}.items():
        places |= dotted(f"text_encoders.{name}.transformer.", base.components[component])
    for found in file.adapters(places, spelled(METHODS), METHODS):
        take(found, file, reading)
    for spelling in (*PAIRS, *_OWN_PAIRS):
        for found in file.adapters(places, spelling, LORA):
            take(found, file, reading)
    return reading


def denoiser(base: Base) -> dict[str, Place]:
    """The names of the U-Net's or transformer's layers."""
    places = flat("lora_unet_", base.original) | dotted("diffusion_model.", base.original)
    places |= flat("lycoris_", base.denoiser)
    if base.has_unet:
        processors = {with_processor(path): place for path, place in base.denoiser.items()}
        return places | flat("lora_unet_", base.denoiser) | processors | dotted("unet.", processors)
    places |= dotted("transformer.", base.denoiser) | flat("lora_transformer_", base.denoiser)
    return places | (dotted("base_model.model.", base.denoiser) if base.family == "sd3" else {})


def encoders(base: Base, t5: Mapping[str, Iterable[str]]) -> dict[str, Place]:
    """The names of the text encoders' layers; `t5`: component -> prefixes of the encoder that is no CLIP."""
    places: dict[str, Place] = {}
    for component, layers in base.encoders.items():
        for prefix in t5.get(component, CLIPS.get(component, ())):
            places |= flat(prefix, layers)
        if component in CLIPS and component not in t5:
            places |= dotted(f"{component}.", layers)
    if base.family in ("sdxl", "sd3"):
        places["lora_te2_text_projection"] = base.components["text_encoder_2"]["text_projection"]
    return places


def take(found: Found, file: File, reading: Reading) -> None:
    """Adds an adapter as ComfyUI understands and computes it."""
    stated = file.meant.get(found.place.layer, {}).get(ALPHA)
    if stated is not None and ALPHA not in found.keys and float(stated) != float(found.entry[ALPHA]):
        reading.note("takes the rank for alpha: the file has it in its metadata alone")
    takers = {"dora": _take_dora, "oft": _take_oft}
    takers.get(found.method, lambda found, reading: reading.add(found))(found, reading)


def _take_dora(found: Found, reading: Reading) -> None:
    magnitude = found.entry[MAGNITUDE]
    if magnitude.ndim < 2:
        reading.note("breaks on a dora_scale of one dimension: write it as (outputs, 1)")
    elif magnitude.shape[0] == found.place.spec.out_features:
        reading.add(found, formula=by_base_norm)
        reading.note("divides DoRA's magnitudes by |W| instead of |W + dW|")
    else:
        reading.add(found)


def _take_oft(found: Found, reading: Reading) -> None:
    """OFT and BOFT, whose blocks have four dimensions."""
    entry, is_boft = dict(found.entry), found.entry["oft_blocks"].ndim == 4
    if is_boft and ALPHA not in entry:
        reading.note("breaks on a BOFT without alpha")
        return
    if not is_boft and entry.pop("rescale", None) is not None:
        reading.note("leaves out the rescale of OFT")
    if float(entry.get(ALPHA, 0)):
        entry[ALPHA] = entry[ALPHA] / found.place.spec.out_features
        reading.note("takes OFT's alpha for the limit of the whole rotation, not for that of each output")
    reading.add(found, entry)


def by_base_norm(adapter: Adapter, weight: WeightView) -> Change:
    """m * (W + dW) / ||W|| - W for DoRA's magnitudes m of the outputs, with the LoRA's dW."""
    assert isinstance(adapter, DoRA)
    dense = wide(weight.dense())
    norm = dense.flatten(1).norm(dim=1).reshape(adapter.dora_scale.shape)
    return adapter.dora_scale / norm * (dense + LoRA.delta_weight(adapter, weight)) - dense, None
