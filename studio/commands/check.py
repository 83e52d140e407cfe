"""`studio check`: which tools load an adapter file whole, and how far each would be off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from studio.commands.files import File
from studio.commands.flags import Json
from studio.errors import ConfigError, StudioError
from studio.terminal import BUILTIN_ONLY, emit

if TYPE_CHECKING:
    from studio.families.base import ModelFamily, Models
    from studio.formats import AdapterState
    from studio.formats.consumers import ConsumerReport

BASE_HELP = "The base it is for; without it, the one it was trained on, or the names and shapes of the published one."
FOR_HELP = "The tool that has to use all: diffusers, sd-scripts, comfyui, a1111, forge, peft, lycoris, lycoris-merge."
SHOWN = 5  # keys a report names before it counts the rest


def check(
    file: File,
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    tool: Annotated[str | None, typer.Option("--for", metavar="TOOL", help=FOR_HELP)] = None,
    as_json: Json = False,
) -> None:
    """Say which tools load a file, which of its keys they would not use, and how far their weights would be off.

    Ends with 1 where the tool of --for would not use all of it, or would be off by more than a thousandth;
    without --for, where no tool uses all of it.
    """
    from studio.formats import adapter_path
    from studio.formats.consumers import check_file, consumer_named

    asked = None if tool is None else consumer_named(tool)
    state = _state(file, needed=base is None)
    if state and not state.tensors:
        raise ConfigError(f"'{file}' holds trained tokens alone: tools read it as an embedding, under the token's name")
    source = base or (_own_base(state.metadata) if state else None)
    family, models = _base(state.family if state else None, source)
    reports = check_file(adapter_path(file), family, models)
    problem = next(iter(reports.values())).problem
    text = "\n".join([*_table(reports, asked), *([f"What the file means is not known: {problem}"] if problem else [])])
    result = {"file": file, "family": family.name, "base": source, "consumers": reports}
    emit(result, f"{text}\n{BUILTIN_ONLY}" if source == "builtin" else text, as_json)
    if not (reports[asked].faithful if asked else any(not report.unused for report in reports.values())):
        raise typer.Exit(StudioError.exit_code)


def _state(file: str, needed: bool) -> AdapterState | None:
    """What is in the file; None where we cannot read it, unless that is `needed` to know its family."""
    from studio.formats import read_adapter

    try:
        return read_adapter(file)
    except ConfigError:
        if needed:
            raise
        return None


def _own_base(metadata: Mapping[str, str]) -> str | None:
    """The base that a file of ours names, where it is at hand and may differ from the published one."""
    from studio.formats.card import base_of

    source = base_of(metadata)
    return source if source == "builtin" or (Path(source).is_absolute() and Path(source).exists()) else None


def _base(name: str | None, source: str | None) -> tuple[ModelFamily, Models | None]:
    """The file's family, and the base's models where there is a base. Raises ConfigError for one of another family."""
    from studio.families import FAMILIES, DiffusionFamily
    from studio.families.loading import load_base

    family = FAMILIES[name] if name else None
    if source is None:
        assert family is not None
        return family, None
    if family is not None and not isinstance(family, DiffusionFamily):
        return family, family.load(source)
    found, models = load_base(source)
    if family is not None and found is not family:
        raise ConfigError(f"the file is for the family '{name}', and the base {source} is of the family '{found.name}'")
    return found, models


def _table(reports: Mapping[str, ConsumerReport], asked: str | None) -> Iterator[str]:
    """One line for each tool, or for the one that is `asked` for, with the details below it."""
    chosen = [report for name, report in reports.items() if asked in (None, name)]
    rows = [("tool", "keys used", "weights"), *((one.consumer, _count(one), _weights(one)) for one in chosen)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row, details in zip(rows, [[], *map(_details, chosen)], strict=True):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        yield from (f"    {detail}" for detail in details)


def _count(report: ConsumerReport) -> str:
    return f"{report.used:>{len(str(report.total))}} of {report.total}"


def _weights(report: ConsumerReport) -> str:
    if report.used == 0:
        return "unchanged"
    if report.error is None:
        return "not known" if report.problem else "not known without --base"
    return "exact" if report.error == 0 else f"off by {100 * report.error:.2g}%"


def _details(report: ConsumerReport) -> list[str]:
    """Where a tool is off most, what it does differently, and the first keys that it does not use."""
    lines = [f"most at {report.layer}"] if report.layer else []
    lines += report.notes
    if 0 < report.used < report.total:
        lines += [f"not used: {key}" for key in report.unused[:SHOWN]]
        if len(report.unused) > SHOWN:
            lines.append(f"and {len(report.unused) - SHOWN} more (--json lists all)")
    return lines
