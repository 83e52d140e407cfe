"""Model families: one file is one architecture. A new one is its file and one import line below."""

from studio.families.base import FAMILIES, DiffusionFamily, ModelFamily
from studio.families.flux import Flux
from studio.families.sd import StableDiffusion
from studio.families.sd3 import StableDiffusion3
from studio.families.sdxl import StableDiffusionXL

__all__ = [
    "FAMILIES",
    "DiffusionFamily",
    "Flux",
    "ModelFamily",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
]
