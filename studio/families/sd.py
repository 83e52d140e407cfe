"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a U-Net with cross-attention, an AutoencoderKL.

Whether a base predicts the noise or the velocity is in its scheduler config, not in the family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from studio.adapters.targets import Roles
from studio.families.base import FAMILIES, Conditioning, DiffusionFamily, Models, latent_statistics
from studio.families.loading import load_pipeline
from studio.families.reference import CLIP_H, CLIP_L, Parts, meta_models

UNET_ROLES: Roles = {
    "attention": (r"unet\..+\.attn[12]\.to_(q|k|v|out\.0)",),
    "self-attention": (r"unet\..+\.attn1\.to_(q|k|v|out\.0)",),
    "cross-attention": (r"unet\..+\.attn2\.to_(q|k|v|out\.0)",),
    "feed-forward": (r"unet\..+\.ff\.net\.(0\.proj|2)",),
    "projections": (r"unet\..+\.attentions\.\d+\.proj_(in|out)",),
    # with the time projections inside the ResNet blocks, as kohya's convolution set has them
    "convolutions": (
        r"unet\..+\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)",
        r"unet\..+\.(down|up)samplers\.\d+\.conv",
    ),
    "time-embedding": (r"unet\.(time|add)_embedding\.linear_[12]",),
    "text-encoder": (r"text_encoder(_2)?\.text_model\.encoder\.layers\.\d+\.(self_attn\.\w+_proj|mlp\.fc[12])",),
}

_BLOCKS = {
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
}
SD1_UNET = {**_BLOCKS, "cross_attention_dim": 768}
SD2_UNET = {
    **_BLOCKS,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}


class StableDiffusion(DiffusionFamily):
    """Stable Diffusion 1.x and 2.x, epsilon and v-prediction, of any size."""

    name = "sd"
    components: ClassVar[tuple[str, ...]] = ("text_encoder", "unet")
    roles = UNET_ROLES
    default_targets = ("attention", "feed-forward", "projections")
    pipeline: ClassVar[str] = "StableDiffusionPipeline"  # diffusers' class for loading
    left_out: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor")  # parts of it that nothing here uses

    def load(self, source: str, dtype: torch.dtype = torch.float32, config: str | None = None) -> Models:
        return load_pipeline(self.pipeline, source, dtype, config, self.left_out)

    def reference(self, variant: str = "sd1") -> Models:
        unet, encoder = (SD2_UNET, CLIP_H) if variant == "sd2" else (SD1_UNET, CLIP_L)
        parts: Parts = {"text_encoder": ("CLIPTextModel", encoder), "unet": ("UNet2DConditionModel", unet)}
        return meta_models(self.name, parts)

    @torch.no_grad()
    def encode_image(self, models: Models, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        vae = models.parts["vae"]
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        shift, scale = latent_statistics(models)
        return (latents - shift) * scale

    def encode_tokens(self, models: Models, tokens: Mapping[str, Tensor], clip_skip: int = 0) -> Conditioning:
        encoder = models.parts["text_encoder"]
        output = encoder(tokens["text_encoder"].to(encoder.device), output_hidden_states=clip_skip > 0)
        if clip_skip == 0:
            return Conditioning(output.last_hidden_state)
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        return Conditioning(norm(output.hidden_states[-1 - clip_skip]))

    def denoise(
        self,
        models: Models,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        sizes: Tensor | None = None,
    ) -> Tensor:
        extra = self.added_conditions(models, noisy_latents, conditioning, sizes)
        unet = models.parts["unet"]
        return unet(noisy_latents, timesteps, conditioning.encoder_hidden_states, added_cond_kwargs=extra).sample

    def added_conditions(
        self, models: Models, noisy_latents: Tensor, conditioning: Conditioning, sizes: Tensor | None
    ) -> dict[str, Tensor] | None:
        """What the U-Net takes beside timestep and text; nothing in this family."""
        return None

    @torch.no_grad()
    def decode(self, models: Models, latents: Tensor) -> Tensor:
        vae = models.parts["vae"]
        shift, scale = latent_statistics(models)
        return vae.decode((latents / scale + shift).to(vae.dtype)).sample.clamp(-1, 1)


FAMILIES["sd"] = StableDiffusion()
