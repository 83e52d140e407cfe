"""Tensors that are costly to compute and never change (latents, text embeddings), kept on disk by their content.

One safetensors file an entry. Runs and processes may share a folder: an entry appears whole or not at all, and
two processes that compute the same one write the same bytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from studio.errors import StudioError

log = logging.getLogger(__name__)


def cache_key(*parts: str | bytes) -> str:
    """SHA-256, in hex, of everything an entry depends on: the picture's id, the VAE's hash, the size, ...

    Each part goes in with its length, so that ("ab", "c") and ("a", "bc") differ.
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


class TensorCache:
    """Entries below `folder`, as `ab/cd/abcd....safetensors`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """The file of `key`, whether or not it exists. `key` comes from `cache_key`."""
        if len(key) != 64 or not set(key) <= set("0123456789abcdef"):
            raise ValueError(f"not a cache key: {key!r}")
        return self.folder / key[:2] / key[2:4] / f"{key}.safetensors"

    def get(self, key: str, compute: Callable[[], dict[str, Tensor]], keep: bool = True) -> dict[str, Tensor]:
        """The entry of `key`, computed if it is missing or damaged, and then kept where `keep`. Tensors are on
        the CPU, the same bits whether computed or read. Raises StudioError when the entry cannot be written."""
        path = self.path(key)
        try:
            return load(path.read_bytes())
        except FileNotFoundError:
            pass
        except (SafetensorError, OSError) as error:
            log.warning("cache entry %s is damaged (%s): computing it again", path, error)
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()})
        if keep:
            self._write(path, data)
        return load(data)

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError as error:
            raise StudioError(f"Cannot write to the cache {self.folder}: {error}. Free space or use another") from error
        finally:
            temporary.unlink(missing_ok=True)
