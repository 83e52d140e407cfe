"""An adapter in one picture: for every block, how much it changes which layers, its share, and the ranks it uses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

from PIL import Image, ImageDraw, ImageFont

from studio.algebra.statistics import ENERGY, BlockStatistics, LayerStatistics, block_statistics
from studio.diffusion.sheets import FAINT, GRID, INK, MARGIN, SMOOTH, TITLE

ROW, CELL, LABEL, BAR, GAP = 24, 112, 190, 170, 28  # pixels: height of a row, widths of its parts
TEXT, NUMBER = 15, 13  # font sizes
UNKNOWN = "#f3ead7"
_DEEP = (23, 78, 140)  # the colour of the largest norm; none is white

_NOTES = (
    "Cells: norm of the change, ||dW|| (Frobenius), of a block's layers of one kind; the darker, the larger.",
    "Energy: the block's share of the squared norm of the whole adapter.",
    f"Rank: how many directions hold {ENERGY:.0%} of a layer's energy (filled), of those that the file has (outlined).",
)


def portrait(layers: Sequence[LayerStatistics], title: str, subtitle: str) -> Image.Image:
    """The picture of `layers`, in their order. A norm that is known with the base only is a "?"."""
    return _Portrait(layers).drawn(title, subtitle)


class _Portrait:
    """What is drawn where: rows are blocks, under the name of their component, columns kinds of layers."""

    def __init__(self, layers: Sequence[LayerStatistics]) -> None:
        self.blocks = block_statistics(layers)
        self.kinds = list(dict.fromkeys(layer.role for layer in layers))
        self.cells = {
            (block.block, kind): block.norm
            for kind in self.kinds
            for block in block_statistics([layer for layer in layers if layer.role == kind])
        }
        self.largest = max((norm for norm in self.cells.values() if norm), default=1.0)
        self.most_energy = max((block.energy or 0.0 for block in self.blocks), default=0.0) or 1.0
        self.most_ranks = max((max(block.ranks, default=0) for block in self.blocks), default=0) or 1
        self.energy_at = MARGIN + LABEL + len(self.kinds) * CELL + GAP
        self.rank_at = self.energy_at + BAR + GAP
        self.text, self.number = ImageFont.load_default(size=TEXT), ImageFont.load_default(size=NUMBER)
        self.head = MARGIN + TITLE + 2 * TEXT + GAP

    def drawn(self, title: str, subtitle: str) -> Image.Image:
        rows = list(self._rows())
        bottom = rows[-1][0] + ROW if rows else self.head
        height = bottom + GAP + len(_NOTES) * (TEXT + 6) + MARGIN
        canvas = Image.new("RGB", (self.rank_at + BAR + MARGIN, height), "white")
        draw = ImageDraw.Draw(canvas)
        draw.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(size=TITLE))
        draw.text((MARGIN, MARGIN + TITLE + 8), subtitle, FAINT, self.text)
        self._heads(draw)
        for y, row in rows:
            if isinstance(row, str):
                self._component(draw, y, row)
            else:
                self._row(draw, y, row)
        for line, note in enumerate(_NOTES):
            draw.text((MARGIN, bottom + GAP + line * (TEXT + 6)), note, FAINT, self.number)
        return canvas

    def _rows(self) -> Iterator[tuple[int, str | BlockStatistics]]:
        """(upper edge, a component's name or one of its blocks)."""
        y = self.head + ROW // 2
        for component, blocks in groupby(self.blocks, _component):
            y += ROW // 2
            rows: list[str | BlockStatistics] = [component, *blocks]
            for row in rows:
                yield y, row
                y += ROW

    def _heads(self, draw: ImageDraw.ImageDraw) -> None:
        y = self.head + ROW / 2
        for place, kind in enumerate(self.kinds):
            draw.text((MARGIN + LABEL + (place + 0.5) * CELL, y), kind, FAINT, self.number, anchor="mm")
        draw.text((self.energy_at, y), "energy", FAINT, self.number, anchor="lm")
        draw.text((self.rank_at, y), "rank", FAINT, self.number, anchor="lm")

    def _component(self, draw: ImageDraw.ImageDraw, y: int, name: str) -> None:
        """The head of a component's rows, with its share of the energy."""
        shares = [block.energy for block in self.blocks if _component(block) == name and block.energy is not None]
        draw.text((MARGIN, y + ROW / 2), name, INK, self.text, anchor="lm")
        if shares:
            draw.text((self.energy_at, y + ROW / 2), _percent(sum(shares)), INK, self.number, anchor="lm")
        draw.line([(MARGIN, y + ROW - 1), (self.rank_at + BAR, y + ROW - 1)], GRID)

    def _row(self, draw: ImageDraw.ImageDraw, y: int, block: BlockStatistics) -> None:
        label = block.block.partition(".")[2] or "outside of blocks"
        draw.text((MARGIN + 12, y + ROW / 2), label, INK, self.text, anchor="lm")
        for place, kind in enumerate(self.kinds):
            x = MARGIN + LABEL + place * CELL
            if (block.block, kind) in self.cells:
                self._cell(draw, (x, y, x + CELL - 2, y + ROW - 2), self.cells[block.block, kind])
        if block.energy is not None:
            width = block.energy / self.most_energy * (BAR - 50)
            draw.rectangle((self.energy_at, y + 5, self.energy_at + width, y + ROW - 7), SMOOTH)
            at = (self.energy_at + width + 6, y + ROW / 2 - 1)
            draw.text(at, _percent(block.energy), FAINT, self.number, anchor="lm")
        if block.ranks:
            self._ranks(draw, y, block)

    def _cell(self, draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], norm: float | None) -> None:
        share = 0.0 if norm is None or not math.isfinite(norm) else norm / self.largest
        shade = tuple(round(255 + share * (deep - 255)) for deep in _DEEP)
        draw.rectangle(box, UNKNOWN if norm is None else shade, GRID)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        draw.text(middle, _number(norm), "white" if share > 0.5 else INK, self.number, anchor="mm")

    def _ranks(self, draw: ImageDraw.ImageDraw, y: int, block: BlockStatistics) -> None:
        unit = (BAR - 80) / self.most_ranks
        most = block.ranks[-1]
        draw.rectangle((self.rank_at, y + 5, self.rank_at + most * unit, y + ROW - 7), "white", FAINT)
        if block.directions:
            draw.rectangle((self.rank_at, y + 5, self.rank_at + block.directions * unit, y + ROW - 7), FAINT)
        stated = f"{block.ranks[0]}–{most}" if len(block.ranks) > 1 else f"{most}"
        text = stated if block.directions is None else f"{block.directions:.1f} of {stated}"
        draw.text((self.rank_at + most * unit + 6, y + ROW / 2 - 1), text, FAINT, self.number, anchor="lm")


def _component(block: BlockStatistics) -> str:
    return block.block.partition(".")[0]


def _number(norm: float | None) -> str:
    """About two digits that count: "0.34", "2.0", "13", "2e-05"; "?" for an unknown one."""
    if norm is None:
        return "?"
    if 0 < norm < 0.01:
        return f"{norm:.0e}"
    return f"{norm:.{2 if norm < 1 else 1 if norm < 10 else 0}f}"


def _percent(share: float) -> str:
    return "< 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"
