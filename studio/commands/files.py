"""`studio check`, `inspect` and `convert`: who reads an adapter file, what is in it, and other layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from studio.commands.flags import Json
from studio.errors import ConfigError, StudioError
from studio.terminal import BUILTIN_ONLY, emit

FILE_HELP = "A .safetensors file, a peft or diffusers folder, or a hub id."
MODEL_HELP = "The base it is for; without it, the one it was trained on, or the family's published one."
OUTPUT_HELP = "The new file, or folder for peft. (default NAME-LAYOUT in the current folder)"
File = Annotated[str, typer.Argument(metavar="FILE", help=FILE_HELP)]
SHOWN = 5  # keys a report names before it counts the rest


def check(
    file: File, model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None, as_json: Json = False
) -> None:
    """Say which tools load a file, and which of its keys they would not use.

    Ends with 1 when no tool uses all keys.
    """
    from studio.families import FAMILIES
    from studio.families.base import DiffusionFamily
    from studio.families.loading import load_base
    from studio.formats import adapter_path, read_adapter
    from studio.formats.consumers import check_file

    state = read_adapter(file)
    family = FAMILIES.get(state.family)
    if not isinstance(family, DiffusionFamily):
        raise ConfigError(f"'{file}' is for the family '{state.family}'; known are {', '.join(FAMILIES)}")
    base = model or _own_base(state.metadata)
    reports = check_file(adapter_path(file), family, load_base(base)[1] if base else None)
    lines = []
    for report in reports:
        lines.append(f"{report.consumer:<18}uses {report.used} of {report.total} keys")
        lines += [f"  not used: {key}" for key in report.unused[:SHOWN]]
        if len(report.unused) > SHOWN:
            lines.append(f"  and {len(report.unused) - SHOWN} more (--json lists all)")
    if base == "builtin":
        lines.append(BUILTIN_ONLY)
    emit({"file": file, "family": state.family, "consumers": reports}, "\n".join(lines), as_json)
    if all(report.unused for report in reports):
        raise typer.Exit(StudioError.exit_code)


def _own_base(metadata: Mapping[str, str]) -> str | None:
    """The base that a file of ours names, where it is at hand and may differ from the published one."""
    source = json.loads(metadata.get("studio.config", "{}")).get("model", {}).get("source", "")
    return source if source == "builtin" or (Path(source).is_absolute() and Path(source).exists()) else None


def inspect(file: File, as_json: Json = False) -> None:
    """Say what is in a file: method, family, layers, ranks, metadata."""
    from studio.formats.describe import describe_adapter

    facts = describe_adapter(file)
    lines = [f"{name:<12}{_line(value)}" for name, value in facts.items() if name != "metadata"]
    lines += [f"  {key}: {value}" for key, value in sorted(facts["metadata"].items())]
    emit(facts, "\n".join(lines), as_json)


def _line(value: Any) -> str:
    """Counts as "16 (64), 8 (2)"."""
    return ", ".join(f"{key} ({count})" for key, count in value.items()) if isinstance(value, dict) else str(value)


def _default_output(source: str, layout: str) -> Path:
    """Where `convert` writes when no output is named: `demo.safetensors` as `demo-diffusers.safetensors`."""
    return Path(f"{Path(source).name.removesuffix('.safetensors')}-{layout}")


def convert(
    file: File,
    to: Annotated[Literal["kohya", "diffusers", "peft"], typer.Option(help="The layout to write.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help=OUTPUT_HELP)] = None,
    as_json: Json = False,
) -> None:
    """Write an adapter in another layout; the source stays as it is."""
    from studio.formats import read_adapter, write_adapter

    output = output or _default_output(file, to)
    target = output if to == "peft" else output.with_name(output.name.removesuffix(".safetensors") + ".safetensors")
    if target.exists():
        raise ConfigError(f"'{target}' exists already: choose another name, or remove it first")
    written = write_adapter(read_adapter(file), target, to)
    emit({"file": written, "format": to}, str(written), as_json)
