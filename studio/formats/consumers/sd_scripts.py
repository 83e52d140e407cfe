"""kohya's sd-scripts: LoRA, and nothing else, by `networks.lora`, `lora_flux` and `lora_sd3`.

It makes LoRA modules inside the blocks of the U-Net or transformer, for the keys that name them, and passes over
all other keys: a `dora_scale` too, so that a DoRA acts as the LoRA inside it. A module whose tensors have another
shape ends the loading. For SDXL it has LDM's names, and translates diffusers' where a file has those.

Its `networks.oft` reads files of its own prefix, `oft_unet_`, that no other tool writes: alpha is a constraint
there, times the outputs, and 0 means no rotation at all. Other methods need LyCORIS's network module.
"""

from __future__ import annotations

import re

from studio.formats.consumers.effect import Reading, refused
from studio.formats.consumers.places import Base, Place, flat
from studio.formats.consumers.subject import File
from studio.formats.reading import DOWN
from studio.formats.spellings import KOHYA

# the layers outside of blocks; FLUX's embedders are among its modules, SD3's last layer too
_OUTSIDE = {
    "sd": r"lora_unet_(conv_|time_embed)",
    "sdxl": r"lora_unet_(conv_|time_embed|add_embedding|label_emb|input_blocks_0_|out_)",
    "flux": r"lora_unet_final_layer_",
    "sd3": r"lora_unet_pos_embed",
}


def rule(file: File, base: Base) -> Reading:
    """Every LoRA under a name of its own."""
    reading = Reading()
    places = modules(base)
    lora = {ending: suffix for ending, suffix in KOHYA.items() if ending != ".dora_scale"}
    for found in file.adapters(places, lora, ["lora"]):
        reading.add(found)
    if strange := _misfit(file, places, reading):
        return refused(f"{strange} has another shape than its layer")
    if any(key.endswith(".dora_scale") for key in file.tensors) and reading.keys:
        reading.note("drops dora_scale: it computes the LoRA without its magnitudes")
    return reading


def modules(base: Base) -> dict[str, Place]:
    """Its names of the layers that it adapts."""
    places = flat("lora_unet_", base.denoiser) if base.has_unet else {}
    if base.family != "sd":
        places |= flat("lora_unet_", base.original)
    outside = re.compile(_OUTSIDE[base.family])
    places = {module: place for module, place in places.items() if not outside.match(module)}
    return {name: one for name, one in (places | base.kohya_encoders).items() if one.spec.kind in ("linear", "conv")}


def _misfit(file: File, places: dict[str, Place], reading: Reading) -> str:
    """A factor that is under one of its names and fits no module; "" without any."""
    factors = (key for key in file.tensors if key.endswith(f".{DOWN}") and key.partition(".")[0] in places)
    return next((key for key in factors if key not in reading.keys), "")
