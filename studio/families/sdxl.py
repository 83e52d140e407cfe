"""Stable Diffusion XL: two text encoders, their pooled text and the picture's sizes as conditions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from studio.families.base import FAMILIES, Conditioning, Models, vae_factor
from studio.families.reference import CLIP_BIG_G, CLIP_L, meta_models
from studio.families.sd import StableDiffusion

SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL base models, epsilon and v-prediction."""

    name = "sdxl"
    components = ("text_encoder", "text_encoder_2", "unet")
    pipeline = "StableDiffusionXLPipeline"
    left_out = ()

    def reference(self, variant: str = "sdxl") -> Models:
        return meta_models(
            self.name,
            {
                "text_encoder": ("CLIPTextModel", CLIP_L),
                "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_BIG_G),
                "unet": ("UNet2DConditionModel", SDXL_UNET),
            },
        )

    def encode_tokens(self, models: Models, tokens: Mapping[str, Tensor], clip_skip: int = 0) -> Conditioning:
        """The last but one hidden states of both encoders side by side, and the second's pooled text."""
        hidden = []
        for name in ("text_encoder", "text_encoder_2"):
            encoder = models.parts[name]
            output = encoder(tokens[name].to(encoder.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2 - clip_skip])
        return Conditioning(torch.cat(hidden, dim=-1), output.text_embeds)

    def added_conditions(
        self, models: Models, noisy_latents: Tensor, conditioning: Conditioning, sizes: Tensor | None
    ) -> dict[str, Tensor]:
        """`sizes` (B, 6) defaults to an uncropped picture of the latents' own size."""
        if sizes is None:
            height, width = (side * vae_factor(models) for side in noisy_latents.shape[-2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(noisy_latents), 6)
        assert conditioning.pooled is not None, "SDXL needs pooled text"
        return {
            "text_embeds": conditioning.pooled,
            "time_ids": sizes.to(noisy_latents.device, conditioning.pooled.dtype),
        }


FAMILIES["sdxl"] = StableDiffusionXL()
