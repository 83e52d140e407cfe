"""Prompts with weights, and of any length, turned into conditioning.

The syntax is A1111's: `(word)` raises attention by 1.1, `(word:1.3)` sets it, `[word]` lowers it by
1.1, brackets nest, BREAK starts a new chunk of tokens, and `<lora:name:0.8>` names a LoRA. A backslash
before any of them makes it plain text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from studio.diffusion.words import Words
from studio.errors import ConfigError
from studio.families.base import Conditioning, DiffusionFamily, Models

BRACKET_FACTOR = 1.1
COMMA_REACH = 20
"""A chunk ends at a comma among its last so many tokens, so that phrases stay whole."""

Span = tuple[str, float]
"""A piece of text and its weight."""
WeightedTokens = list[tuple[int, float]]

_TAG = re.compile(r"\\.|<(\w+):([^<>]+)>", re.DOTALL)  # or an escaped sign, which begins no tag
_PIECES = re.compile(
    r"\\(?P<literal>[\\()\[\]<]|BREAK\b)"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|\s*\b(?P<break>BREAK)\b\s*"
    r"|(?P<text>.)",
    re.DOTALL,
)


def parse_weights(prompt: str) -> list[list[Span]]:
    """Sections parted by BREAK, each a list of (text, weight); neighbours of equal weight are joined.

    A bracket that is never closed acts to the end; one that was never opened is text.
    """
    pieces: list[tuple[str | None, float]] = []  # the text None stands for BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def scale(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in _PIECES.finditer(prompt):
        kind, value = match.lastgroup, match.group(match.lastgroup or 0)
        if kind == "bracket" and value in opened:
            opened[value].append(len(pieces))
        elif kind == "weight" and opened["("]:
            scale(opened["("].pop(), float(value))
        elif kind == "bracket" and value == ")" and opened["("]:
            scale(opened["("].pop(), BRACKET_FACTOR)
        elif kind == "bracket" and value == "]" and opened["["]:
            scale(opened["["].pop(), 1 / BRACKET_FACTOR)
        elif kind == "break":
            pieces.append((None, 1.0))
        else:
            pieces.append((value if kind in ("literal", "text") else match.group(), 1.0))
    for start in opened["("]:
        scale(start, BRACKET_FACTOR)
    for start in opened["["]:
        scale(start, 1 / BRACKET_FACTOR)
    return _sections(pieces)


def _sections(pieces: Sequence[tuple[str | None, float]]) -> list[list[Span]]:
    sections: list[list[Span]] = [[]]
    for text, weight in pieces:
        section = sections[-1]
        if text is None:
            sections.append([])
        elif section and section[-1][1] == weight:
            section[-1] = (section[-1][0] + text, weight)
        else:
            section.append((text, weight))
    return sections


def extract_loras(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """The prompt without its `<lora:name:strength>` tags, and their (name, strength).

    Raises ConfigError for a tag of another kind (`<hypernet:...>`) or one that is not well formed.
    """
    named = []
    for kind, content in _TAG.findall(prompt):
        if not kind:
            continue
        if kind != "lora":
            raise ConfigError(f"<{kind}:{content}> in the prompt: only <lora:name:strength> is understood")
        name, *strengths = content.split(":")
        strength = finite_number(strengths[0]) if strengths else 1.0
        if not name.strip() or strength is None or len(strengths) > 1:
            raise ConfigError(f"<lora:{content}> in the prompt: write <lora:name:0.8>, one number after the name")
        named.append((name.strip(), strength))
    return _TAG.sub(lambda match: "" if match[1] else match[0], prompt).strip(), named


def plain(text: str) -> str:
    """The prompt that means `text` to the letter, as training reads captions."""
    return re.sub(r"[\\()\[\]]|\bBREAK\b|<(?=\w+:)", r"\\\g<0>", text)


def finite_number(text: str) -> float | None:
    """The number that `text` is, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def encode_prompts(family: DiffusionFamily, models: Models, prompts: Sequence[str], clip_skip: int = 0) -> Conditioning:
    """Conditioning of B weighted prompts of any length.

    `encoder_hidden_states` is (B, chunks * T, width), T the tokenizer's length: a prompt is cut into
    chunks of T - 2 tokens, each encoded between its own start and end tokens, and shorter prompts
    are filled up with empty chunks. `pooled` is the first chunk's. A plain prompt of one chunk gives
    what `family.encode_prompt` gives. Words of `models.words` stand for their vectors. `clip_skip` counts
    the last layers left out; raises ConfigError where a text encoder has not that many.
    """
    layers = min(models.parts[name].config.num_hidden_layers for name in models.tokenizers)
    if clip_skip >= layers:
        raise ConfigError(
            f"clip_skip is {clip_skip}; this base's text encoder has {layers} layers, so at most {layers - 1}"
        )
    words = {name: _words(models, name) for name in models.tokenizers}
    chunks = {
        name: [_chunks(tokenizer, words[name], prompt) for prompt in prompts]
        for name, tokenizer in models.tokenizers.items()
    }
    count = max(len(own) for rows in chunks.values() for own in rows)
    tokens, weights = {}, []
    for name, tokenizer in models.tokenizers.items():
        filled = [chunk for own in chunks[name] for chunk in own + [[]] * (count - len(own))]
        framed = [_framed(tokenizer, chunk) for chunk in filled]
        tokens[name] = torch.tensor([[token for token, _ in row] for row in framed])
        encoder_weights = torch.tensor([[weight for _, weight in row] for row in framed])
        weights.append((encoder_weights, models.parts[name].config.hidden_size))
    with ExitStack() as stack:
        plain = {name: stack.enter_context(words[name].standing(own)) for name, own in tokens.items()}
        encoded = family.encode_tokens(models, plain, clip_skip)
    hidden = _weighted(encoded.encoder_hidden_states, weights)
    hidden = hidden.reshape(len(prompts), -1, hidden.shape[-1])
    pooled = None if encoded.pooled is None else encoded.pooled[::count]
    return Conditioning(hidden, pooled)


