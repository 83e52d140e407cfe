"""The models that are adapted, built from configurations with random weights, and their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from studio.seeds import sample_generator

ALL_LINEAR = r".*(q|k|v|o|gate|up|down)_proj"
"""The seven projections of every layer of a Llama."""

ATTENTION_FF_PROJECTIONS = r".*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out)"
"""Of every transformer block of a U-Net; `proj_in` and `proj_out` are 1x1 convolutions."""


@dataclass(frozen=True)
class Workload:
    """A frozen model, the regular expression of the layers to adapt, and the arguments of a forward pass."""

    name: str
    model: nn.Module
    targets: str
    arguments: Mapping[str, Any]

    def forward(self, model: nn.Module, **more: Any) -> Tensor:
        """The output of `model`, this workload's or an adapted copy of it."""
        return model(**self.arguments, **more)[0]


@dataclass(frozen=True)
class Size:
    """How large the models are, and how many rounds are timed at least (`timing.interleave`)."""

    rounds: int
    llama: tuple[int, int, int]  # layers, hidden, intermediate
    tokens: int
    deep_llama_layers: int
    unet: tuple[int, ...]  # channels of the blocks


FULL = Size(rounds=21, llama=(8, 512, 1376), tokens=256, deep_llama_layers=48, unet=(64, 128, 256, 256))
QUICK = Size(rounds=1, llama=(2, 128, 344), tokens=64, deep_llama_layers=4, unet=(32, 32, 32, 32))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=sample_generator("benchmark", *shape))


def _llama(name: str, layers: int, hidden: int, intermediate: int, shape: tuple[int, int]) -> Workload:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LlamaModel(config).requires_grad_(False).eval()
    inputs = _normal(*shape, hidden).requires_grad_()  # (batch, tokens, hidden): the gradient runs through every layer
    return Workload(name, model, ALL_LINEAR, {"inputs_embeds": inputs, "use_cache": False})


def llama(size: Size) -> Workload:
    """Llama, adapted in all its linear layers; one sequence."""
    layers, hidden, intermediate = size.llama
    return _llama(f"Llama {layers}x{hidden} all-linear", layers, hidden, intermediate, (1, size.tokens))


def deep_llama(size: Size, batch: int = 1, tokens: int = 4) -> Workload:
    """Many small layers, so that the calls cost more than the arithmetic: 7 linear layers in each of 48."""
    layers = size.deep_llama_layers
    return _llama(f"Llama {layers}x64, {7 * layers} Linears", layers, 64, 172, (batch, tokens))


def unet(size: Size) -> Workload:
    """A U-Net of the layout of Stable Diffusion 1.5 with narrower blocks, on 32 x 32 latents."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=32, block_out_channels=size.unet, cross_attention_dim=768, attention_head_dim=8
    )
    arguments = {
        "sample": _normal(1, 4, 32, 32).requires_grad_(),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _normal(1, 77, 768),
        "return_dict": False,
    }
    name = "SD1.5-shaped U-Net, attention + ff + projections"
    return Workload(name, model.requires_grad_(False).eval(), ATTENTION_FF_PROJECTIONS, arguments)
