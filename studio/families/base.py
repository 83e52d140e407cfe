"""What an architecture tells the studio: its components, target roles, key names, and how to run it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from studio.adapters.targets import Roles


@dataclass
class Models:
    """The loaded parts of a base. `parts` holds nn.Modules by component name ("unet", "vae",
    "text_encoder", "text_encoder_2"); `tokenizers` by the name of their text encoder;
    `scheduler` is a diffusers scheduler config as a dict; `source` is what the user asked for. `words` are those
    that stand for trained vectors in prompts, word -> text encoder -> (vectors, width)."""

    parts: dict[str, nn.Module]
    tokenizers: dict[str, Any]
    scheduler: dict[str, Any]
    source: str
    info: dict[str, Any] = field(default_factory=dict)
    words: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)


def vae_factor(models: Models) -> int:
    """Pixels per latent, in each direction."""
    return 2 ** (len(models.parts["vae"].config.block_out_channels) - 1)


def latent_statistics(models: Models) -> tuple[float, float]:
    """(shift, scale) between the VAE's latents and those that the denoiser sees: (z - shift) * scale."""
    config = models.parts["vae"].config
    return config.get("shift_factor") or 0.0, config.get("scaling_factor", 0.18215)


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts. `encoder_hidden_states` is (B, tokens, width); `pooled` (B, width) where the
    family has one (SDXL)."""

    encoder_hidden_states: Tensor
    pooled: Tensor | None = None


class ModelFamily:
    """An architecture, whatever its size: the tiny model of a test and the full one are the same family."""

    name: ClassVar[str]
    components: ClassVar[tuple[str, ...]]  # adaptable parts, in kohya's order
    roles: ClassVar[Roles]
    default_targets: ClassVar[tuple[str, ...]]

    def prefixes(self, models: Models) -> dict[str, nn.Module]:
        """Name prefix -> adaptable module, in the canonical naming of `AdapterState`.

        transformers 5 flattened CLIPTextModel: its modules then lie where `text_model.`'s were. A component
        that a base does without (SD3's T5) has none.
        """
        prefixes: dict[str, nn.Module] = {}
        for component in (name for name in self.components if name in models.parts):
            module = models.parts[component]
            flattened_clip = hasattr(module, "embeddings")
            prefixes[f"{component}.text_model" if flattened_clip else component] = module
        return prefixes

    def load(self, source: str, dtype: torch.dtype = torch.float32, config: str | None = None) -> Models:
        """Loads a base from a hub id, a diffusers folder or a single-file checkpoint.

        A single file holds neither configurations nor tokenizers: they come from `config`, a diffusers
        folder, or from the hub. Raises ConfigError where a part cannot be found.
        """
        raise NotImplementedError

    def reference(self, variant: str = "") -> Models:
        """The full-size published model on the meta device: names and shapes, no weights.

        `variant` picks one where a family has several ("sd1", "sd2"). Tokenizers and scheduler are empty.
        """
        raise NotImplementedError


FAMILIES: dict[str, ModelFamily] = {}


class DiffusionFamily(ModelFamily):
    """A family that denoises latents."""

    def encode_image(self, models: Models, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents (B, C, h, w) of `pixels` (B, 3, H, W) in [-1, 1]; the mean without a generator."""
        raise NotImplementedError

    def encode_tokens(self, models: Models, tokens: Mapping[str, Tensor], clip_skip: int = 0) -> Conditioning:
        """Encodes token ids (B, T) by the name of their text encoder; T is at most the tokenizer's length.

        `encoder_hidden_states` joins the encoders' widths in the order of `models.tokenizers`.
        `clip_skip` is the number of last layers left out, 0 for none (A1111 counts from 1).
        Gradients flow into the text encoders. The primitive of `encode_prompt`, and of prompts
        with weights or of any length.
        """
        raise NotImplementedError

    def tokenize(self, models: Models, prompts: list[str]) -> dict[str, Tensor]:
        """Token ids (B, T) of plain prompts by the name of their text encoder, cut at and filled up to
        the tokenizer's length T."""
        return {
            name: tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for name, tokenizer in models.tokenizers.items()
        }

    def too_long(self, models: Models, captions: Iterable[str]) -> list[str]:
        """The captions that `tokenize` cuts, in their order: more tokens than a tokenizer's length, with
        its start and end token."""
        return [
            caption
            for caption in captions
            if any(
                len(tokenizer(caption, verbose=False).input_ids) > tokenizer.model_max_length
                for tokenizer in models.tokenizers.values()
            )
        ]

    def encode_prompt(self, models: Models, prompts: list[str], clip_skip: int = 0) -> Conditioning:
        """Encodes plain prompts, cut at the tokenizer's length. Gradients flow into text encoders."""
        return self.encode_tokens(models, self.tokenize(models, prompts), clip_skip)

    def denoise(
        self,
        models: Models,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """The network's raw prediction, shape of `noisy_latents`; `timesteps` (B,) are integers in
        [0, 1000). `sizes` (B, 6) holds SDXL's original, crop and target sizes in pixels."""
        raise NotImplementedError

    def decode(self, models: Models, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] of scaled latents."""
        raise NotImplementedError

    def prediction_type(self, models: Models) -> str:
        """ "epsilon" or "v_prediction" ("flow" for later families), from the base's scheduler config."""
        return models.scheduler.get("prediction_type", "epsilon")
