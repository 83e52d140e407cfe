"""Where a single-file checkpoint of the original Stable Diffusion code keeps the tensors of a diffusers pipeline.

The names are those of Stable Diffusion 1, 2 and XL: LDM's U-Net and VAE, transformers' CLIP below a prefix, and
OpenCLIP, which stacks the weights of q, k and v along their rows and stores `text_projection` transposed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from studio.families.keys import LDMNames


@dataclass(frozen=True)
class Slot:
    """A tensor's place: a key, and what of it. `part` counts the three equal blocks of rows of a stacked q, k and v;
    `pointwise` matrices are stored as 1x1 kernels."""

    key: str
    part: int | None = None
    transposed: bool = False
    pointwise: bool = False


# family -> text encoder -> the prefix of its keys; Stable Diffusion 1 has CLIP, 2 OpenCLIP, XL both
CLIP = {
    "sd": {"text_encoder": "cond_stage_model.transformer."},
    "sdxl": {"text_encoder": "conditioner.embedders.0.transformer."},
}
OPEN_CLIP = {
    "sd": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {"text_encoder_2": "conditioner.embedders.1.model."},
}
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."


class CheckpointNames:
    """The slots of a checkpoint's tensors. `unet` is what `LDMNames` wants to know of the U-Net, `levels` the number
    of the VAE's resolutions; `open_clip` tells Stable Diffusion 2 from 1."""

    def __init__(self, family: str, unet: Mapping[str, Any], levels: int, open_clip: bool) -> None:
        self._ldm = LDMNames(unet)
        self._levels = levels
        self._clip = {} if family == "sd" and open_clip else CLIP[family]
        self._open_clip = OPEN_CLIP[family] if open_clip else {}

    def slot(self, component: str, name: str) -> Slot | None:
        """Where "conv_in.weight" of the "unet" lies; None for a tensor that such checkpoints do not have."""
        if component == "vae":
            return _vae_slot(name, self._levels)
        if component == "unet":
            path, _, end = name.rpartition(".")
            ldm = self._ldm.to_ldm(path)
            return Slot(f"{_UNET}{ldm}.{end}") if ldm else None
        full = name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"
        if component in self._clip:
            return Slot(self._clip[component] + full)
        slot = _open_clip_slot(full) if component in self._open_clip else None
        return slot and Slot(self._open_clip[component] + slot.key, slot.part, slot.transposed)


def names_of(keys: Iterable[str], family: str) -> CheckpointNames:
    """The names of a checkpoint with these keys, whatever the size of its U-Net; its VAE is left alone."""
    keys = list(keys)
    return CheckpointNames(
        family, unet_structure(keys), 0, any(key.startswith(tuple(OPEN_CLIP[family].values())) for key in keys)
    )


_BLOCK = re.compile(rf"{re.escape(_UNET)}input_blocks\.(\d+)\.(\d+)\.(op|proj_in)?")


def unet_structure(keys: Iterable[str]) -> dict[str, Any]:
    """The block types and layers of a U-Net, which `LDMNames` needs, from the keys of a checkpoint.

    Blocks are numbered through all levels, from 1: the layers of a level, then its downsampler.
    """
    found = [match.groups() for key in keys if (match := _BLOCK.match(key))]
    last = max((int(number) for number, _, _ in found), default=0)
    downsamplers = sorted({int(number) for number, _, kind in found if kind == "op"})
    attentive = {int(number) for number, _, kind in found if kind == "proj_in"}
    layers = (downsamplers[0] if downsamplers else last + 1) - 1
    kinds = [
        "CrossAttnDownBlock2D" if 1 + level * (layers + 1) in attentive else "DownBlock2D"
        for level in range(len(downsamplers) + 1)
    ]
    ups = [kind.replace("Down", "Up") for kind in reversed(kinds)]
    return {"down_block_types": kinds, "up_block_types": ups, "layers_per_block": layers}


# -- text encoders ---------------------------------------------------------------------------

_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_OPEN_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}
_STACKED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OPEN_OUTSIDE = {
    "text_model.embeddings.token_embedding.weight": Slot("token_embedding.weight"),
    "text_model.embeddings.position_embedding.weight": Slot("positional_embedding"),
    "text_model.final_layer_norm.weight": Slot("ln_final.weight"),
    "text_model.final_layer_norm.bias": Slot("ln_final.bias"),
    "text_projection.weight": Slot("text_projection", transposed=True),
}


def _open_clip_slot(name: str) -> Slot | None:
    match = _LAYER.fullmatch(name)
    if match is None:
        return _OPEN_OUTSIDE.get(name)
    block, module, end = f"transformer.resblocks.{match[1]}", match[2], match[3]
    if module in _STACKED:
        return Slot(f"{block}.attn.in_proj_{end}", part=_STACKED.index(module))
    return Slot(f"{block}.{_OPEN_LAYER[module]}.{end}") if module in _OPEN_LAYER else None


# -- VAE -------------------------------------------------------------------------------------

_VAE_WORDS = {
    "down_blocks": "down",
    "resnets": "block",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
}
# the second name is that of older diffusers folders
_VAE_ATTENTION = {"to_q": "q", "query": "q", "to_k": "k", "key": "k", "to_v": "v", "value": "v"}
_VAE_ATTENTION |= {"to_out.0": "proj_out", "proj_attn": "proj_out"}
_ATTENTION = re.compile(rf"(.*)mid_block\.attentions\.0\.({'|'.join(map(re.escape, _VAE_ATTENTION))})\.(weight|bias)")


def _vae_slot(name: str, levels: int) -> Slot:
    """LDM counts the decoder's levels from the picture's side."""
    if match := _ATTENTION.fullmatch(name):
        key = f"{_VAE}{match[1]}mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"
        return Slot(key, pointwise=match[3] == "weight")
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for ours, theirs in sorted(_VAE_WORDS.items(), key=lambda item: -len(item[0])):
        name = name.replace(ours, theirs)
    return Slot(_VAE + name)
