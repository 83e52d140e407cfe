"""Stable Diffusion 3 and 3.5: a multimodal diffusion transformer, two CLIP encoders and a T5 (arXiv:2403.03206).

Only its names and its parts so far: adapters for it can be read, converted and merged, not trained.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from studio.adapters.targets import Roles
from studio.families.base import FAMILIES, ModelFamily, Models
from studio.families.flux import FEED_FORWARD, JOINT_ATTENTION, T5_ROLE, chosen
from studio.families.loading import load_pipeline
from studio.families.reference import CLIP_BIG_G, CLIP_L, T5_XXL, meta_models
from studio.families.sd import UNET_ROLES

_BLOCK = r"transformer\.transformer_blocks\.\d+\."

_COMMON: dict[str, Any] = {"patch_size": 2, "in_channels": 16, "out_channels": 16, "pooled_projection_dim": 2048}
_MEDIUM = {**_COMMON, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
_LARGE = {**_COMMON, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
VARIANTS: dict[str, dict[str, Any]] = {
    "sd3-medium": {**_MEDIUM, "pos_embed_max_size": 192},
    "sd35-medium": {
        **_MEDIUM,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    },
    "sd35-large": {**_LARGE, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
}


class StableDiffusion3(ModelFamily):
    """Stable Diffusion 3 medium, 3.5 medium and 3.5 large, of any size, with or without T5."""

    name = "sd3"
    components: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer")
    roles: ClassVar[Roles] = {
        "attention": (_BLOCK + JOINT_ATTENTION, _BLOCK + r"attn2\.(to_[qkv]|to_out\.0)"),
        "feed-forward": (_BLOCK + FEED_FORWARD,),
        "modulation": (_BLOCK + r"norm1(_context)?\.linear",),
        "embedders": (r"transformer\.(pos_embed\.proj|context_embedder|time_text_embed\.\w+\.linear_[12])",),
        "output": (r"transformer\.(norm_out\.linear|proj_out)",),
        "text-encoder": UNET_ROLES["text-encoder"],
        "t5": T5_ROLE,
    }
    default_targets = ("attention", "feed-forward", "modulation")

    def load(self, source: str, dtype: torch.dtype = torch.float32, config: str | None = None) -> Models:
        return load_pipeline("StableDiffusion3Pipeline", source, dtype, config, ("image_encoder", "feature_extractor"))

    def reference(self, variant: str = "sd3-medium") -> Models:
        return meta_models(
            self.name,
            {
                "text_encoder": ("CLIPTextModelWithProjection", {**CLIP_L, "projection_dim": 768}),
                "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_BIG_G),
                "text_encoder_3": ("T5EncoderModel", T5_XXL),
                "transformer": ("SD3Transformer2DModel", chosen(variant, VARIANTS)),
            },
        )


FAMILIES["sd3"] = StableDiffusion3()
