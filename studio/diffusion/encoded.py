"""A picture dataset as the denoiser needs it: latents and text embeddings, encoded once and cached.

Entries are keyed by content: the picture's bytes, size and mirroring, the VAE's weights and the scale
of its latents; the caption's tokens, and the text encoders' weights. Runs share them, and an edited
caption encodes one caption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from studio.data.buckets import Size, load_pixels
from studio.data.cache import TensorCache, cache_key
from studio.data.images import ImageItem
from studio.families.base import Conditioning, DiffusionFamily, Models, latent_statistics


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's weights, names and dtypes included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class Encoded:
    """`latents` (C, h, w), scaled; `sizes` (6,) pixels: original, crop and target, SDXL's micro-conditioning."""

    latents: Tensor
    sizes: Tensor


class EncodedImages:
    """Latents of pictures, from the cache or the VAE."""

    def __init__(self, family: DiffusionFamily, models: Models, cache: TensorCache) -> None:
        self._family = family
        self._models = models
        self._cache = cache
        self._vae = [fingerprint(models.parts["vae"]), *map(str, latent_statistics(models))]

    def get(self, item: ImageItem, size: Size, flip: bool = False) -> Encoded:
        """One picture in its bucket `size` (width, height), mirrored where `flip`."""
        key = cache_key("latents", *self._vae, item.id, f"{size[0]}x{size[1]}", "flipped" if flip else "")
        entry = self._cache.get(key, lambda: self._encode(item, size, flip))
        return Encoded(entry["latents"], entry["sizes"])

    def _encode(self, item: ImageItem, size: Size, flip: bool) -> dict[str, Tensor]:
        pixels = load_pixels(item, size)
        image = pixels.tensor.flip(-1) if flip else pixels.tensor
        latents = self._family.encode_image(self._models, image.unsqueeze(0))[0].float()
        sizes = torch.tensor([*pixels.original_size, *pixels.crop_top_left, size[1], size[0]])
        return {"latents": latents, "sizes": sizes}


class EncodedPrompts:
    """Text embeddings of captions while no text encoder is trained, from the cache or the encoders."""

    def __init__(self, family: DiffusionFamily, models: Models, cache: TensorCache) -> None:
        self._family = family
        self._models = models
        self._cache = cache
        encoders = [name for name in models.parts if name.startswith("text_encoder")]
        self._encoders = [fingerprint(models.parts[name]) for name in encoders]

    def get(self, captions: Iterable[str], keep: bool = True) -> Conditioning:
        """Conditioning of a batch, rows in the order of `captions`; what had to be computed goes into the
        cache where `keep`: not for captions that hardly come again, as shuffled ones do."""
        rows = [self._one(caption, keep) for caption in captions]
        pooled = [row["pooled"] for row in rows if "pooled" in row]
        hidden = torch.stack([row["hidden"] for row in rows])  # (B, tokens, width)
        return Conditioning(hidden, torch.stack(pooled) if pooled else None)

    def _one(self, caption: str, keep: bool) -> dict[str, Tensor]:
        tokens = self._family.tokenize(self._models, [caption])
        ids = [own.numpy().tobytes() for own in tokens.values()]
        key = cache_key("text", self._family.name, *self._encoders, *ids)
        return self._cache.get(key, lambda: self._encode(tokens), keep)

    @torch.no_grad()
    def _encode(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        encoded = self._family.encode_tokens(self._models, tokens)
        entry = {"hidden": encoded.encoder_hidden_states[0]}
        if encoded.pooled is not None:
            entry["pooled"] = encoded.pooled[0]
        return entry
