"""The autoencoder: a four-level AutoencoderKL, 64 px -> 8x8 latents of 24 channels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from assets.build.pictures import Picture
from assets.build.training import train

LATENT_CHANNELS = 24
KL_WEIGHT = 5e-5  # a tenth of the Gaussian likelihood's own weight at 27 dB


def new_vae() -> AutoencoderKL:
    channels = (16, 32, 64, 128)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
    ).to(memory_format=torch.channels_last)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per picture, dB, of (B, 3, H, W) in [-1, 1]. Shape (B,)."""
    mse = ((a.clamp(-1, 1) - b) / 2).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: np.ndarray) -> Tensor:
    """Encodes and decodes (B, 64, 64, 3) uint8; returns (B, 3, 64, 64) in [-1, 1]."""
    batches = to_tensor(pixels).split(32)
    return torch.cat([vae.decode(vae.encode(batch).latent_dist.mode()).sample for batch in batches])


def _augmented(pool: np.ndarray, step: int, batch: int, seed: int) -> Tensor:
    """Pictures for one step: mirrored half of the time, colours swapped or inverted now and then."""
    rng = np.random.default_rng((seed, step))
    pixels = pool[rng.integers(len(pool), size=batch)]
    out = []
    for picture in pixels:
        if rng.random() < 0.5:
            picture = picture[:, ::-1]
        if rng.random() < 0.2:
            picture = picture[:, :, rng.permutation(3)]
        if rng.random() < 0.05:
            picture = 255 - picture
        out.append(picture)
    return to_tensor(np.stack(out)).to(memory_format=torch.channels_last)


def train_vae(
    pool: np.ndarray, held_out: list[Picture], work: Path, *, steps: int, batch: int = 16, seed: int = 0
) -> AutoencoderKL:
    """Trains on `pool` (N, 64, 64, 3) uint8; sets `scaling_factor` to 1 / std of the latents."""
    torch.manual_seed(seed)
    vae = new_vae()
    unseen = np.stack([picture.pixels for picture in held_out])

    def loss(step: int) -> Tensor:
        x = _augmented(pool, step, batch, seed)
        posterior = vae.encode(x).latent_dist
        noise = torch.Generator().manual_seed(seed * 1_000_003 + step)
        y = vae.decode(posterior.sample(noise)).sample
        error = (y - x).float() / 2
        sharp = (error.square() + 1e-4).sqrt().mean()
        kl = posterior.kl().mean() / (LATENT_CHANNELS * 64)
        return error.square().mean() + 0.05 * sharp + KL_WEIGHT * kl

    def report(step: int, ema: nn.Module) -> None:
        values = psnr(reconstruct(ema, unseen), to_tensor(unseen))
        print(f"vae step {step}: held-out PSNR {values.mean():.2f} dB over {len(values)} pictures", flush=True)
        with (work / "vae.jsonl").open("a") as log:
            log.write(json.dumps({"step": step, "psnr": round(values.mean().item(), 3)}) + "\n")

    trained = train(
        vae, loss, file=work / "vae.pt", steps=steps, lr=2e-3, ema_decay=0.998, report=report, weight_decay=0.0
    )
    latents = encode_all(trained, pool[: 64 * 24])
    trained.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return trained


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pixels: np.ndarray) -> Tensor:
    """Unscaled latent means (N, C, 8, 8) of (N, 64, 64, 3) uint8."""
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in to_tensor(pixels).split(64)])
