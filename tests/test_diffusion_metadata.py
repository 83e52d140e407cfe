"""The parameters of a picture survive its PNG, whatever the prompt."""

from __future__ import annotations

import pytest
from PIL import Image

from studio.adapters import AdapterSet
from studio.diffusion.generate import GenerateRequest
from studio.diffusion.lora import AppliedLora
from studio.diffusion.metadata import format_parameters, parse_parameters, read_parameters, save_png

NONE = AdapterSet({}, {})
INK = AppliedLora("ink", "loras/ink.safetensors", 0.8, "0123456789ab", 3, NONE)
NOTES = AppliedLora("notes, v2", "user/notes", 1.0, "ba9876543210", 3, NONE)

AWKWARD = [
    "a cat",
    "",
    "two\nlines, (weight:1.2), [low]",
    "quotes \"double\" 'single' and back\\slash",
    "Steps: 3, Sampler: none, CFG scale: 1, Seed: 9",
    "colons: 12:30; émoji 🐱 и кириллица 漢字",
    "  spaces around  ",
]


def saved(tmp_path, request, **options):
    save_png(Image.new("RGB", (64, 32)), tmp_path / "a.png", request, **options)
    return read_parameters(tmp_path / "a.png")


@pytest.mark.parametrize("negative", AWKWARD)
@pytest.mark.parametrize("prompt", AWKWARD)
def test_awkward_prompts_survive(tmp_path, prompt, negative):
    found = saved(tmp_path, GenerateRequest(prompt, negative, seed=7))
    assert (found["Prompt"], found["Negative prompt"]) == (prompt.strip(), negative.strip())
    assert found["Seed"] == "7"


def test_a_line_that_looks_like_the_negative_prompt_stays_in_the_prompt(tmp_path):
    found = saved(tmp_path, GenerateRequest("a\r\nNegative prompt: b", "c"))
    assert (found["Prompt"], found["Negative prompt"]) == ("a Negative prompt: b", "c")


def test_every_setting_is_written_as_a1111_writes_it(tmp_path):
    request = GenerateRequest("a cat", "dog", seed=5, steps=20, guidance=7.5, sampler="Euler a", clip_skip=1, batch=2)
    text = format_parameters(request, (64, 32), [INK, NOTES], index=1, model="tiny: the base")
    assert text == (
        "a cat <lora:ink:0.8> <lora:notes, v2:1>\n"
        "Negative prompt: dog\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 6, Size: 64x32, "
        'Model: "tiny: the base", Clip skip: 2, Lora hashes: "ink: 0123456789ab, notes, v2: ba9876543210"'
    )
    found = parse_parameters(text)
    assert found["Model"] == "tiny: the base"
    assert found["Lora hashes"] == "ink: 0123456789ab, notes, v2: ba9876543210"
    assert found["Clip skip"] == "2" and found["Size"] == "64x32"


def test_loras_that_did_not_act_are_not_named(tmp_path):
    found = saved(tmp_path, GenerateRequest("a cat"))
    assert "lora" not in " ".join([*found, *found.values()]).lower()


def test_pictures_without_parameters_and_texts_without_settings(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert read_parameters(tmp_path / "b.png") == {}
    assert parse_parameters("a cat\nsitting")["Prompt"] == "a cat\nsitting"
