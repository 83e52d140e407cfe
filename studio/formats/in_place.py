"""A safetensors file whose tensors are changed where they lie: names, order and dtypes stay, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from studio.errors import ConfigError
from studio.formats.files import opened

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class TensorFile:
    """The floating-point tensors of a file by key, read and written in rows. Raises ConfigError for a damaged file."""

    def __init__(self, path: Path) -> None:
        if path.suffix != ".safetensors":
            raise ConfigError(f"{path} is no .safetensors file: only such a checkpoint can be read tensor by tensor")
        with opened(path):  # checks the header
            self.path = path
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        self._start = 8 + size
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._entries: dict[str, dict] = header

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._entries[key]["shape"])

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """Some rows of a tensor, or all of it. Raises ConfigError for a dtype without fractions (a packed weight)."""
        entry = self._entries[key]
        if entry["dtype"] not in _DTYPES:
            raise ConfigError(f"{self.path}: {key} is stored as {entry['dtype']}, not as floating-point numbers")
        length, begin, row_bytes, rest = self._rows(key, rows)
        with self.path.open("rb") as file:
            file.seek(begin)
            data = bytearray(file.read(length * row_bytes))
        return torch.frombuffer(data, dtype=_DTYPES[entry["dtype"]]).reshape(length, *rest)

    def write(self, key: str, tensor: Tensor, rows: slice | None = None) -> None:
        """Replaces these rows by `tensor`, which has what `read` gives in shape and dtype."""
        length, begin, row_bytes, _ = self._rows(key, rows)
        data = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        if len(data) != length * row_bytes:
            raise ValueError(f"{len(data)} bytes for {length * row_bytes} of {key}")
        with self.path.open("r+b") as file:
            file.seek(begin)
            file.write(data)

    def _rows(self, key: str, rows: slice | None) -> tuple[int, int, int, list[int]]:
        """(rows, place of the first byte, bytes of a row, shape of a row)."""
        begin, end = self._entries[key]["data_offsets"]
        count, *rest = self._entries[key]["shape"]
        first, last, _ = (rows or slice(None)).indices(count)
        row_bytes = (end - begin) // count
        return last - first, self._start + begin + first * row_bytes, row_bytes, rest


def copy_with_metadata(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """Copies a file under other metadata: the same tensors in the same order."""
    with source.open("rb") as original, target.open("wb") as copy:
        header = json.loads(original.read(int.from_bytes(original.read(8), "little")))
        text = json.dumps({"__metadata__": dict(metadata), **_without_metadata(header)}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # safetensors aligns what follows
        copy.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(original, copy, 1 << 24)


def _without_metadata(header: dict[str, dict]) -> dict[str, dict]:
    return {key: entry for key, entry in header.items() if key != "__metadata__"}
