"""Words of a prompt that stand for trained vectors (textual inversion, arXiv:2208.01618).

The vectors take the place of a token embedding at the word's places in the prompt; the vocabulary and its table
stay as they are. Words are found whole, in any case, as CLIP's tokenizers lower it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Words:
    """The trained words of one text encoder: `vectors` maps a word to its (vectors, width).

    Each vector gets a number after the encoder's vocabulary, as if it were a token.
    """

    def __init__(self, encoder: nn.Module, vectors: Mapping[str, Tensor]) -> None:
        self.table = encoder.get_input_embeddings()  # type: ignore[operator]
        self.first: int = self.table.num_embeddings
        self.vectors = torch.cat([*vectors.values(), torch.empty(0, self.table.embedding_dim)])
        self._ids: dict[str, list[int]] = {}
        place = self.first
        for word, own in vectors.items():
            self._ids[word.casefold()] = list(range(place, place + len(own)))
            place += len(own)

    def tokenize(self, tokenizer: Any, text: str) -> list[int]:
        """The tokens of `text`, without start and end, with the vectors' numbers for the words."""
        ids: list[int] = []
        for piece in re.split(f"({any_of(self._ids)})", text, flags=re.IGNORECASE) if self._ids else [text]:
            own = self._ids.get(piece.casefold())
            ids += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids if own is None else own
        return ids

    def continues(self, token: int) -> bool:
        """Whether the token is a word's second vector, or a later one."""
        return token >= self.first and all(token != own[0] for own in self._ids.values())

    @contextmanager
    def standing(self, tokens: Tensor) -> Iterator[Tensor]:
        """Within it, the encoder gives the vectors for `tokens` (B, T) when it is called with the tensor yielded."""
        places = tokens >= self.first
        if not places.any():
            yield tokens
            return

        def replace(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[places] = self.vectors.to(output)[(tokens[places] - self.first).to(output.device)]
            return output

        hook = self.table.register_forward_hook(replace)
        try:
            yield tokens.masked_fill(places, 0)  # any token of the vocabulary
        finally:
            hook.remove()


def any_of(words: Iterable[str]) -> str:
    """The pattern of any of the words, the longest first: not inside of another word."""
    return "|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in sorted(words, key=len, reverse=True))
