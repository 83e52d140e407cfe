"""Model families: one file is one architecture. A new one is its file and one import line below."""

from studio.families.base import FAMILIES, DiffusionFamily, ModelFamily
from studio.families.sd import StableDiffusion
from studio.families.sdxl import StableDiffusionXL

__all__ = ["FAMILIES", "DiffusionFamily", "ModelFamily", "StableDiffusion", "StableDiffusionXL"]
