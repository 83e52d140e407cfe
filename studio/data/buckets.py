"""Aspect-ratio buckets (NovelAI, 2022): pictures of like shape train together, with little cropped away.

A bucket is a (width, height) in pixels, both multiples of a step, with an area of at most resolution^2, so that
no batch needs more memory than a square one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from studio.data.decode import open_rgb
from studio.data.images import ImageItem
from studio.errors import ConfigError, DatasetError
from studio.seeds import sample_generator

Size = tuple[int, int]  # (width, height) in pixels
Buckets = dict[Size, list[ImageItem]]


@dataclass(frozen=True)
class Pixels:
    """`tensor` (3, H, W) float32 in [-1, 1]. `original_size` (height, width) and `crop_top_left` (top, left),
    the latter in pixels after resizing, are SDXL's micro-conditioning (arXiv:2307.01952, section 2.2)."""

    tensor: Tensor
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]


def bucket_sizes(resolution: int, step: int, max_aspect: float) -> list[Size]:
    """All buckets: for each side, the longest other side that keeps area <= resolution^2 and the longer side
    <= max_aspect times the shorter. Raises ConfigError."""
    if resolution < step or resolution % step:
        near = max(step, round(resolution / step) * step)
        raise ConfigError(f"resolution {resolution} is not a multiple of {step} pixels: use {near}")
    if max_aspect < 1:
        raise ConfigError(f"the largest aspect ratio {max_aspect} is below 1: use 1 for squares only, or for example 2")
    sizes = set()
    for short in range(step, resolution + 1, step):
        long = resolution**2 // short // step * step
        if long <= max_aspect * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def kept_fraction(width: int, height: int, size: Size) -> float:
    """How much of a width x height picture a centre crop to the shape of `size` keeps, in (0, 1]."""
    a, b = width * size[1], height * size[0]
    return min(a, b) / max(a, b)


def assign_buckets(items: Iterable[ImageItem], resolution: int, step: int = 64, max_aspect: float = 2.0) -> Buckets:
    """Each picture in the bucket that crops least of it; the larger one of equals. Buckets without pictures are
    absent. `step` is 64 for Stable Diffusion; the built-in 64-pixel base takes 8. Raises ConfigError."""
    sizes = bucket_sizes(resolution, step, max_aspect)
    buckets: Buckets = {}
    for item in items:
        best = max(sizes, key=lambda s: (kept_fraction(item.width, item.height, s), s[0] * s[1]))
        buckets.setdefault(best, []).append(item)
    return dict(sorted(buckets.items()))


def bucket_report(buckets: Buckets) -> str:
    """A line a bucket: pictures, how much the crop loses at most, and how many pictures are enlarged."""
    lines = []
    for size, items in buckets.items():
        lost = max(1 - kept_fraction(item.width, item.height, size) for item in items)
        enlarged = sum(item.width < size[0] or item.height < size[1] for item in items)
        line = f"{size[0]}x{size[1]}: {len(items)} picture{'s' * (len(items) != 1)}, cropped by {lost:.0%} at most"
        lines.append(line + (f", {enlarged} smaller than the bucket and enlarged" if enlarged else ""))
    return "\n".join(lines)


def bucket_batches(buckets: Buckets, batch_size: int, seed: int, epoch: int) -> list[list[ImageItem]]:
    """The batches of an epoch, a function of the arguments only: each picture exactly `repeats` times, each batch
    from one bucket, its last one possibly short.

    A bucket is dealt in passes, so that a picture comes again only after all others of its bucket had their turn.
    """
    batches = []
    for (width, height), items in sorted(buckets.items()):
        generator = sample_generator(seed, "bucket", width, height, epoch)
        order: list[ImageItem] = []
        for turn in range(max((item.repeats for item in items), default=0)):
            order += _shuffled([item for item in items if item.repeats > turn], generator)
        batches += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return _shuffled(batches, sample_generator(seed, "batches", epoch))


def load_pixels(item: ImageItem, size: Size) -> Pixels:
    """The picture scaled to cover `size` = (width, height) with the Lanczos filter, and cropped at the centre.

    Raises DatasetError when the file has changed since it was scanned.
    """
    try:
        image = open_rgb(item.path)
    except Exception as error:  # Pillow's decoders raise whatever their parsing ran into
        raise DatasetError(f"{item.path} could be read when the run began, and now cannot: {error}") from error
    width, height = size
    scale = max(width / image.width, height / image.height)
    top, left = round((image.height * scale - height) / 2), round((image.width * scale - width) / 2)
    fitted = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    tensor = torch.from_numpy(np.array(fitted, dtype=np.float32)).permute(2, 0, 1).contiguous() / 127.5 - 1
    return Pixels(tensor, (image.height, image.width), (top, left))


def _shuffled(things: list, generator: torch.Generator) -> list:
    return [things[i] for i in torch.randperm(len(things), generator=generator).tolist()]
