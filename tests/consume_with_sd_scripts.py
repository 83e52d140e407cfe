"""Loads adapter files with a checkout of kohya's sd-scripts alone, in a process of its own, and says what they do.

Arguments as for `consume_with_diffusers.py`, with the checkout's folder last; writes for each file: every component's
output with the network applied, the keys that it did not take, and module -> change of its weight by `merge_to`.
For SDXL and FLUX the denoiser is sd-scripts' own, of the tiny base's size, with the base's weights.
"""

from __future__ import annotations

import functools
import json
import sys
import types

import diffusers
import peft  # noqa: F401  before the stand-ins below
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextModel, T5EncoderModel  # noqa: F401

FLUX = {"in_channels": 16, "vec_in_dim": 16, "context_in_dim": 16, "hidden_size": 16, "mlp_ratio": 4.0, "num_heads": 2}
FLUX |= {"depth": 2, "depth_single_blocks": 2, "axes_dim": [2, 2, 4], "theta": 10_000, "qkv_bias": True}


class Anything:
    """Stands for whatever sd-scripts imports and no network needs: it is called and built with any arguments."""

    def __init__(self, *args, **options):
        pass

    def __getattr__(self, name):
        return Anything

    def __call__(self, *args, **options):
        return self


def stand_in(*names):
    for name in names:
        module = types.ModuleType(name)
        module.__getattr__ = lambda _: Anything
        sys.modules[name] = module


class Wrapped(torch.nn.Module):
    """A text encoder under the name that its modules had before transformers 5."""

    def __init__(self, clip):
        super().__init__()
        self.text_model = clip

    def forward(self, **arguments):
        return self.text_model(**arguments)


def wrapped(encoder):
    return Wrapped(encoder) if hasattr(encoder, "embeddings") else encoder


class Xl(torch.nn.Module):
    """sd-scripts' U-Net of SDXL, called as diffusers' is."""

    def __init__(self, base):
        super().__init__()
        from library import sdxl_model_util, sdxl_original_unet

        sizes = base.config
        sdxl_original_unet.MODEL_CHANNELS = sizes.block_out_channels[0]
        sdxl_original_unet.TIME_EMBED_DIM = 4 * sizes.block_out_channels[0]
        sdxl_original_unet.ADM_IN_CHANNELS = sizes.projection_class_embeddings_input_dim
        self.unet = sdxl_original_unet.SdxlUNet2DConditionModel()
        for name, module in self.unet.named_modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.num_groups = sizes.norm_num_groups
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                module.in_features = sizes.cross_attention_dim
                module.weight = torch.nn.Parameter(torch.empty(module.out_features, module.in_features))
        self.unet.load_state_dict(sdxl_model_util.convert_diffusers_unet_state_dict_to_sdxl(base.state_dict()))
        self.add_time_proj = base.add_time_proj

    def forward(self, sample, timestep, encoder_hidden_states, added_cond_kwargs):
        sizes = added_cond_kwargs["time_ids"]
        embedded = self.add_time_proj(sizes.flatten()).reshape(len(sizes), -1)
        vector = torch.cat([added_cond_kwargs["text_embeds"], embedded], dim=1)
        found = self.unet(sample, timestep, encoder_hidden_states, vector)
        return diffusers.utils.BaseOutput(sample=found)


class Flux(torch.nn.Module):
    """sd-scripts' FLUX, called as diffusers' is."""

    def __init__(self, base):
        super().__init__()
        from library import flux_models, flux_utils

        self.flux = flux_models.Flux(flux_models.FluxParams(**FLUX, guidance_embed=True))
        blocks = FLUX["depth"], FLUX["depth_single_blocks"]
        self.flux.load_state_dict(flux_utils.convert_diffusers_sd_to_bfl(base.state_dict(), *blocks))

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, img_ids, txt_ids, guidance):
        ids = [one.expand(len(hidden_states), -1, -1) for one in (img_ids, txt_ids)]
        given = (hidden_states, ids[0], encoder_hidden_states, ids[1], timestep, pooled_projections)
        return diffusers.utils.BaseOutput(sample=self.flux(*given, guidance=guidance))


@functools.cache
def loaded(kind, base):
    """The components of a base as sd-scripts has them."""
    if kind == "flux":
        rest = dict.fromkeys(("scheduler", "vae", "tokenizer", "tokenizer_2"))
        pipeline = FluxPipeline.from_pretrained(base, **rest)
        encoders = {"text_encoder": wrapped(pipeline.text_encoder), "text_encoder_2": pipeline.text_encoder_2}
        return {**encoders, "transformer": Flux(pipeline.transformer)}
    if kind == "sd15":
        pipeline = StableDiffusionPipeline.from_pretrained(base)
        return {"text_encoder": wrapped(pipeline.text_encoder), "unet": pipeline.unet}
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    encoders = {name: wrapped(getattr(pipeline, name)) for name in ("text_encoder", "text_encoder_2")}
    return {**encoders, "unet": Xl(pipeline.unet)}


def network_for(job):
    """(components, network, tensors) of a file, on fresh components."""
    import copy

    from networks import lora, lora_flux

    parts = copy.deepcopy(loaded(job["kind"], job["base"]))
    encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
    denoiser = parts.get("transformer") or parts["unet"]
    denoiser = getattr(denoiser, "unet", getattr(denoiser, "flux", denoiser))
    module = lora_flux if job["kind"] == "flux" else lora
    texts = encoders if len(encoders) > 1 else encoders[0]
    network, tensors = module.create_network_from_weights(1.0, job["file"], None, texts, denoiser, for_inference=True)
    return parts, texts, denoiser, network, tensors


@torch.no_grad()
def consume(job, inputs):
    from component_outputs import outputs

    parts, texts, denoiser, network, tensors = network_for(job)
    network.apply_to(texts, denoiser)
    try:
        info = network.load_state_dict(tensors, strict=False)
    except RuntimeError as problem:
        return {"refused": str(problem)}
    found = outputs(parts, inputs[job["kind"]])
    _, texts, denoiser, network, tensors = network_for(job)
    adapters = network.text_encoder_loras + network.unet_loras
    before = {one.lora_name: one.org_module.weight.clone() for one in adapters}
    network.merge_to(texts, denoiser, tensors, torch.float32, "cpu")
    changes = {one.lora_name: one.org_module.weight - before[one.lora_name] for one in adapters}
    return {"outputs": found, "changes": changes, "unexpected": list(info.unexpected_keys), "refused": ""}


def main(jobs, inputs, output, tests, checkout):
    torch.set_num_threads(1)
    stand_in("cv2", "imagesize", "torchvision", "torchvision.transforms")
    sys.path += [checkout, tests]
    inputs = torch.load(inputs)
    results = [consume(job, inputs) for job in json.loads(jobs)]
    ours = [name for name in sys.modules if name.partition(".")[0] in ("studio", "trainers")]
    torch.save({"results": results, "ours": ours}, output)


main(*sys.argv[1:])
