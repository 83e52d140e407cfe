"""`python -m assets.build`: every file of `assets/` from the packages, seeded and resumable."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from assets.build import pictures as source
from assets.build.demo_set import write_demo_set
from assets.build.text_to_image import assemble, train_text_to_image
from assets.build.tokenizer import train_tokenizer
from assets.build.vae import train_vae

HERE = Path(__file__).resolve().parents[1]


def vae_pool(folders: dict[str, Path], noto: list[source.Picture]) -> np.ndarray:
    """(N, 64, 64, 3) uint8: Noto with its variants, and line drawings, without what is held out."""
    shown = [picture.pixels for picture in noto if not picture.held_out]
    lines = [picture.pixels for picture in source.fluent(folders) if not picture.held_out]
    return np.stack(shown * 2 + source.noto_variants(folders) + lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".build"), help="packages and checkpoints")
    parser.add_argument("--vae-steps", type=int, default=4500)
    parser.add_argument("--unet-steps", type=int, default=4600)
    options = parser.parse_args()
    torch.set_flush_denormal(True)  # a trained autoencoder's tiny gradients are ten times slower as denormals
    folders = source.fetch(options.work)
    write_demo_set(folders, HERE / "demo")
    noto = source.noto(folders)
    held_out = [picture for picture in noto if picture.held_out]
    print(f"{len(noto)} Noto pictures, {len(source.concepts(noto))} concepts, {len(held_out)} held out", flush=True)
    vae = train_vae(vae_pool(folders, noto), held_out, options.work, steps=options.vae_steps)
    words = [p.name for p in noto] * 2 + [keyword for p in noto for keyword in p.keywords]
    tokenizer = train_tokenizer(words, HERE / "base" / "tokenizer")
    learned = train_text_to_image(vae, tokenizer, source.concepts(noto), noto, options.work, steps=options.unet_steps)
    pipeline = assemble(vae, learned["text_encoder"], learned["unet"], tokenizer)
    pipeline.to(dtype=torch.float16).save_pretrained(HERE / "base")


if __name__ == "__main__":
    main()
