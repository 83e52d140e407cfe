"""Adapter files: one hub type, `AdapterState`; each format reads and writes it.

A new format is one module with `recognises`, `has_name`, `objection`, `read` and `write`, and its place in
`FORMATS`.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from studio.errors import ConfigError, nearest
from studio.formats import comfyui, diffusers, embeddings, kohya, lycoris, onetrainer, peft
from studio.formats.files import load_keys
from studio.formats.hub import locate
from studio.formats.reading import Entries
from studio.formats.state import AdapterState
from studio.outputs import adapter_file

FORMATS: dict[str, ModuleType] = {
    "onetrainer": onetrainer,
    "lycoris": lycoris,
    "comfyui": comfyui,
    "peft": peft,
    "diffusers": diffusers,
    "kohya": kohya,
    "embedding": embeddings,
}
"""In the order in which a file is tried for them: those with prefixes of their own come first, the widest last."""
_WITH_EMBEDDINGS = ("kohya", "comfyui", "lycoris", "onetrainer", "embedding")
_BAKE = "bake it into a LoRA or a full difference (studio convert --bake lora, or diff)"

__all__ = [
    "FORMATS",
    "AdapterState",
    "adapter_path",
    "check_format",
    "check_layers",
    "format_of",
    "read_adapter",
    "write_adapter",
]


def read_adapter(source: str | Path) -> AdapterState:
    """The adapter in a file, a folder or a hub repository, whatever its format.

    Raises ConfigError where there is none, where several files could be meant, and for keys that are
    not understood: nothing in a file is passed over.
    """
    path = adapter_path(source)
    return FORMATS[format_of(path)].read(path)


def write_adapter(state: AdapterState, path: str | Path, format: str = "kohya") -> Path:
    """Writes the adapter and returns where: a `.safetensors` file, or a folder for "peft".

    Files are written whole or not at all. Raises ConfigError as `check_layers` does, and for trained tokens
    (`state.embeddings`) in a format that has no place for them.
    """
    check_layers(state.tensors, state.family, format)
    if state.embeddings and format not in _WITH_EMBEDDINGS:
        raise ConfigError(
            f"the format '{format}' has no place for trained tokens ({', '.join(state.embeddings)}): use one of "
            f"{', '.join(_WITH_EMBEDDINGS)}"
        )
    target = adapter_file(path, format)
    FORMATS[format].write(state, target)
    return target


def check_layers(layers: Entries, family: str, format: str) -> None:
    """Raises ConfigError for an unknown format, or where it has no names for some layers or cannot hold their methods.

    `layers` maps full layer names to what their adapters export. For before training: what this accepts,
    `write_adapter` can write.
    """
    check_format(format)
    nameless = [name for name in layers if not FORMATS[format].has_name(name, family)]
    if nameless:
        raise ConfigError(
            f"the format '{format}' has no names for {len(nameless)} of the layers: {', '.join(nameless[:5])}. "
            "Choose other targets, or another format"
        )
    if objection := FORMATS[format].objection(layers, family):
        others = ", ".join(name for name in FORMATS if name != format and _can_hold(name, layers, family))
        fix = f"use one of the formats {others}, or {_BAKE}" if others else _BAKE
        raise ConfigError(f"the format '{format}' cannot hold {objection.removesuffix('.')}: {fix}")


def check_format(name: str) -> None:
    """Raises ConfigError for an unknown format."""
    if name not in FORMATS:
        raise ConfigError(f"unknown format '{name}'.{nearest(name, FORMATS)} Formats: {', '.join(FORMATS)}")


def _can_hold(format: str, layers: Entries, family: str) -> bool:
    module = FORMATS[format]
    return all(module.has_name(name, family) for name in layers) and not module.objection(layers, family)


def adapter_path(source: str | Path) -> Path:
    """The file or PEFT folder that `source` means, local by now; see `read_adapter` for the errors."""
    path = locate(source)
    if path.is_file() or peft.folders(path):
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ConfigError(f"{path} should hold one .safetensors file or a PEFT adapter; it holds {names}: name one")
    return files[0]


def format_of(path: Path) -> str:
    """The name of the format of a file or folder, from its keys. Raises ConfigError where no format fits."""
    if path.is_dir():
        return "peft"
    keys = load_keys(path)
    for name, format in FORMATS.items():
        if format.recognises(keys):
            if name == "peft":
                raise ConfigError(f"{path} is part of a PEFT adapter: give its folder, {path.parent}")
            return name
    raise ConfigError(f"{path} is no adapter in a format known here; its first keys: {', '.join(keys[:5])}")
