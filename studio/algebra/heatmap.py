"""An analysis as one picture: for every block and pair of adapters, how much they are predicted to interfere."""

from __future__ import annotations

from itertools import groupby

from PIL import Image, ImageDraw, ImageFont

from studio.algebra.analyze import Analysis, Encounter
from studio.diffusion.sheets import FAINT, GRID, INK, MARGIN, TITLE

ROW, LABEL, GAP = 24, 190, 18  # pixels
NARROW, WIDE = 120, 260  # a column's width
TEXT, NUMBER = 15, 13  # font sizes
DOUBLES, CANCELS = (23, 78, 140), (176, 42, 32)  # at a score of 1; 0 is white
SCALE = 220  # width of the legend's bar

_NOTES = (
    "Each number is the share of the weaker adapter's own effect that the other one adds (+) or takes away (-).",
    "0: they leave each other alone.  +1: the same effect twice.  -1: the effect is lost.",
)


def heatmap(analysis: Analysis) -> Image.Image:
    """The picture of an analysis: a row for each block, a column for each pair, with all blocks together on top."""
    return _Heatmap(analysis).drawn()


class _Heatmap:
    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.text, self.number = ImageFont.load_default(size=TEXT), ImageFont.load_default(size=NUMBER)
        names = [name for pair in analysis.pairs for name in (pair.first, f"with {pair.second}")]
        longest = max(self.number.getlength(name) for name in names)
        self.column = round(min(max(longest + 16, NARROW), WIDE))
        self.rows = self._rows()

    def _rows(self) -> list[tuple[str, list[Encounter]]]:
        """(label, the encounters of all pairs there); a component's name stands alone above its blocks."""
        pairs = self.analysis.pairs
        rows = [("all blocks", [pair.whole for pair in pairs])]
        by_block = list(zip(*(pair.blocks for pair in pairs), strict=True))
        for component, found in groupby(by_block, lambda row: row[0].block.partition(".")[0]):
            rows.append((component, []))
            rows += [(f"   {row[0].block.partition('.')[2] or 'outside of blocks'}", list(row)) for row in found]
        return rows

    def drawn(self) -> Image.Image:
        top = MARGIN + TITLE + GAP + 2 * (NUMBER + 5) + 6
        across = LABEL + self.column * len(self.analysis.pairs)
        width = 2 * MARGIN + max(across, round(max(map(self.number.getlength, _NOTES))))
        bottom = top + len(self.rows) * ROW + GAP
        canvas = Image.new("RGB", (width, bottom + ROW + GAP + len(_NOTES) * (NUMBER + 6) + MARGIN), "white")
        draw = ImageDraw.Draw(canvas)
        draw.text((MARGIN, MARGIN), "Will these adapters fight?", INK, ImageFont.load_default(size=TITLE))
        self._heads(draw, MARGIN + TITLE + GAP)
        for line, (label, row) in enumerate(self.rows):
            y = top + line * ROW
            draw.text((MARGIN, y + ROW / 2), label, INK, self.text, anchor="lm")
            if not row:
                draw.line([(MARGIN, y + ROW - 1), (MARGIN + across, y + ROW - 1)], GRID)
            for place, encounter in enumerate(row):
                self._cell(draw, MARGIN + LABEL + place * self.column, y, encounter)
        self._legend(canvas, draw, bottom)
        for line, note in enumerate(_NOTES):
            draw.text((MARGIN, bottom + ROW + GAP + line * (NUMBER + 6)), note, FAINT, self.number)
        return canvas

    def _heads(self, draw: ImageDraw.ImageDraw, y: int) -> None:
        for place, pair in enumerate(self.analysis.pairs):
            x = MARGIN + LABEL + (place + 0.5) * self.column
            for line, name in enumerate((pair.first, f"with {pair.second}")):
                shown = self._fitted(name)
                draw.text((x, y + line * (NUMBER + 5)), shown, FAINT, self.number, anchor="ma")

    def _fitted(self, name: str) -> str:
        """`name`, its end left out where it is too long for a column."""
        if self.number.getlength(name) <= self.column - 12:
            return name
        while self.number.getlength(f"{name}…") > self.column - 12:
            name = name[:-1]
        return f"{name}…"

    def _cell(self, draw: ImageDraw.ImageDraw, x: int, y: int, encounter: Encounter) -> None:
        value = encounter.score if encounter.cosine >= 0 else -encounter.score
        box = (x, y, x + self.column - 2, y + ROW - 2)
        draw.rectangle(box, colour(value), GRID)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        text = f"{value:+.2f}" if encounter.score >= 0.005 else "0"
        draw.text(middle, text, "white" if encounter.score > 0.5 else INK, self.number, anchor="mm")

    def _legend(self, canvas: Image.Image, draw: ImageDraw.ImageDraw, y: int) -> None:
        left = MARGIN + LABEL
        for step in range(SCALE):
            shade = colour(2 * step / (SCALE - 1) - 1)
            draw.line([(left + step, y), (left + step, y + ROW - 8)], shade)
        middle = y + (ROW - 8) / 2
        draw.text((left - 8, middle), "-1 cancels", FAINT, self.number, anchor="rm")
        draw.text((left + SCALE + 8, middle), "+1 doubles", FAINT, self.number, anchor="lm")


def colour(value: float) -> tuple[int, int, int]:
    """White at 0, `DOUBLES` at 1, `CANCELS` at -1."""
    deep = DOUBLES if value >= 0 else CANCELS
    red, green, blue = (round(255 + abs(value) * (one - 255)) for one in deep)
    return red, green, blue
