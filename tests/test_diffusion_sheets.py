"""Comparison sheets hold every picture; loss plots are drawn from whatever a run has logged."""

from __future__ import annotations

import math

import pytest
from PIL import Image

from studio.diffusion.sheets import loss_plot, sheet


def test_every_picture_is_on_the_sheet():
    colours = ["#ff0000", "#00ff00", "#0000ff", "#ffff00", "#00ffff", "#ff00ff"]
    pictures = [Image.new("RGB", (64, 64), colour) for colour in colours]
    drawn = sheet([("a cat", pictures[:3]), ("a very long prompt " * 4, pictures[3:])], ["base", "50", "LoRA"], "Title")
    counts = {colour: count for count, colour in drawn.getcolors(1 << 24)}
    for picture in pictures:  # each enlarged twice
        assert counts[picture.getpixel((0, 0))] == 128 * 128
    assert drawn.getpixel((0, 0)) == (255, 255, 255)


def test_a_row_with_a_picture_too_few_is_a_bug():
    with pytest.raises(ValueError, match="row 'a cat' has 1 pictures for 2 columns"):
        sheet([("a cat", [Image.new("RGB", (64, 64))])], ["base", "LoRA"])


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"step": 1, "loss": 0.5}],
        [{"step": 1, "loss": 0.0}, {"step": 2, "loss": 0.0}],
        [{"step": step, "loss": math.exp(-step / 50)} for step in range(1, 400)],
        [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}, {"step": 3, "lr": 0.1}, {"step": 9, "loss": 1e9}],
    ],
)
def test_loss_plots(tmp_path, metrics):
    loss_plot(metrics, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as plot:
        assert plot.size == (800, 450) and len(plot.getcolors(1 << 24)) > 4
