"""Layer names: flattened (kohya's) and dotted, diffusers' and LDM's (the original Stable Diffusion code's).

Those of diffusion transformers are in `dit`. Every map here can be inverted, and none needs a model: a U-Net's
config is enough.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from studio.families.dit import FLUX_NAMES, SD3_NAMES

# path segments with an underscore inside: all that is needed to undo the flattening
WORDS = (
    *("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "time_embedding", "add_embedding"),
    *("linear_1", "linear_2", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "proj_in", "proj_out"),
    *("to_q", "to_k", "to_v", "to_out"),
    *("input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers"),
    *("skip_connection", "time_embed", "label_emb"),
    *("text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "text_projection"),
    *("conv_norm_out", "layer_norm1", "layer_norm2", "final_layer_norm", "token_embedding", "position_embedding"),
    *("single_transformer_blocks", "norm1_context", "ff_context", "norm_q", "norm_k", "norm_added_q", "norm_added_k"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp", "norm_out", "pos_embed", "x_embedder"),
    *("context_embedder", "time_text_embed", "timestep_embedder", "text_embedder", "guidance_embedder"),
    *("wi_0", "wi_1", "layer_norm", "relative_attention_bias", "embed_tokens"),
)
_SEGMENT = re.compile(rf"(?:{'|'.join(WORDS)})(?=_|$)|[^_]+")

_TRANSFORMER = r"transformer_blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2)|norm[123])"
_ATTENTIONS = rf"attentions\.\d+\.(norm|proj_in|proj_out|{_TRANSFORMER})"
_RESNETS = r"resnets\.\d+\.(norm1|conv1|norm2|conv2|conv_shortcut|time_emb_proj)"
UNET_LAYER = re.compile(
    rf"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.({_ATTENTIONS}|{_RESNETS}|(down|up)samplers\.\d+\.conv)"
    r"|(time|add)_embedding\.linear_[12]|conv_in|conv_norm_out|conv_out"
)
CLIP_LAYER = re.compile(
    r"text_model\.(encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]|layer_norm[12])|final_layer_norm"
    r"|embeddings\.(token|position)_embedding)|text_projection"
)
_T5_PARTS = r"SelfAttention\.([qkvo]|relative_attention_bias)|DenseReluDense\.(wi(_[01])?|wo)|layer_norm"
T5_LAYER = re.compile(rf"encoder\.(block\.\d+\.layer\.\d+\.({_T5_PARTS})|final_layer_norm|embed_tokens)|shared")

_RESNET_PARTS = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def flatten(name: str) -> str:
    """ "mid_block.attentions.0.proj_in" -> "mid_block_attentions_0_proj_in"."""
    return name.replace(".", "_")


def unflatten(flat: str) -> str:
    """The inverse of `flatten` for names made of `WORDS` and of segments without underscores."""
    return ".".join(_SEGMENT.findall(flat))


def known_layer(name: str) -> bool:
    """Whether `name` is a full layer name that adapter files have a way to write."""
    component, _, path = name.partition(".")
    if component == "transformer":
        return FLUX_NAMES.to_original(path) is not None or SD3_NAMES.to_original(path) is not None
    return any(grammar.fullmatch(path) for grammar in _GRAMMARS.get(component, ()))


# which kind of encoder is the second depends on the family
_GRAMMARS = {
    "unet": (UNET_LAYER,),
    "text_encoder": (CLIP_LAYER,),
    "text_encoder_2": (CLIP_LAYER, T5_LAYER),
    "text_encoder_3": (T5_LAYER,),
}


class LDMNames:
    """The names that LDM code has for the layers of a diffusers U-Net, from the U-Net's config.

    LDM numbers blocks through all levels; where a level has no attention, its upsampler moves up.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.blocks = {**_OUTSIDE_BLOCKS, **_middle(), **_down(config), **_up(config)}
        self._diffusers_blocks = {ldm: diffusers for diffusers, ldm in self.blocks.items()}

    def to_ldm(self, name: str) -> str | None:
        """ "down_blocks.1.resnets.0.conv1" -> "input_blocks.4.0.in_layers.2"; None for a layer it does not have."""
        block, part = _split(name, self.blocks)
        if block is None:
            return None
        if ".resnets." in block:
            part = _RESNET_PARTS.get(part, part)
        return ".".join(filter(None, (self.blocks[block], part)))

    def to_diffusers(self, name: str) -> str | None:
        """The inverse of `to_ldm`."""
        block, part = _split(name, self._diffusers_blocks)
        if block is None:
            return None
        diffusers_block = self._diffusers_blocks[block]
        if ".resnets." in diffusers_block:
            part = {ldm: diffusers for diffusers, ldm in _RESNET_PARTS.items()}.get(part, part)
        return ".".join(filter(None, (diffusers_block, part)))


def _split(name: str, blocks: Mapping[str, str]) -> tuple[str | None, str]:
    """`name` as (the block it begins with, the rest)."""
    segments = name.split(".")
    for length in range(len(segments), 0, -1):
        block = ".".join(segments[:length])
        if block in blocks:
            return block, ".".join(segments[length:])
    return None, name


def _middle() -> dict[str, str]:
    names = ("resnets.0", "attentions.0", "resnets.1")
    return {f"mid_block.{name}": f"middle_block.{index}" for index, name in enumerate(names)}


def _down(config: Mapping[str, Any]) -> dict[str, str]:
    blocks, index = {}, 1
    kinds = config["down_block_types"]
    for level, (kind, layers) in enumerate(zip(kinds, _layers(config), strict=True)):
        for layer in range(layers):
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{index}.0"
            if "Attn" in kind:
                blocks[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{index}.1"
            index += 1
        if level < len(kinds) - 1:
            blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
            index += 1
    return blocks


def _up(config: Mapping[str, Any]) -> dict[str, str]:
    blocks, index = {}, 0
    kinds = config["up_block_types"]
    for level, (kind, layers) in enumerate(zip(kinds, reversed(_layers(config)), strict=True)):
        for layer in range(layers + 1):
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{index}.0"
            if "Attn" in kind:
                blocks[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{index}.1"
            index += 1
        if level < len(kinds) - 1:
            place = 2 if "Attn" in kind else 1
            blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{index - 1}.{place}.conv"
    return blocks


def _layers(config: Mapping[str, Any]) -> Sequence[int]:
    layers = config["layers_per_block"]
    return [layers] * len(config["down_block_types"]) if isinstance(layers, int) else list(layers)
