"""Buckets: what they promise, the batches of an epoch, and pixels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from studio.data.buckets import assign_buckets, bucket_batches, bucket_report, bucket_sizes, kept_fraction, load_pixels
from studio.data.images import ImageItem, scan_folder
from studio.errors import ConfigError, DatasetError


def item(width: int, height: int, repeats: int = 1, name: str = "a") -> ImageItem:
    return ImageItem(Path(name), "", width, height, repeats, name)


def many(count: int = 40) -> list[ImageItem]:
    draw = np.random.default_rng(0)
    sizes = draw.integers(100, 1000, (count, 2))
    return [item(int(w), int(h), int(draw.integers(1, 5)), f"{n}") for n, (w, h) in enumerate(sizes)]


@pytest.mark.parametrize(("resolution", "step", "aspect"), [(64, 8, 2.0), (512, 64, 2.0), (1024, 64, 4.0), (64, 64, 3)])
def test_sizes(resolution: int, step: int, aspect: float) -> None:
    sizes = bucket_sizes(resolution, step, aspect)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % step == height % step == 0
        assert width * height <= resolution**2 < (max(width, height) + step) * min(width, height)
        assert max(width, height) <= aspect * min(width, height)
        assert (height, width) in sizes


def test_sizes_of_sdxl() -> None:
    known = {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768), (768, 1344)}
    assert known <= set(bucket_sizes(1024, 64, 2.0))


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="resolution 500 is not a multiple of 64 pixels: use 512"):
        bucket_sizes(500, 64, 2)
    with pytest.raises(ConfigError, match="0.5 is below 1"):
        bucket_sizes(512, 64, 0.5)


def test_assignment_loses_least() -> None:
    items, sizes = many(), bucket_sizes(512, 64, 2.0)
    buckets = assign_buckets(items, 512, 64, 2.0)
    assert sorted(i.id for inside in buckets.values() for i in inside) == sorted(i.id for i in items)
    for size, inside in buckets.items():
        for i in inside:
            assert kept_fraction(i.width, i.height, size) == max(kept_fraction(i.width, i.height, s) for s in sizes)


def test_squares_and_squares_only() -> None:
    assert list(assign_buckets([item(300, 300)], 512)) == [(512, 512)]
    assert list(assign_buckets(many(), 64, 8, 1.0)) == [(64, 64)]


def test_bucket_report() -> None:
    report = bucket_report(assign_buckets([item(300, 300), item(1000, 800), item(1000, 1000)], 512, 64, 1))
    assert report == "512x512: 3 pictures, cropped by 20% at most, 1 smaller than the bucket and enlarged"


def test_epoch_sees_each_picture_repeats_times() -> None:
    items = many()
    buckets = assign_buckets(items, 512)
    batches = bucket_batches(buckets, 4, seed=1, epoch=0)
    assert Counter(i.id for batch in batches for i in batch) == {i.id: i.repeats for i in items}
    where = {i.id: size for size, inside in buckets.items() for i in inside}
    assert all(1 <= len(batch) <= 4 and len({where[i.id] for i in batch}) == 1 for batch in batches)
    short = Counter(where[batch[0].id] for batch in batches if len(batch) < 4)
    assert all(count == 1 for count in short.values())


def test_passes_keep_a_picture_from_following_itself() -> None:
    items = [item(64, 64, 3, name) for name in "abcdef"]
    batches = bucket_batches({(64, 64): items}, 3, seed=0, epoch=0)
    assert all(len({i.id for i in batch}) == 3 for batch in batches)


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    buckets = assign_buckets(many(), 512)
    first = bucket_batches(buckets, 4, seed=1, epoch=3)
    torch.rand(5)
    assert bucket_batches(dict(reversed(buckets.items())), 4, seed=1, epoch=3) == first
    assert bucket_batches(buckets, 4, seed=1, epoch=4) != first
    assert bucket_batches(buckets, 4, seed=2, epoch=3) != first


def test_load_pixels_covers_and_crops_the_centre(tmp_path: Path) -> None:
    image = np.zeros((100, 300, 3), np.uint8)
    image[:, 100:200] = 255  # the middle square is white
    Image.fromarray(image).save(tmp_path / "a.png")
    (scanned,) = scan_folder(tmp_path).items
    pixels = load_pixels(scanned, (64, 64))
    assert pixels.tensor.shape == (3, 64, 64) and pixels.tensor.dtype == torch.float32
    assert pixels.tensor.min() > 0.9 and pixels.tensor.max() <= 1
    assert pixels.original_size == (100, 300) and pixels.crop_top_left == (0, 64)
    wide = load_pixels(scanned, (96, 32))
    assert wide.tensor.shape == (3, 32, 96) and wide.crop_top_left == (0, 0)
    assert wide.tensor[:, 16, 0].tolist() == [-1, -1, -1] and wide.tensor[:, 16, 48].tolist() == [1, 1, 1]


def test_load_pixels_of_the_exact_size_changes_nothing(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    (scanned,) = scan_folder(tmp_path).items
    pixels = (load_pixels(scanned, (48, 32)).tensor + 1) * 127.5
    assert np.array_equal(pixels.round().byte().permute(1, 2, 0).numpy(), image)


def test_load_pixels_of_a_file_that_vanished(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="gone.png could be read when the run began"):
        load_pixels(item(64, 64, name=str(tmp_path / "gone.png")), (64, 64))
