"""Reading and writing safetensors files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from studio.errors import ConfigError


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by key, in the file's order, and metadata. Raises ConfigError for a file that cannot be read."""
    with opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def load_keys(path: Path) -> list[str]:
    """The keys of a file, in its order, from its header alone; errors as for `load_tensors`."""
    with opened(path) as file:
        return list(file.keys())


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """safetensors' reader of a file; its errors, then and later, become ConfigError."""
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is not a .safetensors file; files of other kinds can run code when opened")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as problem:
        raise ConfigError(f"{path} cannot be read: {problem}. The file may be incomplete; copy it again.") from problem


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, dict(metadata))
    os.replace(partial, path)
