"""Pickled files of tensors (`.pt`, `.bin`, `.ckpt`), as `torch.save` writes them, read without running their code.

torch's weights-only loading builds tensors and plain values and nothing else. Before that, what such a file
could still do is refused: records that unpack to more than the file holds, classes beside tensors and their
storages, and a program of more steps than an adapter's has. Files of torch before 1.6, which are no archives,
are refused too.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studio.errors import ConfigError

ENDINGS = (".pt", ".pth", ".bin", ".ckpt")

_GLOBALS = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch._utils _rebuild_(tensor_v2|parameter)|torch.nn.parameter Parameter"
)
_RECORDS, _STEPS = 1 << 14, 1 << 18
"""The most records of an archive, and opcodes of its pickle: each may take some 60 bytes of memory, or 1 KiB."""


class Pickle:
    """A pickled file, with the methods of safetensors' reader. Raises ConfigError where it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _leaves(self) -> dict[str, Any]:
        """Value by key; of dicts in the dict, by "outer.inner"."""
        try:
            with self.path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                self._check(content)
            tree = torch.load(self.path, map_location="cpu", weights_only=True)
        except ConfigError:
            raise
        except OSError as problem:
            raise ConfigError(f"{self.path} cannot be read: {problem}") from problem
        except Exception as problem:  # the unpickler and the archive's reader raise whatever they come upon
            reason = str(problem).partition("\n")[0][:200] or type(problem).__name__
            raise ConfigError(f"{self.path} cannot be read: {reason}. Save it as .safetensors.") from problem
        if not isinstance(tree, Mapping):
            raise ConfigError(f"{self.path} holds a {type(tree).__name__}, not tensors by name")
        leaves: dict[str, Any] = {}
        left = self.path.stat().st_size
        for key, value in _flat(tree):
            if isinstance(value, Tensor):
                left -= value.numel() * value.element_size()
            if left < 0 or len(leaves) == _RECORDS:  # tensors that repeat a storage, or dicts that repeat a dict
                raise ConfigError(f"{self.path} cannot be read: it unpacks to more than it holds")
            leaves[key] = value.detach().contiguous() if isinstance(value, Tensor) else value
        return leaves

    def _check(self, content: mmap) -> None:
        """Raises ConfigError for an archive that could take more memory than it has bytes."""
        if sum(1 for _ in re.finditer(b"PK\x01\x02", content)) > _RECORDS:
            raise ConfigError(f"{self.path} cannot be read: it has more than {_RECORDS} records")
        if not zipfile.is_zipfile(self.path):
            raise ConfigError(f"{self.path} is not an archive of tensors by torch.save: save it as .safetensors")
        with zipfile.ZipFile(self.path) as archive:
            records = archive.infolist()
            unpacked = sum(record.file_size for record in records)
            if any(record.compress_type != zipfile.ZIP_STORED for record in records) or unpacked > len(content):
                raise ConfigError(f"{self.path} cannot be read: it unpacks to more than it holds")
            program = next((record for record in records if record.filename.endswith("/data.pkl")), None)
            if program is None or program.file_size > 16 * _STEPS:
                raise ConfigError(f"{self.path} is not an archive of tensors by torch.save: save it as .safetensors")
            self._check_program(archive.read(program))

    def _check_program(self, program: bytes) -> None:
        """Raises ConfigError for a pickle that makes other things than tensors in dicts."""
        for step, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if step > _STEPS:
                raise ConfigError(f"{self.path} cannot be read: its pickle has more than {_STEPS} steps")
            name = argument if opcode.name == "GLOBAL" else ""
            if opcode.name == "STACK_GLOBAL" or (name and not _GLOBALS.fullmatch(str(name))):
                what = str(name).replace(" ", ".") or "objects of its own"
                raise ConfigError(
                    f"{self.path} holds more than tensors ({what[:100]}), and opening it so could run code: open it "
                    "in the tool that made it, and save it as .safetensors"
                )

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return [key for key, value in self._leaves.items() if isinstance(value, Tensor)]

    def get_tensor(self, key: str) -> Tensor:
        """One tensor."""
        return self._leaves[key]

    def get_slice(self, key: str) -> _Slice:
        """One tensor's shape, as safetensors gives it before it reads the values."""
        return _Slice(self._leaves[key])

    def metadata(self) -> dict[str, str]:
        """What else the file says: its texts and numbers, as strings."""
        plain = (str, int, float, bool)
        return {key: str(value) for key, value in self._leaves.items() if isinstance(value, plain)}


class _Slice:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)


def _flat(tree: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The values of a dict, and of the dicts in it."""
    for outer, value in tree.items():
        if isinstance(value, Mapping):
            yield from ((f"{outer}.{inner}", one) for inner, one in value.items())
        else:
            yield str(outer), value
