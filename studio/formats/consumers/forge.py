"""Forge: A1111's interface with ComfyUI's loading of 2024 behind it.

The names are ComfyUI's, but for SD3's those of diffusers; T5 answers to any number. OFT is not among the methods,
DoRA divides by ||W|| as in ComfyUI. A file with more than twelve tensors left over is not applied at all.
"""

from __future__ import annotations

from studio.formats.consumers import comfyui
from studio.formats.consumers.effect import Reading, refused
from studio.formats.consumers.places import Base, dotted, flat
from studio.formats.consumers.subject import File
from studio.formats.spellings import LORA, spelled

METHODS = tuple(method for method in comfyui.METHODS if method != "oft")
_LEFT_OVER = 12  # the most keys that it does without
_T5_PREFIXES = ("lora_te1_", "lora_te2_", "lora_te3_")


def rule(file: File, base: Base) -> Reading:
    """Every adapter under one of the names, unless too much is left over."""
    reading = Reading()
    t5 = {component: _T5_PREFIXES for component in comfyui.T5.get(base.family, {})}
    places = comfyui.encoders(base, t5)
    if base.family == "sd3":
        places |= flat("lora_unet_", base.original) | dotted("diffusion_model.", base.original)
    else:
        places |= comfyui.denoiser(base)
    for spelling, methods in [(spelled(METHODS), METHODS), *((pair, LORA) for pair in comfyui.PAIRS)]:
        for found in file.adapters(places, spelling, methods):
            comfyui.take(found, file, reading)
    left = len(file.tensors) - len(reading.keys)
    return refused(f"{left} keys are left over, and it allows {_LEFT_OVER}") if left > _LEFT_OVER else reading
