"""Tiny random Stable Diffusion 1.5, 2 (v-prediction) and XL pipelines: real structure, few channels, no zeros.

`folder("sd15")` is a diffusers folder, made once per process and removed when the process ends.
"""

from __future__ import annotations

import atexit
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from studio.adapters import AdapterConfig, AdapterPlan, AdapterSet, inject
from studio.families.base import DiffusionFamily, Models
from studio.families.loading import load_base
from studio.formats import write_adapter
from studio.formats.state import AdapterState

ROOT = tempfile.TemporaryDirectory(prefix="tiny-")
atexit.register(ROOT.cleanup)

KINDS = ("sd15", "sd2", "sdxl")
PROMPTS = ["a cat", "two dogs, sitting"]
TARGETS = ("attention", "feed-forward", "projections", "convolutions", "text-encoder")


@functools.cache
def folder(kind: str) -> Path:
    """The diffusers folder of a tiny pipeline; 64 pixels, 8 pixels per latent, prompts of 77 tokens."""
    place = Path(ROOT.name) / kind
    pipeline(kind).save_pretrained(place)
    return place


def pipeline(kind: str) -> Any:
    """A diffusers pipeline with random weights, the same in every process."""
    import diffusers

    # both would take the global random stream for their initial weights, which fill() then replaces
    with torch.random.fork_rng():
        parts: dict[str, Any] = {
            "vae": fill(vae(), 1),
            "unet": fill(unet(kind), 2),
            "text_encoder": fill(text_encoder(projection=False), 3),
            "tokenizer": tokenizer(),
            "scheduler": scheduler(kind),
        }
        if kind == "sdxl":
            parts |= {"text_encoder_2": fill(text_encoder(projection=True), 4), "tokenizer_2": tokenizer()}
            return diffusers.StableDiffusionXLPipeline(**parts)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def fill(module: nn.Module, seed: int) -> nn.Module:
    """Random values in every parameter: unit-gain weights, norms about 1, biases about 0, never exactly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
    return module.eval().requires_grad_(False)


def vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


def unet(kind: str, in_channels: int = 4) -> nn.Module:
    """Two levels for Stable Diffusion; SDXL keeps its three, with fewer transformer blocks in the last."""
    from diffusers import UNet2DConditionModel

    common = {"in_channels": in_channels, "sample_size": 8, "layers_per_block": 2, "norm_num_groups": 4}
    if kind == "sdxl":
        return UNet2DConditionModel(
            **common,
            block_out_channels=(8, 16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(1, 2, 4),
            cross_attention_dim=32,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 * 6 + 16,
        )
    second = {"attention_head_dim": (2, 4), "use_linear_projection": True} if kind == "sd2" else {}
    return UNet2DConditionModel(
        **common,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        **second,
    )


def text_encoder(projection: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        hidden_act="gelu" if projection else "quick_gelu",
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def tokenizer() -> Any:
    """A CLIP tokenizer of printable ASCII, with and without the end-of-word mark, and two merges."""
    from transformers import CLIPTokenizer

    signs = [chr(code) for code in range(33, 127)]
    merges = [("c", "a"), ("ca", "t</w>")]
    tokens = [*signs, *(sign + "</w>" for sign in signs), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def scheduler(kind: str) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if kind == "sd2" else "epsilon",
    )


def random_adapter(kind: str, plan: AdapterPlan | None = None) -> tuple[DiffusionFamily, Models, AdapterSet]:
    """A LoRA of rank 4 and alpha 2 on all of `TARGETS` of a tiny base, attached, every factor random."""
    family, models = load_base(str(folder(kind)))
    plan = plan or AdapterPlan(TARGETS, config=AdapterConfig(rank=4, alpha=2.0))
    adapters = inject(family.prefixes(models), plan, family.roles)
    adapters.eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return family, models, adapters


def state_of(family: DiffusionFamily, adapters: AdapterSet) -> AdapterState:
    """The adapter as a file's content, with some metadata of a training run."""
    return AdapterState(family.name, adapters.state(), {"ss_output_name": "tiny", "ss_seed": "1"})


def write_two(library: Path) -> None:
    """`ink.safetensors` and `wash.safetensors`, random adapters of different ranks."""
    for seed, name in enumerate(("ink", "wash")):
        plan = AdapterPlan(("attention", "text-encoder"), config=AdapterConfig(rank=2 + seed, alpha=1.0))
        family, _, adapters = random_adapter("sd15", plan)
        write_adapter(state_of(family, adapters), library / f"{name}.safetensors")
        adapters.detach()


def predict(family: DiffusionFamily, models: Models) -> torch.Tensor:
    """The noise prediction (2, 4, 8, 8) for two fixed prompts, latents and timesteps."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        conditioning = family.encode_prompt(models, PROMPTS)
        return family.denoise(models, latents, torch.tensor([40, 700]), conditioning)
