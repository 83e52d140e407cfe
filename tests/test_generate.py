"""The sampling loop against diffusers' pipelines, seeds, sizes, samplers and requests."""

from __future__ import annotations

import dataclasses

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from studio.diffusion.generate import GenerateRequest, generate
from studio.diffusion.samplers import SAMPLERS, make_scheduler
from studio.errors import ConfigError
from studio.families.loading import load_base

PIPELINES = {"sd15": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


@pytest.fixture(scope="module", params=PIPELINES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def base(kind):
    return load_base(str(tiny.folder(kind)))


@pytest.fixture(scope="module")
def pipeline(kind):
    pipe = getattr(diffusers, PIPELINES[kind]).from_pretrained(tiny.folder(kind))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def decoded(base, monkeypatch):
    """The pixels in [-1, 1] that `generate` made its pictures of, before they are rounded."""
    kept = []
    decode = type(base[0]).decode

    def keeping(family, models, latents):
        kept.append(decode(family, models, latents))
        return kept[-1]

    monkeypatch.setattr(type(base[0]), "decode", keeping)
    return kept


@pytest.mark.parametrize("sampler", ["DDIM", "Euler a", "DPM++ 2M Karras", "UniPC"])
@pytest.mark.parametrize("negative", ["dog", ""])
def test_plain_prompts_give_the_pipelines_picture(base, pipeline, decoded, sampler, negative):
    request = GenerateRequest("a cat", negative, seed=5, steps=4, guidance=3.5, sampler=sampler, batch=2)
    images = generate(*base, request)
    pipeline.scheduler = make_scheduler(sampler, base[1].scheduler)
    expected = pipeline(
        "a cat",
        negative_prompt=negative or None,
        num_inference_steps=4,
        guidance_scale=3.5,
        height=64,
        width=64,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="pt",
    ).images
    assert (decoded[0] / 2 + 0.5 - expected).abs().max() <= 1e-5
    assert [image.size for image in images] == [(64, 64)] * 2 and images[0].mode == "RGB"
    assert expected.std() > 0.01  # not two blank pictures


IMAGE_PIPELINES = {name: value.replace("Pipeline", "Img2ImgPipeline") for name, value in PIPELINES.items()}


@pytest.mark.parametrize("sampler", ["DDIM", "Euler a", "DPM++ 2M Karras", "Heun"])
@pytest.mark.parametrize(("steps", "denoising"), [(4, 0.75), (5, 0.5), (4, 1.0)])
def test_a_picture_to_start_from_gives_the_pipelines_picture(kind, base, pipeline, decoded, sampler, steps, denoising):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    request = GenerateRequest("a cat", "dog", seed=5, steps=steps, guidance=3.5, sampler=sampler, batch=2)
    generate(*base, request, start=(image, denoising))
    pipe = getattr(diffusers, IMAGE_PIPELINES[kind]).from_pipe(pipeline)
    pipe.scheduler = make_scheduler(sampler, base[1].scheduler)
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
    expected = pipe(
        "a cat",
        negative_prompt="dog",
        image=base[0].encode_image(base[1], pixels).repeat(2, 1, 1, 1),  # latents: a pipeline's encoding is random
        strength=denoising,
        num_inference_steps=steps,
        guidance_scale=3.5,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="pt",
        **({"original_size": (64, 64), "target_size": (64, 64)} if kind == "sdxl" else {}),
    ).images
    assert (decoded[0] / 2 + 0.5 - expected).abs().max() <= 1e-4
    assert expected.std() > 0.01


def test_little_denoising_keeps_the_picture_and_any_size_is_cut_to_fit(small):
    image = Image.new("RGB", (200, 100), (200, 30, 30))
    steps = []
    request = GenerateRequest("a cat", steps=50, sampler="DDIM", width=64, height=32)
    (near,) = generate(*small, request, lambda *progress: steps.append(progress), (image, 0.01))
    (far,) = generate(*small, request, start=(image, 1.0))
    family, models = small
    pixels = torch.tensor(np.asarray(image.resize((64, 32)))).permute(2, 0, 1)[None] / 127.5 - 1
    kept = family.decode(models, family.encode_image(models, pixels))  # what the VAE alone makes of it
    levels = ((kept[0] / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    assert near.size == (64, 32) and steps == [(1, 1)]
    assert np.abs(np.asarray(near) - levels).mean() < np.abs(np.asarray(far) - levels).mean() / 2


def test_every_picture_is_a_function_of_its_own_seed(base, decoded):
    request = GenerateRequest("a (cat:1.2)", "dog", seed=3, steps=3, sampler="DPM++ 2M SDE", batch=3)
    generate(*base, request)
    for place in range(3):
        generate(*base, dataclasses.replace(request, seed=3 + place, batch=1))
    together, *alone = decoded
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_sizes_progress_and_the_global_random_stream(base):
    before = torch.random.get_rng_state()
    done = []
    request = GenerateRequest("a cat", steps=3, width=40, height=72)
    (image,) = generate(*base, request, lambda *progress: done.append(progress))
    assert image.size == (40, 72)
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ConfigError, match="width is 60; it must be a multiple of 8, such as 64"):
        generate(*base, dataclasses.replace(request, width=60))


def test_without_guidance_the_negative_prompt_does_not_count(base, decoded):
    request = GenerateRequest("a cat", "dog", steps=2, guidance=1)
    generate(*base, request)
    generate(*base, dataclasses.replace(request, negative_prompt=""))
    assert torch.equal(*decoded)


@pytest.fixture(scope="module")
def small():
    return load_base(str(tiny.folder("sd15")))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy about DPM2 in diffusers
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws(small, sampler, zero_snr):
    family, models = small
    changes = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"} if zero_snr else {}
    models = dataclasses.replace(models, scheduler=models.scheduler | changes)
    (image,) = generate(family, models, GenerateRequest("a cat", steps=4, sampler=sampler))
    (changed,) = generate(family, models, GenerateRequest("a cat", steps=4, sampler=sampler), start=(image, 0.5))
    assert np.asarray(image).std() > 1 and np.asarray(changed).std() > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "DPM++ 2M Caras"}, "Did you mean DPM\\+\\+ 2M Karras"),
        ({"sampler": "???"}, "Known: Euler"),
        ({"steps": 0}, "steps is 0; it must be 1 or more"),
        ({"batch": 0}, "batch is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance": -0.5}, "guidance is -0.5"),
        ({"prompt": "a <lora:ink:1>"}, "in the prompt"),
        ({"negative_prompt": "a <lora:ink:1>"}, "in the negative prompt"),
    ],
)
def test_requests_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        GenerateRequest(**{"prompt": "a cat"} | changes)
