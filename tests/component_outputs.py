"""What the parts of a pipeline make of fixed inputs, one part at a time; imports nothing of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTHS = {"sd15": 16, "sdxl": 32, "sdxl-deep": 32, "flux": 16}  # of the text that the tiny denoisers read


def inputs(kind: str) -> dict[str, dict[str, Tensor]]:
    """Component -> the arguments of its call."""
    draw = torch.Generator().manual_seed(6)
    text = torch.randn(2, 5, WIDTHS[kind], generator=draw)
    words = {"input_ids": torch.randint(0, 40, (2, 7), generator=draw)}
    if kind == "flux":
        positions = {"img_ids": torch.zeros(9, 3), "txt_ids": torch.zeros(5, 3), "guidance": torch.tensor([3.0, 3.0])}
        positions["img_ids"][:, 1] = torch.arange(9)
        latents = {"hidden_states": torch.randn(2, 9, 16, generator=draw), "timestep": torch.tensor([0.1, 0.7])}
        pooled = {"pooled_projections": torch.randn(2, 16, generator=draw)}
        transformer = {"encoder_hidden_states": text, **latents, **positions, **pooled}
        return {"text_encoder": words, "text_encoder_2": words, "transformer": transformer}
    unet = {"sample": torch.randn(2, 4, 8, 8, generator=draw), "timestep": torch.tensor([40, 700])}
    unet["encoder_hidden_states"] = text
    if kind == "sd15":
        return {"text_encoder": words, "unet": unet}
    unet["text_embeds"] = torch.randn(2, 16, generator=draw)
    unet["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(2, 1)
    return {"text_encoder": words, "text_encoder_2": words, "unet": unet}


def outputs(parts: Any, given: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Component -> its output; `parts` has the components as attributes or by name."""
    named = parts if isinstance(parts, dict) else vars(parts) | getattr(parts, "components", {})
    return {component: call(named[component], arguments) for component, arguments in given.items()}


def call(part: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
    """A denoiser's prediction, or all that a text encoder gives."""
    arguments = dict(arguments)
    if "time_ids" in arguments:
        arguments["added_cond_kwargs"] = {name: arguments.pop(name) for name in ("text_embeds", "time_ids")}
    found = part(**arguments)
    if "sample" in found:
        return found.sample
    pooled = found.get("text_embeds")
    hidden = found.last_hidden_state.flatten()
    return hidden if pooled is None else torch.cat([hidden, pooled.flatten()])
