"""Watching a run without reading it again and again: metrics by byte offset, thinned to what a chart can show."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

POINTS = 500
"""Points of one curve at most: a browser redraws these ten times faster than it gets them."""


@dataclass
class Series:
    """The metrics of one run, as far as they have been read.

    `read` takes what is new in metrics.jsonl, a line at a time and whole lines only; a file that became
    shorter (a resumed run forgets what follows its checkpoint) is read anew. Memory stays bounded: past 2 * `POINTS`
    points, every second one of each curve goes, and from then on every second one is kept.
    """

    file: Path
    offset: int = 0
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    _strides: dict[str, int] = field(default_factory=dict)
    _seen: dict[str, int] = field(default_factory=dict)

    def read(self) -> bool:
        """Takes what is new; whether there was something."""
        size = self.file.stat().st_size if self.file.is_file() else 0
        if size < self.offset:
            self.offset = 0
            for store in (self.curves, self._strides, self._seen):
                store.clear()
        if size == self.offset:
            return False
        with self.file.open("rb") as file:
            file.seek(self.offset)
            content = file.read(size - self.offset)
        whole = content.rfind(b"\n") + 1
        self.offset += whole
        for line in content[:whole].splitlines():
            with suppress(ValueError):
                self._add(orjson.loads(line))  # five times as fast as json: a long run is one tick
        return whole > 0

    def _add(self, metrics: dict[str, Any]) -> None:
        step = metrics.pop("step", None)
        for name, value in metrics.items():
            if step is None or not isinstance(value, (int, float)):
                continue
            seen = self._seen[name] = self._seen.get(name, 0) + 1
            if (seen - 1) % self._strides.setdefault(name, 1):
                continue
            curve = self.curves.setdefault(name, [])
            curve.append((step, value))
            if len(curve) > 2 * POINTS:
                del curve[1::2]
                self._strides[name] *= 2


def smoothed(curve: list[tuple[int, float]], weight: float = 0.9) -> list[tuple[int, float]]:
    """The running mean m = weight * m + (1 - weight) * x, without its start's bias (as Adam corrects it)."""
    mean, total, result = 0.0, 0.0, []
    for step, value in curve:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append((step, mean / total))
    return result
