"""The families against diffusers' own pipelines, and loading a base from wherever it lies."""

from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import nn

from studio.errors import ConfigError
from studio.families import FAMILIES
from studio.families.base import Models
from studio.families.keys import LDMNames
from studio.families.loading import load_base


@pytest.fixture(scope="module", params=tiny.KINDS)
def case(request):
    family, models = load_base(str(tiny.folder(request.param)))
    return family, models, tiny.pipeline(request.param)


def test_a_base_is_found_to_be_what_it_is(case):
    family, models, pipeline = case
    assert family.name == ("sdxl" if "XL" in type(pipeline).__name__ else "sd")
    assert family.prediction_type(models) == pipeline.scheduler.config.prediction_type
    assert set(models.parts) == {"unet", "vae", *family.components}
    assert list(models.tokenizers) == [name for name in family.components if name != "unet"]
    assert not any(parameter.requires_grad for part in models.parts.values() for parameter in part.parameters())


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_prompts_are_encoded_as_diffusers_does(case, clip_skip):
    family, models, pipeline = case
    # diffusers 0.42 looks for the final norm where transformers 4 had it
    vars(pipeline.text_encoder).setdefault("text_model", pipeline.text_encoder)
    theirs = pipeline.encode_prompt(
        prompt=tiny.PROMPTS,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=clip_skip or None,
    )
    ours = family.encode_prompt(models, tiny.PROMPTS, clip_skip)
    assert torch.equal(ours.encoder_hidden_states, theirs[0])
    if family.name == "sdxl":
        assert torch.equal(ours.pooled, theirs[2])


def test_one_denoising_step_is_the_pipelines(case):
    family, models, pipeline = case
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    seen = {}
    pipeline.unet.register_forward_hook(lambda module, args, output: seen.update(output=output[0], timestep=args[1]))
    pipeline.set_progress_bar_config(disable=True)
    options = {"original_size": (64, 64), "target_size": (64, 64)} if family.name == "sdxl" else {}
    pipeline(
        "a cat",
        height=64,
        width=64,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=latents,
        output_type="latent",
        **options,
    )
    with torch.no_grad():
        conditioning = family.encode_prompt(models, ["a cat"])
        ours = family.denoise(models, latents, seen["timestep"].reshape(1), conditioning)
    assert (ours - seen["output"]).abs().max() <= 1e-6


def test_pictures_go_to_scaled_latents_and_back(case):
    family, models, pipeline = case
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    scale = pipeline.vae.config.scaling_factor
    latents = family.encode_image(models, pixels)
    expected = [pipeline.vae.encode(one).latent_dist.mode() * scale for one in pixels.split(1)]
    assert torch.equal(latents, torch.cat(expected))
    sampled = [family.encode_image(models, pixels, torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*sampled) and not torch.equal(sampled[0], latents)
    decoded = family.decode(models, latents)
    expected = [pipeline.vae.decode(one / scale).sample.clamp(-1, 1) for one in latents.split(1)]
    assert torch.equal(decoded, torch.cat(expected))


def test_the_vae_takes_pictures_one_by_one_to_the_same_result(case):
    family, models, pipeline = case
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    at_once = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    sizes = []
    encoder = models.parts["vae"].encoder
    with encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0]))):
        assert (family.encode_image(models, pixels) - at_once).abs().max() <= 1e-5
    assert sizes == [1, 1, 1]
    at_once_decoded = pipeline.vae.decode(at_once / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    assert (family.decode(models, at_once) - at_once_decoded).abs().max() <= 1e-5


def test_text_encoders_get_gradients(case):
    family, models, _ = case
    weights = [models.parts[name].get_input_embeddings().weight for name in models.tokenizers]
    for weight in weights:
        weight.requires_grad_(True)
    conditioning = family.encode_prompt(models, ["a cat"])
    family.denoise(models, torch.ones(1, 4, 8, 8), torch.tensor([10]), conditioning).sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in weights)
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None


class Nested(nn.Module):
    """CLIPTextModel as transformers 4 builds it."""

    def __init__(self, text_model):
        super().__init__()
        self.text_model = text_model


def test_text_encoder_names_are_the_same_under_transformers_4_and_5():
    family, models = load_base(str(tiny.folder("sd15")))
    flat = models.parts["text_encoder"]
    flat = getattr(flat, "text_model", flat)
    names = []
    for encoder in (flat, Nested(flat)):
        prefixes = family.prefixes(Models({**models.parts, "text_encoder": encoder}, {}, {}, ""))
        names.append({f"{prefix}.{path}" for prefix, module in prefixes.items() for path, _ in module.named_modules()})
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    assert layer in names[0] and layer in names[1]
    assert {name for name in names[0] ^ names[1] if ".layers." in name} == set()


# -- loading ----------------------------------------------------------------------------------

