"""Where the shipped files and the caches are, in a checkout and in an installed wheel alike."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = _PACKAGE / "_data" if (_PACKAGE / "_data").is_dir() else _PACKAGE.parent


def assets() -> Path:
    """The built-in base (`base/`), the demo dataset (`demo/`) and their licences."""
    return _SHIPPED / "assets"


def presets() -> Path:
    """The folder of `NAME.yaml` presets."""
    return _SHIPPED / "presets"


def home() -> Path:
    """The workspace where none is named: $STUDIO_HOME, or the current folder."""
    return Path(os.environ.get("STUDIO_HOME", ""))


def cache() -> Path:
    """What can be computed again (latents, text embeddings): $STUDIO_CACHE, or the user's cache folder."""
    if "STUDIO_CACHE" in os.environ:
        return Path(os.environ["STUDIO_CACHE"])
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(home) / "adapter-studio"
