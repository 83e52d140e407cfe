"""Sizes and times in words."""

from __future__ import annotations


def size(count: int) -> str:
    """A number of bytes: "1.5 GiB"."""
    unit, name = next((one for one in ((2**30, "GiB"), (2**20, "MiB")) if count >= one[0]), (2**10, "KiB"))
    return f"{count / unit:.1f} {name}"


def duration(seconds: float) -> str:
    """Seconds: "2 h 05 min", "3 min 20 s", "7 s"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
