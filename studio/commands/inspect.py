"""`studio inspect`: what an adapter file holds, and what it changes where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from studio.commands.files import File
from studio.commands.flags import Json
from studio.errors import ConfigError
from studio.terminal import emit

if TYPE_CHECKING:
    from studio.algebra.statistics import BlockStatistics, LayerStatistics
    from studio.formats.state import AdapterState

PICTURE_HELP = "Draw norm, energy and rank of every block into this PNG."
BASE_HELP = "The base it is for: some methods change a weight by more than their file tells, such as DoRA and OFT."
_VARIANTS = {"sd_v2": "sd2", "5-medium": "sd35-medium", "5-large": "sd35-large"}  # version of the base -> its name here
_WIDEST = 100  # characters of a metadata value that the text form shows
_EXPLAINED = """\
Norm: of the change of all the block's weights, ||dW|| (Frobenius). Energy: its share of the squared norm of all.
In use: how many of a layer's ranks hold {share:.0%} of its energy, on average; `studio resize` drops the others."""


def inspect(
    file: File,
    picture: Annotated[Path | None, typer.Option(metavar="PNG", help=PICTURE_HELP)] = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help=BASE_HELP)] = None,
    as_json: Json = False,
) -> None:
    """Say what is in a file: method, layers, ranks, metadata, and how much it changes each block of the model."""
    from studio.algebra.statistics import block_statistics
    from studio.formats import adapter_path, format_of, read_adapter
    from studio.formats.describe import description

    if picture and picture.suffix.lower() != ".png":
        raise ConfigError(f"--picture writes a PNG: call it {picture.with_suffix('.png')}")
    path = adapter_path(file)
    state = read_adapter(path)
    facts = description(state, path, format_of(path))
    layers = _statistics(state, base)
    blocks = block_statistics(layers)
    if picture:
        _draw(picture, path, facts, layers)
    lines = [f"{name:<12}{_line(value)}" for name, value in facts.items() if name != "metadata" and value != {}]
    lines += ["", *_table(blocks), "", "metadata", *map(_entry, sorted(facts["metadata"].items()))]
    if picture:
        lines += ["", f"picture: {picture}"]
    emit({**facts, "blocks": blocks, "by_layer": layers}, "\n".join(lines), as_json)


def _statistics(state: AdapterState, base: str | None) -> list[LayerStatistics]:
    """Of all layers; where a method needs the layers' shapes, they are those of the published model."""
    from studio.adapters import named_targets
    from studio.algebra.bases import local_base, open_base
    from studio.algebra.statistics import ShapeView, layer_statistics
    from studio.algebra.views import base_views
    from studio.families import FAMILIES
    from studio.formats.metadata import base_version

    family = FAMILIES[state.family]
    if base is not None:
        given = open_base(local_base(base))
        if given.family != state.family:
            raise ConfigError(f"--base {base} is of the family '{given.family}', the adapter of '{state.family}'")
        return layer_statistics(state, family.roles, base_views(given, state.tensors))
    layers = layer_statistics(state, family.roles)
    if all(layer.norm is not None for layer in layers):
        return layers
    variant = _VARIANTS.get(base_version(state))
    published = family.prefixes(family.reference(variant) if variant else family.reference())
    shapes = {name: ShapeView(target) for name, target in named_targets(published).items()}
    return layer_statistics(state, family.roles, shapes)


def _draw(picture: Path, path: Path, facts: Mapping[str, Any], layers: Sequence[LayerStatistics]) -> None:
    from studio.formats.portrait import portrait

    ranks = facts["ranks"]
    rank = f" of rank {next(iter(ranks))}" if len(ranks) == 1 else " of several ranks" if ranks else ""
    subtitle = f"{facts['method']}{rank} on {sum(facts['layers'].values())} layers, family {facts['family']}"
    picture.parent.mkdir(parents=True, exist_ok=True)
    portrait(layers, path.name, subtitle).save(picture)


def _line(value: Any) -> str:
    """Counts as "16 (64), 8 (2)"."""
    return ", ".join(f"{key} ({count})" for key, count in value.items()) if isinstance(value, dict) else str(value)


def _entry(item: tuple[str, str]) -> str:
    """A line for one value of the metadata, cut where it is long."""
    key, value = item
    shown = " ".join(value[:_WIDEST].split())
    return f"  {key}: {shown}" + (f" ... ({len(value):,} characters; --json has all)" if len(value) > _WIDEST else "")


def _table(blocks: Sequence[BlockStatistics]) -> list[str]:
    """The blocks as text, with what the columns mean."""
    from studio.algebra.statistics import ENERGY

    if not blocks:
        return []
    width = max(len(block.block) for block in blocks)
    lines = [f"{'block':<{width}}  layers  {'rank':>7}  in use  {'norm':>8}  energy"]
    for block in blocks:
        rank = "–".join(map(str, dict.fromkeys((block.ranks[0], block.ranks[-1])))) if block.ranks else ""
        used = "" if block.directions is None else f"{block.directions:.1f}"
        norm = "?" if block.norm is None else f"{block.norm:.3g}"
        share = "" if block.energy is None else f"{block.energy:>6.1%} {'█' * round(30 * block.energy)}"
        lines.append(f"{block.block:<{width}}  {block.layers:>6}  {rank:>7}  {used:>6}  {norm:>8}  {share}".rstrip())
    if any(block.norm is None for block in blocks):
        lines.append("?: of these methods, only the base tells what they change: give it with --base")
    return [*lines, _EXPLAINED.format(share=ENERGY)]
