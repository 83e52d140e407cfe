"""Prefix tuning (arXiv:2101.00190), per layer as in P-Tuning v2 (arXiv:2110.07602).

Layer i attends to [K_i; K(x)] and [V_i; V(x)] with trained K_i, V_i of (tokens, kv heads * head width);
a file has them side by side, (tokens, 2 * layers * kv width): K_0, V_0, K_1, ... K_i are as they are in
the key-value cache, so a rotary model does not rotate them. With `projection` they are computed while
training: MLP(H), H of (tokens, kv width).

The prefix is handed to the model as a filled key-value cache. Gradient checkpointing takes the cache
away from the layers; there a hook on each attention gives the layer its part back, as a cache that
does not grow and so survives the second run of the layer. (transformers then warns that it sets
past_key_values=None: the prefix acts all the same.)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from studio.adapters.prompts.prompt import (
    Prompt,
    PromptConfig,
    PromptHook,
    TextModel,
    cached_length,
    initial_ids,
    lengthen_mask,
    reset_encoder,
)
from studio.errors import ConfigError


class PrefixTuning(Prompt):
    """Prefix tuning. "random" is N(0, 1); words begin as their own keys and values in each layer.

    An encoder-decoder has the prefix in its decoder's self-attention, where peft's layer i of L reads
    the pair 2i mod L: for an even L two layers share each pair they read, and the other half of the
    file is unused. This is kept, for files mean the same in both.
    """

    method = "prefix"
    settings = ("init", "token_ids", "projection", "encoder_hidden")

    def __init__(self, parts: TextModel, config: PromptConfig) -> None:
        super().__init__(parts, config)
        self.layers, self.kv_heads, self.head_width = kv_shape(parts.decoder)
        self.step = 1 if parts.encoder is None else 2

    @classmethod
    def check(cls, config: PromptConfig) -> None:
        if config.projection and config.init != "random":
            raise ConfigError(f"init is '{config.init}' with projection; the projection can only begin 'random'")
        if config.encoder_hidden is not None and not config.projection:
            raise ConfigError("encoder_hidden is set, but only the projection has a hidden width: set projection")

    @staticmethod
    def width(parts: TextModel) -> int:
        layers, kv_heads, head_width = kv_shape(parts.decoder)
        return 2 * layers * kv_heads * head_width

    @torch.no_grad()
    def reset(self, parts: TextModel, generator: torch.Generator) -> None:
        if self.config.init != "random":
            self.embedding.copy_(self._of_words(parts, generator))
            return
        if self.config.projection:
            self._project(generator)
        self.embedding.normal_(generator=generator)

    def _project(self, generator: torch.Generator) -> None:
        """Puts the MLP before the prefix; `embedding` becomes its input."""
        outputs, width = self.embedding.shape[1], self.kv_heads * self.head_width
        hidden = self.config.encoder_hidden or width
        with torch.device("meta"):  # torch's own initialisation would draw from the global stream
            self.encoder = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
        self.encoder.to_empty(device="cpu")
        reset_encoder(self.encoder, generator)
        self.embedding = nn.Parameter(torch.empty(self.config.tokens, width))

    def _of_words(self, parts: TextModel, generator: torch.Generator) -> Tensor:
        """The keys and values of words at the start of a text, as a prefix, (tokens, 2 * layers * kv width)."""
        if parts.encoder is not None:
            raise ConfigError(f"init is '{self.config.init}'; the prefix of an encoder-decoder can only begin 'random'")
        decoder = parts.decoder
        embedding = decoder.get_input_embeddings().weight
        ids = initial_ids(self.config, embedding.shape[0], generator).to(embedding.device)
        cache = new_cache(parts.decoder)
        with _evaluating(decoder):
            decoder(input_ids=ids[None], past_key_values=cache)
        pairs = torch.cat([part for layer in cache.layers for part in (layer.keys, layer.values)])
        # (2 * layers, kv heads, tokens, head width) -> (tokens, 2 * layers * kv heads * head width)
        return pairs.permute(2, 0, 1, 3).flatten(1)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(K, V) for each layer, each (1, kv heads, tokens, head width)."""
        whole = self().view(self.config.tokens, self.layers, 2, self.kv_heads, self.head_width)
        keys, values = whole.permute(2, 1, 3, 0, 4).unsqueeze(2)  # 2 x (layers, 1, kv heads, tokens, head width)
        order = [self.step * layer % self.layers for layer in range(self.layers)]
        return [(keys[layer], values[layer]) for layer in order]

    def hook(self, parts: TextModel) -> list[RemovableHandle]:
        fill = FillCache(self, parts.decoder)
        attentions = [module for module in parts.decoder.modules() if cache_argument(module)]
        return [
            fill.register(parts.decoder),
            parts.decoder.register_forward_hook(fill.keep_no_cache, with_kwargs=True),
            *(KeepPrefix(fill, module).register(module) for module in attentions),
        ]


