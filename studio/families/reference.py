"""Published models on the meta device, names and shapes without weights, and the text encoders that families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from studio.families.base import Models

Parts = Mapping[str, tuple[str, Mapping[str, Any]]]  # component -> (class of transformers or diffusers, its config)

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
# OpenCLIP ViT-H without its last layer, as Stable Diffusion 2 uses it
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


def meta_models(source: str, parts: Parts) -> Models:
    """The parts on the meta device."""
    import diffusers
    import transformers

    modules: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for component, (kind, config) in parts.items():
            if hasattr(transformers, kind):
                encoder = getattr(transformers, kind)
                modules[component] = encoder(encoder.config_class(**config))
            else:
                modules[component] = getattr(diffusers, kind)(**config)
    return Models(modules, tokenizers={}, scheduler={}, source=source)
