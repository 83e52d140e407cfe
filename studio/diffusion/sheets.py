"""Pictures for people: labelled comparison sheets and loss curves, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, GRID = "#222222", "#777777", "#e4e4e4"
RAW, SMOOTH = "#b9d3ee", "#1f5fa8"
CELL = 128
"""Pictures smaller than this many pixels are enlarged, by a whole factor."""
LABEL_WIDTH, GAP, MARGIN = 190, 10, 24
TEXT, TITLE = 17, 22  # font sizes

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], title: str | None = None
) -> Image.Image:
    """A labelled grid on white: `rows` holds (label, one picture per column).

    Raises ValueError where a row has not one picture for each of `columns`.
    """
    for label, pictures in rows:
        if len(pictures) != len(columns):
            raise ValueError(f"row '{label}' has {len(pictures)} pictures for {len(columns)} columns")
    shown = [(label, [_enlarged(picture) for picture in pictures]) for label, pictures in rows]
    every = [picture for _, pictures in shown for picture in pictures]
    width = max(picture.width for picture in every)
    height = max(picture.height for picture in every)
    font, bold = ImageFont.load_default(size=TEXT), ImageFont.load_default(size=TITLE)
    top = MARGIN + (TITLE + 2 * GAP if title else 0)
    left = MARGIN + LABEL_WIDTH
    canvas = Image.new(
        "RGB",
        (left + len(columns) * (width + GAP) + MARGIN, top + 3 * TEXT // 2 + len(rows) * (height + GAP) + MARGIN),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((MARGIN, MARGIN), title, INK, bold)
    for place, name in enumerate(columns):
        draw.text((left + place * (width + GAP) + width / 2, top), name, FAINT, font, anchor="ma")
    for line, (label, pictures) in enumerate(shown):
        y = top + 3 * TEXT // 2 + line * (height + GAP)
        text = _wrapped(draw, label, font, LABEL_WIDTH - 2 * GAP)
        draw.multiline_text((MARGIN, y + height / 2), text, INK, font, anchor="lm", spacing=5)
        for place, picture in enumerate(pictures):
            x = left + place * (width + GAP)
            canvas.paste(picture, (x, y))
            draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=GRID)
    return canvas


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = math.ceil(CELL / max(picture.size))
    size = (picture.width * factor, picture.height * factor)
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: Font, width: float) -> str:
    """`text` broken between words, and within longer ones, into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        gap = " " if lines[-1] else ""
        if draw.textlength(lines[-1] + gap + word, font) <= width:
            lines[-1] += gap + word
            continue
        lines.append("")
        for letter in word:
            if draw.textlength(lines[-1] + letter, font) > width:
                lines.append("")
            lines[-1] += letter
    return "\n".join(filter(None, lines))


def loss_plot(metrics: Sequence[Mapping[str, float]], path: Path, title: str = "Training loss") -> None:
    """Draws "loss" over "step" to a PNG: the raw values faint, their running average strong.

    Entries without both keys, and losses that are not finite, are left out.
    """
    points = [
        (row["step"], row["loss"]) for row in metrics if "step" in row and math.isfinite(row.get("loss", math.nan))
    ]
    scale = 2  # drawn at twice the size and reduced: Pillow's lines have no smooth edges
    canvas = Image.new("RGB", (800 * scale, 450 * scale), "white")
    draw = ImageDraw.Draw(canvas)
    font, bold = ImageFont.load_default(size=14 * scale), ImageFont.load_default(size=18 * scale)
    left, top, right, bottom = 76 * scale, 54 * scale, 776 * scale, 396 * scale
    draw.text((left, 18 * scale), title, INK, bold)
    draw.text(((left + right) / 2, 442 * scale), "step", FAINT, font, anchor="ms")
    if len(points) < 2:
        draw.text(((left + right) / 2, (top + bottom) / 2), "too few losses to plot", FAINT, font, anchor="mm")
    else:
        steps = _ticks(points[0][0], points[-1][0])
        losses = _ticks(0, _top_of([loss for _, loss in points]))
        points = [(step, min(loss, losses[-1])) for step, loss in points]

        def at(step: float, loss: float) -> tuple[float, float]:
            across = (step - steps[0]) / (steps[-1] - steps[0])
            return left + across * (right - left), bottom - loss / losses[-1] * (bottom - top)

        for loss in losses:
            y = at(steps[0], loss)[1]
            draw.line([(left, y), (right, y)], GRID, scale)
            draw.text((left - 8 * scale, y), f"{loss:g}", FAINT, font, anchor="rm")
        for step in steps:
            x = at(step, losses[0])[0]
            draw.line([(x, bottom), (x, bottom + 5 * scale)], FAINT, scale)
            draw.text((x, bottom + 10 * scale), f"{step:g}", FAINT, font, anchor="mt")
        draw.line([at(*point) for point in points], RAW, scale, joint="curve")
        draw.line([at(*point) for point in _smoothed(points)], SMOOTH, 2 * scale, joint="curve")
    canvas.resize((800, 450), Image.Resampling.LANCZOS).save(path)


def _top_of(losses: Sequence[float]) -> float:
    """The largest loss but for rare spikes, which the plot cuts off so that the rest can be read."""
    ordered = sorted(losses)
    return max(ordered[int(0.98 * (len(ordered) - 1))] * 1.1, 1e-8)


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Averages over a centred window of a twentieth of the points."""
    reach = max(1, len(points) // 40)
    averaged = []
    for place, (step, _) in enumerate(points):
        window = points[max(0, place - reach) : place + reach + 1]
        averaged.append((step, sum(loss for _, loss in window) / len(window)))
    return averaged


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers whose first is at most `low` and last at least `high`."""
    span = max(high - low, 1e-9) / 5
    unit = 10 ** math.floor(math.log10(span))
    width = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= span * 0.999)
    first, last = math.floor(low / width), math.ceil(high / width)
    return [round(tick * width, 12) for tick in range(first, max(last, first + 1) + 1)]
