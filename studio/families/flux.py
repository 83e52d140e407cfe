"""FLUX.1: a rectified-flow transformer with double and single blocks, a CLIP-L and a T5 encoder (Black Forest Labs).

Only its names and its parts so far: adapters for it can be read, converted and merged, not trained.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from studio.adapters.targets import Roles
from studio.errors import ConfigError, nearest
from studio.families.base import FAMILIES, ModelFamily, Models
from studio.families.loading import load_pipeline
from studio.families.reference import CLIP_L, T5_XXL, meta_models
from studio.families.sd import UNET_ROLES

_DOUBLE, _SINGLE = r"transformer\.transformer_blocks\.\d+\.", r"transformer\.single_transformer_blocks\.\d+\."
T5_ROLE = (r"text_encoder_[23]\.encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.w\w+)",)
JOINT_ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
FEED_FORWARD = r"ff(_context)?\.net\.(0\.proj|2)"

VARIANTS: dict[str, dict[str, Any]] = {
    "flux1-dev": {"guidance_embeds": True},
    "flux1-schnell": {"guidance_embeds": False},
}


class Flux(ModelFamily):
    """FLUX.1 dev and schnell, of any size."""

    name = "flux"
    components: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "transformer")
    roles: ClassVar[Roles] = {
        "attention": (_DOUBLE + JOINT_ATTENTION, _SINGLE + r"attn\.to_[qkv]"),
        # a single block's last product takes the attention's output with the feed-forward's
        "feed-forward": (_DOUBLE + FEED_FORWARD, _SINGLE + r"proj_(mlp|out)"),
        "modulation": (_DOUBLE + r"norm1(_context)?\.linear", _SINGLE + r"norm\.linear"),
        "double-blocks": (_DOUBLE + rf"({JOINT_ATTENTION}|{FEED_FORWARD}|norm1(_context)?\.linear)",),
        "single-blocks": (_SINGLE + r"(attn\.to_[qkv]|proj_(mlp|out)|norm\.linear)",),
        "embedders": (r"transformer\.((x|context)_embedder|time_text_embed\.\w+\.linear_[12])",),
        "output": (r"transformer\.(norm_out\.linear|proj_out)",),
        "text-encoder": UNET_ROLES["text-encoder"],
        "t5": T5_ROLE,
    }
    default_targets = ("attention", "feed-forward", "modulation")

    def load(self, source: str, dtype: torch.dtype = torch.float32, config: str | None = None) -> Models:
        return load_pipeline("FluxPipeline", source, dtype, config, ("image_encoder", "feature_extractor"))

    def reference(self, variant: str = "flux1-dev") -> Models:
        return meta_models(
            self.name,
            {
                "text_encoder": ("CLIPTextModel", CLIP_L),
                "text_encoder_2": ("T5EncoderModel", T5_XXL),
                "transformer": ("FluxTransformer2DModel", chosen(variant, VARIANTS)),
            },
        )


def chosen(variant: str, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The configuration of a published model. Raises ConfigError for one that there is not."""
    if variant not in variants:
        raise ConfigError(f"unknown model '{variant}'.{nearest(variant, variants)} Models: {', '.join(variants)}")
    return variants[variant]


FAMILIES["flux"] = Flux()
