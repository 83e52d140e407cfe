"""Where a result goes: a new file or folder, never one that is there already."""

from __future__ import annotations

from pathlib import Path

from studio.errors import ConfigError


def check_unused(path: Path) -> None:
    """Raises ConfigError for a path that exists."""
    if path.exists():
        raise ConfigError(f"'{path}' exists already: choose another name, or remove it first")


def adapter_file(path: str | Path, layout: str) -> Path:
    """The file, or PEFT's folder, that an adapter called `path` is written to in a layout."""
    name = str(path).removesuffix(".safetensors")
    return Path(name if layout == "peft" else f"{name}.safetensors")
