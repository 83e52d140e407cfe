"""Is the built-in base good? `python -m benchmarks.base_quality [--work DIR] [--out DIR]`.

Three measures: the autoencoder on pictures it never saw (dB); for 200 captions drawn by a fixed
seed, whether the generated picture's nearest neighbour among all Noto pictures is the right one
(blurred pixel distance); and a sheet of twelve well-known prompts for a person to look at. The
whole sheet of 200 is drawn too, wrong ones framed in red.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from assets.build import pictures as source
from assets.build.similarity import blurred, nearest
from assets.build.text_to_image import WELL_KNOWN
from assets.build.vae import psnr, reconstruct, to_tensor
from benchmarks.drawing import draw, grid
from benchmarks.report import end
from studio.families.loading import load_base

CAPTIONS, SEED = 200, 2026


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".build"), help="where the picture packages are or go")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    options = parser.parse_args()
    noto = source.noto(source.fetch(options.work))
    concepts = [picture.name for picture in source.concepts(noto)]
    family, models = load_base("builtin")
    unseen = np.stack([picture.pixels for picture in noto if picture.held_out])
    quality = psnr(reconstruct(models.parts["vae"], unseen), to_tensor(unseen))
    captions = [concepts[i] for i in np.random.default_rng(SEED).choice(len(concepts), CAPTIONS, replace=False)]
    drawn = draw(family, models, captions, seed=SEED)
    found = nearest(blurred(drawn), blurred(np.stack([picture.pixels for picture in noto])))
    right = torch.tensor([noto[int(i)].name == caption for i, caption in zip(found, captions, strict=True)])
    options.out.mkdir(parents=True, exist_ok=True)
    grid(_framed(drawn, right), columns=20).save(options.out / "base_200_captions.png", optimize=True)
    grid(draw(family, models, list(WELL_KNOWN), seed=0), columns=6, scale=2).save(options.out / "base_well_known.png")
    wrong = [f"{c} -> {noto[int(i)].name}" for c, i, r in zip(captions, found, right, strict=True) if not r]
    print("wrong:", "; ".join(wrong), file=sys.stderr)
    result = {
        "vae_psnr_db_mean": round(quality.mean().item(), 2),
        "vae_psnr_db_of_mean_error": round(-10 * torch.log10((10 ** (-quality / 10)).mean()).item(), 2),
        "vae_held_out_pictures": len(unseen),
        "concepts": len(concepts),
        "captions": CAPTIONS,
        "right": round(right.float().mean().item(), 4),
    }
    end(result, at_least={"vae_psnr_db_mean": 25, "concepts": 1000, "right": 0.9}, at_most={})


def _framed(pictures: np.ndarray, right: torch.Tensor) -> np.ndarray:
    """(N, 64, 64, 3) with a red frame around the wrong ones."""
    framed = []
    for picture, is_right in zip(pictures, right, strict=True):
        image = Image.fromarray(picture)
        if not is_right:
            ImageDraw.Draw(image).rectangle((0, 0, 63, 63), outline="red", width=2)
        framed.append(np.asarray(image))
    return np.stack(framed)


if __name__ == "__main__":
    main()
