"""Drawing many prompts with the studio's own generator, and laying pictures out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from studio.diffusion.generate import GenerateRequest, generate
from studio.diffusion.prompts import plain
from studio.families.base import DiffusionFamily, Models

STEPS, GUIDANCE = 20, 3.0


def draw(family: DiffusionFamily, models: Models, prompts: Sequence[str], seed: int) -> np.ndarray:
    """One 64-pixel picture a prompt, taken as plain text, the i-th from seed + i. (N, 64, 64, 3) uint8."""
    pictures = []
    for place, prompt in enumerate(prompts):
        request = GenerateRequest(plain(prompt), seed=seed + place, steps=STEPS, guidance=GUIDANCE)
        pictures.append(np.asarray(generate(family, models, request)[0]))
    return np.stack(pictures)


def grid(pictures: np.ndarray, columns: int, scale: int = 1, gap: int = 4) -> Image.Image:
    """(N, H, W, 3) uint8 as one picture, row by row, on white."""
    side = pictures.shape[1] * scale
    rows = math.ceil(len(pictures) / columns)
    canvas = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + gap) + gap), "white")
    for place, picture in enumerate(pictures):
        corner = (gap + place % columns * (side + gap), gap + place // columns * (side + gap))
        canvas.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), corner)
    return canvas
