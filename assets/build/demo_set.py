"""The demo dataset: 28 captioned pictures of a clearly other style, Fluent emoji high contrast."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from assets.build.pictures import fluent

SIDE = 128  # twice the base's size, so that a person can look at them too
SUBJECTS = (
    "alien", "backpack", "balloon", "banana", "bomb", "cactus", "castle",
    "crescent moon", "crown", "doughnut", "elephant", "evergreen tree", "ferris wheel", "ghost",
    "grinning face", "hot dog", "house", "light bulb", "megaphone", "rose", "skull",
    "snail", "strawberry", "thumbs up", "tiger face", "trophy", "turtle", "volcano",
)  # fmt: skip


def write_demo_set(folders: dict[str, Path], target: Path) -> None:
    """Writes `target`/alien.png with alien.txt and so on; the caption is the subject alone."""
    target.mkdir(parents=True, exist_ok=True)
    pictures = {picture.name: picture for picture in fluent(folders, SIDE)}
    for subject in SUBJECTS:
        name = subject.replace(" ", "-")
        Image.fromarray(pictures[subject].pixels).convert("L").save(target / f"{name}.png", optimize=True)
        (target / f"{name}.txt").write_text(f"{subject}\n", encoding="utf-8")
