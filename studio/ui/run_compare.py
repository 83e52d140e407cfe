"""Several runs beside each other: their curves, their pictures of one step, and what differs in their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studio import jobs
from studio.ui.form import flat
from studio.ui.live import POINTS, Series, smoothed
from studio.ui.run_view import Point, Samples, named, samples, settings

LEFT_OUT = ("output.folder", "output.name")  # where a run is and what it is called


def labels(folders: Sequence[Path]) -> dict[Path, str]:
    """What to call each run: its title, with its time where two have the same."""
    titles = [jobs.title_of(folder) for folder in folders]
    return {
        folder: title if titles.count(title) == 1 else f"{title} {folder.name[:15]}"
        for folder, title in zip(folders, titles, strict=True)
    }


def curves(series: Mapping[str, Series]) -> list[Point]:
    """The smoothed loss of each run, by its label: a thousand points in all at most."""
    most = 2 * POINTS // max(len(series), 1)
    return [
        point for label, one in series.items() for point in named(label, smoothed(one.curves.get("loss", [])), most)
    ]


def common_step(found: Sequence[Samples]) -> int | None:
    """The last step of which every run has samples."""
    return max(set.intersection(*(set(one.pictures) for one in found)), default=None) if found else None


def beside(folders: Sequence[Path]) -> tuple[int | None, list[tuple[str, list[Path | None]]]]:
    """(the last common step, for each prompt a picture of each run, None where a run has no such prompt)."""
    found = [samples(folder) for folder in folders]
    step = common_step(found)
    if step is None:
        return None, []
    drawn = [dict(zip(one.prompts, one.pictures[step], strict=False)) for one in found]
    prompts = dict.fromkeys(prompt for pictures in drawn for prompt in pictures)
    return step, [(prompt, [pictures.get(prompt) for pictures in drawn]) for prompt in prompts]


def differences(folders: Sequence[Path]) -> dict[str, list[Any]]:
    """Dotted key -> the setting of each run, where they are not all the same; None where a run has none."""
    each = [flat({name: group for name, group in settings(one).items() if isinstance(group, dict)}) for one in folders]
    keys = dict.fromkeys(key for one in each for key in one if key not in LEFT_OUT)
    values = {key: [one.get(key) for one in each] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}
