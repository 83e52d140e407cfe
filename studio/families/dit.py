"""Layer names of diffusion transformers: diffusers' and the original code's (BFL's FLUX, Stability's MMDiT).

One table for a family, read both ways. The original code computes query, key and value in one layer, and
FLUX's single blocks the feed-forward's first product too: such a line has several diffusers layers, whose
outputs lie one after the other. The last modulation has shift before scale there, and scale before shift
in diffusers: the halves of its outputs change places.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

Table = Mapping[str, tuple[str, ...]]  # original name -> diffusers' names; "#" is the block's number

_BLOCK = re.compile(r"([a-z_]*blocks)\.(\d+)\.(.+)")
_FLAT_BLOCK = re.compile(r"([a-z_]*blocks)_(\d+)_(.+)")
LAST_MODULATION = "final_layer.adaLN_modulation.1"


def _block(original: str, diffusers: str, parts: Mapping[str, str]) -> Table:
    """The lines of one kind of block; `parts` has diffusers' names separated by spaces."""
    return {
        f"{original}.#.{name}": tuple(f"{diffusers}.#.{part}" for part in layers.split())
        for name, layers in parts.items()
    }


def _mlp(original: str, diffusers: str, names: tuple[str, str]) -> Table:
    """An embedder's two layers."""
    return {f"{original}.{name}": (f"{diffusers}.linear_{number}",) for number, name in enumerate(names, 1)}


FLUX: Table = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    **_mlp("time_in", "time_text_embed.timestep_embedder", ("in_layer", "out_layer")),
    **_mlp("vector_in", "time_text_embed.text_embedder", ("in_layer", "out_layer")),
    **_mlp("guidance_in", "time_text_embed.guidance_embedder", ("in_layer", "out_layer")),
    **_block(
        "double_blocks",
        "transformer_blocks",
        {
            "img_mod.lin": "norm1.linear",
            "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
            "img_attn.norm.query_norm": "attn.norm_q",
            "img_attn.norm.key_norm": "attn.norm_k",
            "img_attn.proj": "attn.to_out.0",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mod.lin": "norm1_context.linear",
            "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "txt_attn.norm.query_norm": "attn.norm_added_q",
            "txt_attn.norm.key_norm": "attn.norm_added_k",
            "txt_attn.proj": "attn.to_add_out",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
        },
    ),
    **_block(
        "single_blocks",
        "single_transformer_blocks",
        {
            "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
            "linear2": "proj_out",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
            "modulation.lin": "norm.linear",
        },
    ),
    LAST_MODULATION: ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}

SD3: Table = {
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    **_mlp("t_embedder.mlp", "time_text_embed.timestep_embedder", ("0", "2")),
    **_mlp("y_embedder.mlp", "time_text_embed.text_embedder", ("0", "2")),
    **_block(
        "joint_blocks",
        "transformer_blocks",
        {
            "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
            "context_block.attn.ln_q": "attn.norm_added_q",
            "context_block.attn.ln_k": "attn.norm_added_k",
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
            "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
            "x_block.attn.ln_q": "attn.norm_q",
            "x_block.attn.ln_k": "attn.norm_k",
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "x_block.attn2.ln_q": "attn2.norm_q",
            "x_block.attn2.ln_k": "attn2.norm_k",
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
        },
    ),
    LAST_MODULATION: ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}


class DiTNames:
    """The names of one table, for blocks of any number."""

    def __init__(self, table: Table) -> None:
        self._parts = table
        self._original = {part: original for original, parts in table.items() for part in parts}
        self._unflattened = {original.replace(".", "_"): original for original in table}

    def to_original(self, name: str) -> str | None:
        """ "transformer_blocks.3.attn.to_q" -> "double_blocks.3.img_attn.qkv"; None for a layer it does not have."""
        template, number = _template(name)
        original = self._original.get(template)
        return None if original is None else original.replace("#", number)

    def to_diffusers(self, original: str) -> tuple[str, ...]:
        """The layers that `original` is made of, in the order of its outputs; none for a name it does not have."""
        template, number = _template(original)
        return tuple(part.replace("#", number) for part in self._parts.get(template, ()))

    def unflatten(self, flat: str) -> str | None:
        """ "double_blocks_3_img_attn_qkv" -> "double_blocks.3.img_attn.qkv"; None for other names."""
        match = _FLAT_BLOCK.fullmatch(flat)
        template, number = (f"{match[1]}_#_{match[3]}", match[2]) if match else (flat, "")
        original = self._unflattened.get(template)
        return None if original is None else original.replace("#", number)


def _template(name: str) -> tuple[str, str]:
    """`name` with "#" for its block's number, and the number."""
    match = _BLOCK.fullmatch(name)
    return (f"{match[1]}.#.{match[3]}", match[2]) if match else (name, "")


FLUX_NAMES, SD3_NAMES = DiTNames(FLUX), DiTNames(SD3)
