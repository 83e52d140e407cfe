"""A figure beside its target: the verdict, and the table of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.engine.timing import Samples


@dataclass(frozen=True)
class Figure:
    """One row: smaller is better. `bound` is the largest `ours` that meets the target, None where there is none.

    `peft`, `ours` and `bound` are in `unit`; `spread` is the A/A row's, a share (0 where nothing is timed).
    """

    name: str
    unit: str
    peft: float
    ours: float
    bound: float | None = None
    target: str = "-"
    spread: float = 0.0
    note: str = ""
    minima: tuple[float, float] | None = None  # of peft and ours, where times are compared: ratios of least times
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """ "met", "not met", or "unresolved" where `ours` is closer to the bound than the spread."""
        if self.bound is None:
            return "-"
        if abs(self.ours / self.bound - 1) < self.spread:
            return "unresolved"
        return "met" if self.ours <= self.bound else "not met"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def timed(
    name: str,
    samples: Samples,
    bound: float | None = None,
    target: str = "-",
    *,
    ours: str = "ours",
    peft: str = "peft",
    peft_over: str | None = None,
    note: str = "",
) -> Figure:
    """The figure of the variants `ours` and `peft`, over the reference; peft over `peft_over` where that is given."""
    return Figure(
        name,
        "x",
        samples.ratio(peft, peft_over),
        samples.ratio(ours),
        bound,
        target,
        samples.spread(),
        note,
        (samples.ratio_of_minima(peft, peft_over), samples.ratio_of_minima(ours)),
        samples.milliseconds(),
    )


def overhead_removed(peft: float, ours: float) -> float:
    """The share of peft's time over the bare model that ours does not take; both as ratios to the bare model."""
    return 1 - (ours - 1) / (peft - 1)


def table(figures: Iterable[Figure]) -> str:
    """The figures as a Markdown table; ratios of least times are in brackets."""
    titles = ("figure", "peft", "ours", "target", "verdict", "A/A spread", "note")
    rows: list[tuple[str, ...]] = [titles, ("---",) * len(titles)]
    for figure in figures:
        spread = f"±{figure.spread:.1%}" if figure.spread else "-"
        least = figure.minima or (None, None)
        values = (_value(figure.peft, figure.unit, least[0]), _value(figure.ours, figure.unit, least[1]))
        rows.append((figure.name, *values, figure.target, figure.verdict, spread, figure.note))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _value(value: float, unit: str, least: float | None) -> str:
    if unit != "x":
        return f"{value:.3g} {unit}".strip()
    text = f"{value:.3f}x" if value >= 0.1 else f"{value:.2g}x"
    return text if least is None or value < 0.1 else f"{text} ({least:.3f})"
