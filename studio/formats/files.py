"""Files of tensors, from anywhere: safetensors, and pickles without running their code.

A file is read as it is, or refused with a ConfigError. Reading takes no more memory than twice the file's size
and 16 MiB, whatever the file says of itself: safetensors maps a file into memory, but an absurd header would be
parsed into many times its size, so headers out of all proportion are refused first.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from studio.errors import ConfigError
from studio.formats.pickled import ENDINGS, Pickle

_FREE_HEADER, _HEADER_SHARE = 4 << 20, 8
"""A header may have so many bytes, or this fraction of the file."""
_FREE_TENSORS, _TENSOR_BYTES = 1 << 14, 1 << 10
"""A file may have so many tensors, or one for each so many bytes."""
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by key, in the file's order, and metadata.

    Raises ConfigError for a file that cannot be read, and for tensors that no adapter has: empty ones, complex and
    packed numbers, fp8 (which torch cannot compute with), and values that are not finite.
    """
    with opened(path) as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    _refuse(path, tensors, (key for key, one in tensors.items() if not one.numel()), "are empty")
    strange = (key for key, one in tensors.items() if one.dtype not in _FLOATS | _INTEGERS)
    _refuse(path, tensors, strange, "have numbers that adapters do not have", "Save it in fp16, bf16 or fp32")
    broken = (key for key, one in tensors.items() if not _is_finite(one))
    fix = "Such an adapter gives black pictures; its training has diverged, take an earlier checkpoint"
    _refuse(path, tensors, broken, "have values that are not finite (NaN or infinite)", fix)
    return tensors, metadata


def _refuse(path: Path, tensors: Mapping[str, Tensor], keys: Iterable[str], what: str, fix: str = "") -> None:
    if keys := list(keys):
        named = ", ".join(f"{key} ({str(tensors[key].dtype).removeprefix('torch.')})" for key in keys[:5])
        raise ConfigError(
            f"{len(keys)} of the {len(tensors)} tensors in {path} {what}: {named}. {fix}".rstrip(". ") + "."
        )


def _is_finite(tensor: Tensor) -> bool:
    """By the smallest and the largest value, which any NaN becomes: no temporary of the tensor's size."""
    return tensor.dtype in _INTEGERS or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def load_keys(path: Path) -> list[str]:
    """The keys of a file, in its order, from its header alone; errors as for `load_tensors`."""
    with opened(path) as file:
        return list(file.keys())


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """safetensors' reader of a file, or one like it of a pickle; its errors, then and later, become ConfigError."""
    if path.suffix in ENDINGS:
        yield Pickle(path)
        return
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is not a .safetensors file, nor one of {', '.join(ENDINGS)}")
    try:
        header = _header(path)
        with safe_open(path, framework="pt") as file:
            if header.count(b'"data_offsets"') != len(file.keys()):
                _refuse_twice(path, header)
            del header
            yield file
    except (SafetensorError, OSError) as problem:
        raise ConfigError(f"{path} cannot be read: {problem}. The file may be incomplete; copy it again.") from problem


def _header(path: Path) -> bytes:
    """The JSON of a file, raw, once it is of a size that a file like this can have."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > max(_FREE_HEADER, size // _HEADER_SHARE):
            raise ConfigError(f"{path} cannot be read: it announces a header of {length} bytes, in a file of {size}")
        header = file.read(length)
    if header.count(b"{") > max(_FREE_TENSORS, size // _TENSOR_BYTES):
        raise ConfigError(f"{path} cannot be read: its header names too many tensors for a file of {size} bytes")
    return header


def _refuse_twice(path: Path, header: bytes) -> None:
    """Raises ConfigError for names that come twice in an object: readers differ in which they take."""
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> None:
        twice.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)

    json.loads(header, object_pairs_hook=collect)
    if twice:
        raise ConfigError(f"{path} names {len(twice)} tensors twice: {', '.join(twice[:5])}. Make the file again.")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(apart(tensors), partial, dict(metadata))
    os.replace(partial, path)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous, and no two in the same memory (factors of a fused layer)."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, tensor in tensors.items():
        whole = tensor.contiguous()
        found[key] = whole.clone() if whole.data_ptr() in taken else whole
        taken.add(whole.data_ptr())
    return found
