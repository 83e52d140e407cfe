"""The hub type of every adapter file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class AdapterState:
    """An adapter apart from any model or file.

    `tensors["unet.down_blocks.0.attentions.0.proj_in"]["lora_down.weight"]`: full layer name in the
    canonical naming (diffusers' module paths below the component's name; text encoders always with
    `text_model.`, whatever the transformers version) -> on-disk suffix (kohya's and LyCORIS's) ->
    tensor. A LoRA's `alpha` is always present: the effective scale is alpha / rank.
    `metadata` holds safetensors strings (`ss_*`, `modelspec.*`, ours).
    """

    method: str
    family: str
    tensors: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str] = field(default_factory=dict)
