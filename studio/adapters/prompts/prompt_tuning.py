"""Prompt tuning (arXiv:2104.08691): the embedded input x becomes [P; E(x)], P of (tokens, width) trained.

A prompt's positions are taken off again behind the decoder: logits, labels, and the search for the
last token of a classifier keep the length of the input, and whatever computes a loss from logits
needs not know of the prompt. peft keeps these positions: its logits are `tokens` longer, and its
classifiers read the wrong token in a batch padded on the right. The logits of real tokens are the
same; peft's loss also has the first token, predicted from the prompt, as a target.

Padding on the left, as `generate` uses it, moves no position: real tokens count on from the prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from studio.adapters.prompts.prompt import Prompt, PromptHook, TextModel, cached_length, initial_ids, lengthen_mask


class PromptTuning(Prompt):
    """Prompt tuning: the prompt itself is trained. "random" is U(-0.5, 0.5), as in the paper.

    An encoder-decoder has the prompt before its encoder's input. There peft stores 2 * tokens rows
    by default and reads the first half: its files have `num_transformer_submodules` 1 here.
    """

    method = "prompt"
    settings = ("init", "token_ids")

    @staticmethod
    def width(parts: TextModel) -> int:
        return parts.width

    @torch.no_grad()
    def reset(self, parts: TextModel, generator: torch.Generator) -> None:
        if self.config.init == "random":
            self.embedding.uniform_(-0.5, 0.5, generator=generator)
            return
        vocabulary = parts.reader.get_input_embeddings().weight.shape[0]
        self.embedding.copy_(parts.embed(initial_ids(self.config, vocabulary, generator)))

    def hook(self, parts: TextModel) -> list[RemovableHandle]:
        prepend = Prepend(self, parts.reader)
        handles = [prepend.register(parts.reader)]
        if parts.encoder is not None:
            return [*handles, CrossMask(self, parts.decoder).register(parts.decoder)]
        return [*handles, parts.decoder.register_forward_hook(prepend.drop)]


class Prepend(PromptHook):
    """Puts the prompt before the embedded input; with a cache, only before what begins the cache."""

    inserted = 0

    def change(self, module: nn.Module, inputs: dict[str, Any]) -> None:
        self.prompt.calls += 1
        tokens = self.prompt.config.tokens
        self.inserted = 0 if cached_length(inputs) else tokens
        lengthen_mask(inputs, "attention_mask", tokens)
        positions = inputs.get("position_ids")  # (..., length)
        if not self.inserted:
            if positions is not None:
                inputs["position_ids"] = positions + tokens
            return
        if inputs.get("inputs_embeds") is None:
            inputs["inputs_embeds"] = module.get_input_embeddings()(inputs.pop("input_ids"))
        embedded = inputs["inputs_embeds"]  # (batch, length, width)
        prompt = self.prompt().to(embedded).expand(embedded.shape[0], -1, -1)  # (batch, tokens, width)
        inputs["inputs_embeds"] = torch.cat((prompt, embedded), dim=1)
        if positions is not None:
            new = torch.arange(tokens, device=positions.device).expand(*positions.shape[:-1], -1)
            inputs["position_ids"] = torch.cat((new, positions + tokens), dim=-1)
        if inputs.get("token_type_ids") is not None:
            kinds = inputs["token_type_ids"]  # (batch, length)
            inputs["token_type_ids"] = torch.cat((kinds.new_zeros(kinds.shape[0], tokens), kinds), dim=1)

    def drop(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The forward hook that takes the prompt's positions off the hidden states again."""
        inserted = self.inserted
        if not inserted or not self.prompt.enabled:
            return output
        if isinstance(output, tuple):
            return (output[0][:, inserted:], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, inserted:]
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(states[:, inserted:] for states in output.hidden_states)
        return output


class CrossMask(PromptHook):
    """Lets a decoder attend to the prompt at the head of its encoder's states."""

    def change(self, module: nn.Module, inputs: dict[str, Any]) -> None:
        states, mask = inputs.get("encoder_hidden_states"), inputs.get("encoder_attention_mask")
        tokens = self.prompt.config.tokens
        if states is not None and mask is not None and mask.shape[1] + tokens == states.shape[1]:
            lengthen_mask(inputs, "encoder_attention_mask", tokens)
