"""Cached latents and text embeddings: what an entry depends on, and when it is kept."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from studio.data.cache import TensorCache
from studio.data.images import scan_folder
from studio.diffusion.encoded import EncodedImages, EncodedPrompts
from studio.families.base import DiffusionFamily, Models
from studio.families.loading import load_base

Base = tuple[DiffusionFamily, Models]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request: pytest.FixtureRequest) -> Base:
    return load_base(str(tiny.folder(request.param)))


def entries(folder: Path) -> int:
    return len(list(folder.rglob("*.safetensors")))


def test_latents_of_another_scale_are_another_entry(base: Base, tmp_path: Path) -> None:
    family, models = base
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "a.png")
    (item,) = scan_folder(tmp_path).items
    cache = TensorCache(tmp_path / "cache")
    latents = EncodedImages(family, models, cache).get(item, (64, 64)).latents
    vae = copy.deepcopy(models.parts["vae"])
    vae.register_to_config(scaling_factor=2 * vae.config.scaling_factor)
    rescaled = dataclasses.replace(models, parts=models.parts | {"vae": vae})
    for _ in range(2):
        assert torch.equal(EncodedImages(family, rescaled, cache).get(item, (64, 64)).latents, 2 * latents)
    assert entries(cache.folder) == 2


def test_captions_are_encoded_as_the_family_does_and_kept_on_demand(base: Base, tmp_path: Path) -> None:
    family, models = base
    prompts = EncodedPrompts(family, models, TensorCache(tmp_path))
    unkept = prompts.get(tiny.PROMPTS, keep=False)
    assert entries(tmp_path) == 0
    kept = [prompts.get(tiny.PROMPTS) for _ in range(2)]
    assert entries(tmp_path) == len(tiny.PROMPTS)
    expected = [family.encode_prompt(models, [prompt]) for prompt in tiny.PROMPTS]
    for found in (unkept, *kept):
        assert torch.equal(found.encoder_hidden_states, torch.cat([one.encoder_hidden_states for one in expected]))
        if found.pooled is not None:
            assert torch.equal(found.pooled, torch.cat([one.pooled for one in expected if one.pooled is not None]))


def test_text_is_keyed_by_its_tokens(base: Base, tmp_path: Path) -> None:
    family, models = base
    prompts = EncodedPrompts(family, models, TensorCache(tmp_path))
    prompts.get(["a cat", "A  cat"])  # the tokenizer ignores case and double spaces
    assert entries(tmp_path) == 1