def _words(models: Models, encoder: str) -> Words:
    vectors = {word: parts[encoder] for word, parts in models.words.items() if encoder in parts}
    return Words(models.parts[encoder], vectors)


def _chunks(tokenizer: Any, words: Words, prompt: str) -> list[WeightedTokens]:
    """The prompt's tokens in chunks that leave room for a start and an end token; at least one chunk."""
    size = tokenizer.model_max_length - 2
    comma = tokenizer(",", add_special_tokens=False).input_ids[-1]
    chunks: list[WeightedTokens] = []
    for section in parse_weights(prompt):
        tokens = [(token, weight) for text, weight in section for token in words.tokenize(tokenizer, text)]
        chunks.extend(_cut(tokens, size, comma, words))
    return chunks


def _cut(tokens: WeightedTokens, size: int, comma: int, words: Words) -> Iterator[WeightedTokens]:
    """Chunks of up to `size` tokens, none of which begins inside of a word of several vectors."""
    while len(tokens) > size:
        commas = [place for place in range(max(0, size - COMMA_REACH), size + 1) if tokens[place][0] == comma]
        end = min(commas[-1] + 1, size) if commas else size
        while words.continues(tokens[end][0]):
            end -= 1
        yield tokens[:end]
        tokens = tokens[end:]
    yield tokens


def _framed(tokenizer: Any, chunk: WeightedTokens) -> WeightedTokens:
    """The chunk between start and end tokens, padded to the tokenizer's length as the tokenizer pads."""
    framed = [(tokenizer.bos_token_id, 1.0), *chunk, (tokenizer.eos_token_id, 1.0)]
    return framed + [(tokenizer.pad_token_id, 1.0)] * (tokenizer.model_max_length - len(framed))


def _weighted(hidden: Tensor, weights: Sequence[tuple[Tensor, int]]) -> Tensor:
    """`hidden` (rows, T, width) times its tokens' weights, with the mean of each row restored.

    `weights` holds for each text encoder its (rows, T) weights and its share of the width. The mean
    is restored encoder by encoder, as A1111 does, so that emphasis does not change the overall level.
    """
    parts = hidden.split([width for _, width in weights], dim=-1)
    scaled = []
    for part, (weight, _) in zip(parts, weights, strict=True):
        plain = (weight == 1).all(dim=1).to(hidden.device)
        before = part.float()
        after = before * weight.to(hidden.device)[..., None]
        after = after * (before.mean(dim=(1, 2), keepdim=True) / after.mean(dim=(1, 2), keepdim=True))
        scaled.append(torch.where(plain[:, None, None], part, after.to(part.dtype)))
    return torch.cat(scaled, dim=-1)