PLACES = {
    "nothing-here": "there is no model at",
    "nothing.safetensors": "there is no model at",
    "/nowhere/at/all": "there is no model at",
    "{tmp}": "no model_index.json",
    "{tmp}/damaged": "damaged",
    "{tmp}/other": "is a PixArtAlphaPipeline",
    "{tmp}/no-weights": "cannot be loaded",
    "{tmp}/text.safetensors": "cannot be read",
    "{tmp}/adapter.safetensors": "is it an adapter",
    "{tmp}/model.ckpt": r"not a \.safetensors",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name, index in {"damaged": "{", "other": '{"_class_name": "PixArtAlphaPipeline"}'}.items():
        (folder / name).mkdir()
        (folder / name / "model_index.json").write_text(index)
    shutil.copytree(tiny.folder("sd15"), folder / "no-weights", ignore=shutil.ignore_patterns("diffusion_pytorch_*"))
    (folder / "text.safetensors").write_text("not tensors")
    (folder / "model.ckpt").write_text("not tensors")
    save_file({"lora_unet_conv_in.lora_up.weight": torch.ones(1)}, folder / "adapter.safetensors")
    return folder


@pytest.mark.parametrize("source", PLACES)
def test_a_base_that_cannot_be_loaded_is_one_clear_error(source, places):
    with pytest.raises(ConfigError, match=PLACES[source]) as caught:
        load_base(source.format(tmp=places))
    assert caught.value.exit_code == 2


def test_a_hub_model_out_of_reach_is_one_clear_error(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = "'someone/some-model' is not a folder here .* the hub cannot be reached"
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ConfigError, match=message):
            load_base("someone/some-model", dtype)


def test_half_precision_takes_the_hubs_smaller_files_where_it_has_them(monkeypatch):
    index = {"_class_name": "StableDiffusionPipeline"}
    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", lambda source: index)
    asked = []
    for has_variant in (True, False):

        def from_pretrained(source, variant=None, has_variant=has_variant, **options):
            asked.append(variant)
            if variant and not has_variant:
                raise ValueError("no such modeling files are available")
            return tiny.pipeline("sd15")

        monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_pretrained", from_pretrained)
        load_base("someone/some-model", torch.bfloat16)
    load_base("someone/some-model", torch.float32)
    assert asked == ["fp16", "fp16", None, None]


def test_bases_for_something_else_are_refused(tmp_path):
    painter = tmp_path / "inpainting"
    shutil.copytree(tiny.folder("sd15"), painter)
    unet = tiny.unet("sd15", in_channels=9)
    unet.save_pretrained(painter / "unet")
    with pytest.raises(ConfigError, match=r"takes 9 channels .* have 4: inpainting .* not supported yet") as caught:
        load_base(str(painter))
    assert caught.value.exit_code == 2
    refiner = tiny.pipeline("sdxl")
    refiner.register_modules(text_encoder=None, tokenizer=None)
    refiner.save_pretrained(tmp_path / "refiner")
    with pytest.raises(ConfigError, match="has no text_encoder: such variants are not supported yet"):
        load_base(str(tmp_path / "refiner"))


def test_the_prediction_type_can_be_told():
    source = str(tiny.folder("sd2"))
    for asked, expected in {"auto": "v_prediction", "epsilon": "epsilon"}.items():
        family, models = load_base(source, prediction_type=asked)
        assert family.prediction_type(models) == expected


def test_captions_beyond_the_tokenizer_are_found(case):
    family, models, _ = case
    assert family.too_long(models, ["x " * 75, "y " * 76, "", "z " * 200]) == ["y " * 76, "z " * 200]


def test_a_single_file_whose_tokenizer_cannot_be_had_names_the_settings(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_file(ldm_checkpoint(tiny.pipeline("sd15")), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"--set model\.config=DIR \(train\) or --model-config DIR"):
        load_base(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("kind", ["sd15"])
def test_a_single_file_with_a_local_config_is_the_same_model(kind, tmp_path):
    pipeline = tiny.pipeline(kind)
    save_file(ldm_checkpoint(pipeline), tmp_path / "model.safetensors")
    family, models = load_base(str(tmp_path / "model.safetensors"), config=str(tiny.folder(kind)))
    reference = SimpleNamespace(parts=dict(pipeline.components))
    for component in ("unet", "text_encoder", "vae"):
        own = models.parts[component].state_dict()
        for name, tensor in reference.parts[component].state_dict().items():
            assert torch.equal(own[name], tensor), (component, name)
    assert family.encode_prompt(models, ["a cat"]).encoder_hidden_states.shape == (1, 77, 16)


def ldm_checkpoint(pipeline) -> dict[str, torch.Tensor]:
    """The pipeline's weights under the names of a Stable Diffusion 1 checkpoint."""
    tensors = {}
    names = LDMNames(pipeline.unet.config)
    for key, tensor in pipeline.unet.state_dict().items():
        path, _, end = key.rpartition(".")
        ldm = names.to_ldm(path)
        tensors[f"model.diffusion_model.{ldm}.{end}"] = tensor
    for key, tensor in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    levels = len(pipeline.vae.config.block_out_channels)
    for key, tensor in pipeline.vae.state_dict().items():
        tensors[f"first_stage_model.{ldm_vae_name(key, levels)}"] = tensor
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def ldm_vae_name(key: str, levels: int) -> str:
    def up(match: re.Match[str]) -> str:
        return f"up.{levels - 1 - int(match[1])}"

    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    key = re.sub(r"up_blocks\.(\d)", up, key.replace("down_blocks.", "down."))
    for ours, theirs in {
        "mid_block.attentions.0": "mid.attn_1",
        "resnets": "block",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
        "group_norm": "norm",
        "to_out.0": "proj_out",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
    }.items():
        key = key.replace(ours, theirs)
    return key


def test_published_models_have_roles_for_all_their_attention(case):
    family = case[0]
    models = FAMILIES[family.name].reference()
    attention = [
        path for path, _ in models.parts["unet"].named_modules() if re.search(r"attn\d\.to_(q|k|v|out\.0)$", path)
    ]
    (pattern,) = family.roles["attention"]
    assert attention and all(re.fullmatch(pattern, f"unet.{path}") for path in attention)
