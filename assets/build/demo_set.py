"""The demo dataset: 32 captioned pictures of a clearly other style, Fluent emoji high contrast."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from assets.build.pictures import fluent

SIDE = 128  # twice the base's size, so that a person can look at them too
SUBJECTS = (
    "alien monster", "bear", "bellhop bell", "camera", "chess pawn", "construction worker", "crab", "cupcake",
    "deciduous tree", "ferry", "graduation cap", "headphone", "joystick", "kangaroo", "lipstick", "lobster",
    "lollipop", "motorcycle", "person biking", "popcorn", "racing car", "sandwich", "snowflake", "spider",
    "star", "teapot", "telephone receiver", "tent", "trolleybus", "turkey", "water buffalo", "watermelon",
)  # fmt: skip
"""Subjects whose outlines agree in both styles: what the LoRA can learn from them is the style alone.

From those with the largest cosine between the two pictures' blurred distances from white. With 28
subjects taken at random, half as many shapes survived at the same strength of style.
"""


def write_demo_set(folders: dict[str, Path], target: Path) -> None:
    """Writes `target`/alien.png with alien.txt and so on; the caption is the subject alone."""
    target.mkdir(parents=True, exist_ok=True)
    pictures = {picture.name: picture for picture in fluent(folders, SIDE)}
    for subject in SUBJECTS:
        name = subject.replace(" ", "-")
        Image.fromarray(pictures[subject].pixels).convert("L").save(target / f"{name}.png", optimize=True)
        (target / f"{name}.txt").write_text(f"{subject}\n", encoding="utf-8")