class FillCache(PromptHook):
    """Begins an empty key-value cache with the prefix."""

    prompt: PrefixTuning

    def __init__(self, prompt: PrefixTuning, module: nn.Module) -> None:
        super().__init__(prompt, module)
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model computes its own pairs: tensors of an autograd graph cannot be copied."""
        return self.__dict__ | {"pairs": []}

    def change(self, module: nn.Module, inputs: dict[str, Any]) -> None:
        self.prompt.calls += 1
        tokens = self.prompt.config.tokens
        cached = cached_length(inputs)
        lengthen_mask(inputs, "attention_mask", tokens)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + tokens
        if cached:
            return
        if inputs.get("past_key_values") is None:
            inputs["past_key_values"] = new_cache(module, self.prompt.step == 2)
        cache = inputs["past_key_values"]
        cache = getattr(cache, "self_attention_cache", cache)
        batch = len(inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"])
        self.pairs = [(k.to(module.dtype), v.to(module.dtype)) for k, v in self.prompt.pairs()]
        for layer, pair in enumerate(self.pairs):
            cache.update(*(part.expand(batch, -1, -1, -1) for part in pair), layer)

    def keep_no_cache(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The forward hook that keeps a cache from a caller who wants none, and would hand it in again."""
        if self.prompt.enabled and kwargs.get("use_cache") is False and not isinstance(output, tuple):
            output.past_key_values = None
        return output


class KeepPrefix(PromptHook):
    """Gives the prefix to an attention from which gradient checkpointing took the cache."""

    def __init__(self, fill: FillCache, module: nn.Module) -> None:
        super().__init__(fill.prompt, module)
        self.fill = fill
        self.argument = cache_argument(module) or ""

    def change(self, module: nn.Module, inputs: dict[str, Any]) -> None:
        crossing = inputs.get("key_value_states") is not None or inputs.get("encoder_hidden_states") is not None
        if inputs.get(self.argument) is not None or not self.fill.pairs or crossing:
            return
        keys, values = self.fill.pairs[module.layer_idx]
        if self.fill.prompt.config.projection and keys.requires_grad and not torch.is_grad_enabled():
            raise ConfigError(
                "reentrant gradient checkpointing goes back through the projection once for every layer, which one "
                'graph does not allow: set gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        inputs[self.argument] = FixedPrefix(keys, values)


class FixedPrefix:
    """What an attention asks of a cache, for one layer whose prefix never grows."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, kv heads, length, head width) behind the prefix."""
        batch = keys.shape[0]
        return (
            torch.cat((self.keys.expand(batch, -1, -1, -1), keys), dim=2),
            torch.cat((self.values.expand(batch, -1, -1, -1), values), dim=2),
        )

    def get_seq_length(self, *_: Any) -> int:
        """The length of the prefix."""
        return self.keys.shape[2]


def cache_argument(module: nn.Module) -> str | None:
    """The name under which an attention takes its key-value cache; None for other modules."""
    if not isinstance(getattr(module, "layer_idx", None), int):
        return None
    names = inspect.signature(module.forward).parameters
    return next((name for name in ("past_key_values", "layer_past") if name in names), None)


def new_cache(decoder: nn.Module, crossing: bool = False) -> Any:
    """An empty key-value cache of transformers; with `crossing`, for a decoder with an encoder."""
    from transformers import DynamicCache, EncoderDecoderCache

    cache = DynamicCache(config=decoder.config)
    return EncoderDecoderCache(cache, DynamicCache(config=decoder.config)) if crossing else cache


def kv_shape(decoder: nn.Module) -> tuple[int, int, int]:
    """(layers, kv heads, head width) of a decoder; raises ConfigError where its layers are not of one kind."""
    config: Any = decoder.config
    layers = getattr(config, "decoder_layers", None) or config.num_hidden_layers
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    mixed = [
        name for name in ("is_heterogeneous", "num_kv_shared_layers", "kv_lora_rank") if getattr(config, name, None)
    ]
    cached = "past_key_values" in inspect.signature(decoder.forward).parameters
    if kinds or mixed or not cached or not any(map(cache_argument, decoder.modules())):
        what = ", ".join([*sorted(kinds), *mixed]) or "no key-value cache"
        raise ConfigError(
            f"{type(decoder).__name__} has {what}: prefix tuning needs keys and values of one shape in every layer. "
            "Use the method 'prompt'."
        )
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    return layers, kv_heads, head_width


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, without dropout and checkpointing; every part then gets its own mode back."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
