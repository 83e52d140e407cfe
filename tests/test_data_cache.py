"""The tensor cache: computed once, whole or absent, mended when damaged."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from studio.data.cache import TensorCache, cache_key
from studio.errors import StudioError

KEY = cache_key("picture", b"vae", "512x512")


class Compute:
    """Counts how often it is asked."""

    def __init__(self, value: dict[str, Tensor] | None = None) -> None:
        self.calls = 0
        self.value = value or {
            "latents": torch.arange(6.0).reshape(2, 3).T,
            "half": torch.ones(2, dtype=torch.bfloat16),
        }

    def __call__(self) -> dict[str, Tensor]:
        self.calls += 1
        return self.value


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_keys_depend_on_every_part_and_its_bounds() -> None:
    keys = [cache_key(*parts) for parts in [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), (b"ab", b"d")]]
    assert len(set(keys)) == len(keys) and cache_key("ab") == cache_key(b"ab")


def test_computes_once_across_caches(tmp_path: Path) -> None:
    compute = Compute()
    first = TensorCache(tmp_path).get(KEY, compute)
    second = TensorCache(tmp_path).get(KEY, compute)
    assert compute.calls == 1 and equal(first, second) and equal(first, compute.value)
    second["latents"].add_(1)  # an entry in hand is the caller's own
    assert equal(TensorCache(tmp_path).get(KEY, compute), first)
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [f"{KEY[:2]}/{KEY[2:4]}/{KEY}.safetensors"]


def test_what_is_not_to_be_kept_is_only_read(tmp_path: Path) -> None:
    compute, cache = Compute(), TensorCache(tmp_path)
    assert equal(cache.get(KEY, compute, keep=False), compute.value) and not list(tmp_path.iterdir())
    cache.get(KEY, compute)
    assert equal(cache.get(KEY, compute, keep=False), compute.value) and compute.calls == 2


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[:-1], lambda d: bytes(len(d)), lambda d: b"\xff" * 99])
def test_damaged_entry_is_computed_again(tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture) -> None:
    cache, compute = TensorCache(tmp_path), Compute()
    cache.get(KEY, compute)
    path = cache.path(KEY)
    path.write_bytes(damage(path.read_bytes()))
    assert equal(cache.get(KEY, compute), compute.value) and compute.calls == 2
    assert f"{KEY}.safetensors is damaged" in caplog.text
    assert equal(cache.get(KEY, compute), compute.value) and compute.calls == 2


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TensorCache(tmp_path)
    with pytest.raises(ZeroDivisionError):
        cache.get(KEY, lambda: {"x": torch.ones(1 // 0)})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(StudioError, match="Cannot write to the cache .*No space left"):
        cache.get(KEY, Compute())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_entry_appears_whole(tmp_path: Path) -> None:
    """Readers and writers of one entry at the same time never see part of it."""
    value = {"x": torch.arange(200_000)}

    def once(_: int) -> bool:
        return equal(TensorCache(tmp_path).get(KEY, Compute(value)), value)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(once, range(64)))


def test_only_cache_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a cache key"):
        TensorCache(tmp_path).get("../x", Compute())
