"""`studio methods`: the adapter methods, where they sit, and their own settings."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import MISSING, fields
from typing import Annotated, Any

import typer

from studio.commands.flags import Json
from studio.errors import ConfigError, nearest
from studio.terminal import emit


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="METHOD", help="One method, with its whole description.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the adapter methods: what each computes, the layers it can sit on, its options."""
    from studio.adapters import METHODS

    if name is not None and name not in METHODS:
        raise ConfigError(f"unknown method '{name}'.{nearest(name, METHODS)} Methods: {', '.join(METHODS)}")
    chosen = [name] if name else list(METHODS)
    files = Counter(method.__module__ for method in METHODS.values())
    described = [_describe(METHODS[one], files[METHODS[one].__module__], whole=name is not None) for one in chosen]
    emit({"methods": described}, "\n\n".join(map(_text, described)), as_json)


def _describe(method: Any, siblings: int, whole: bool) -> dict[str, Any]:
    """`about` is the first line of the method's file (its class's, where a file has several), or all there is."""
    module, own = inspect.cleandoc(inspect.getmodule(method).__doc__ or ""), inspect.getdoc(method) or ""  # type: ignore[union-attr]
    parts = [module, own, inspect.getdoc(method.Options) if fields(method.Options) else None]
    first = module if siblings == 1 else own
    return {
        "name": method.method,
        "about": "\n\n".join(part for part in parts if part) if whole else first.splitlines()[0],
        "layers": sorted(method.kinds),
        "options": {
            field.name: None if field.default is MISSING else field.default for field in fields(method.Options)
        },
    }


def _text(described: dict[str, Any]) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in described["options"].items()) or "none"
    return "\n".join(
        [
            described["name"],
            *(f"  {line}".rstrip() for line in described["about"].splitlines()),
            f"  layers:  {', '.join(described['layers'])}",
            f"  options: {options}",
        ]
    )
