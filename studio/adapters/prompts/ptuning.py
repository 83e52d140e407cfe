"""P-tuning (arXiv:2103.10385): the prompt is computed, P = encoder(H), from trained vectors H (tokens, width).

The encoder is an MLP of three layers, or a bidirectional LSTM of two layers and an MLP of two. It is
part of the set's state dict, so that training resumes; a file has P alone, as peft's does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from studio.adapters.prompts.prompt import TextModel, reset_encoder
from studio.adapters.prompts.prompt_tuning import PromptTuning


class PTuning(PromptTuning):
    """P-tuning; H is N(0, 1). A loaded prompt has no encoder: it trains on as in prompt tuning."""

    method = "p-tuning"
    settings = ("encoder", "encoder_hidden")

    @torch.no_grad()
    def reset(self, parts: TextModel, generator: torch.Generator) -> None:
        width = parts.width
        hidden = self.config.encoder_hidden or width
        with torch.device("meta"):  # torch's own initialisation would draw from the global stream
            self.encoder = _lstm(width, hidden) if self.config.encoder == "lstm" else _mlp(width, hidden)
        self.encoder.to_empty(device="cpu")
        reset_encoder(self.encoder, generator)
        self.embedding.normal_(generator=generator)


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
    )


def _lstm(width: int, hidden: int) -> nn.Sequential:
    both = 2 * hidden  # the states of both directions
    return nn.Sequential(_LSTM(width, hidden), nn.Linear(both, both), nn.ReLU(), nn.Linear(both, width))


class _LSTM(nn.LSTM):
    """The hidden states of a bidirectional LSTM of two layers: (tokens, width) -> (tokens, 2 * hidden)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden, num_layers=2, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]
