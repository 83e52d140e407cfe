"""Tiny random FLUX and Stable Diffusion 3 parts: real structure, few channels, no zeros."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tiny import fill, text_encoder
from torch import nn

from studio.families.base import Models

FAMILIES = ("flux", "sd3")


@functools.cache
def models(family: str) -> Models:
    """The adaptable parts of a tiny base, the same in every process."""
    with torch.random.fork_rng():
        parts: dict[str, nn.Module] = {"text_encoder": text_encoder(projection=family == "sd3")}
        if family == "sd3":
            parts |= {"text_encoder_2": text_encoder(projection=True), "text_encoder_3": t5(), "transformer": sd3()}
        else:
            parts |= {"text_encoder_2": t5(), "transformer": flux()}
        for seed, part in enumerate(parts.values()):
            fill(part, seed)
    return Models(parts, tokenizers={}, scheduler={}, source=family)


def flux(guidance: bool = True) -> nn.Module:
    """Two double and two single blocks of width 16."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )


def sd3() -> nn.Module:
    """Two joint blocks of width 16: the last one has no text output."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )


def t5() -> nn.Module:
    """T5's encoder with one block of width 16."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=40, feed_forward_proj="gated-gelu", **sizes))


def predict(family: str, base: Models) -> torch.Tensor:
    """The transformer's output for two fixed latents, texts and timesteps."""
    draw = torch.Generator().manual_seed(6)
    inputs: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=draw),
        "pooled_projections": torch.randn(2, 16, generator=draw),
        "timestep": torch.tensor([0.1, 0.7]),
    }
    if family == "flux":
        inputs |= {"img_ids": torch.zeros(9, 3), "txt_ids": torch.zeros(5, 3), "guidance": torch.tensor([3.0, 3.0])}
        inputs["hidden_states"] = torch.randn(2, 9, 16, generator=draw)
    else:
        inputs["hidden_states"] = torch.randn(2, 4, 8, 8, generator=draw)
    with torch.no_grad():
        return base.parts["transformer"](**inputs, return_dict=False)[0]
