"""The tokenizer of the built-in base: CLIP's byte-level BPE scheme, trained on emoji names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 3000
MAX_LENGTH = 32
"""Token positions of a prompt. CLIP's 77 would triple the cost of text for names of two to six words."""


def train_tokenizer(texts: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Trains on `texts`, saves to `folder` in CLIPTokenizer's layout, and returns the tokenizer."""
    scheme = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = scheme.normalizer
    tokenizer.pre_tokenizer = scheme.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=[START, END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    for byte in alphabet:  # a byte that ends a word is a token of its own: no prompt is unknown
        bpe["vocab"].setdefault(byte + "</w>", len(bpe["vocab"]))
    merges = [tuple(merge) for merge in bpe["merges"]]
    CLIPTokenizer(vocab=bpe["vocab"], merges=merges, model_max_length=MAX_LENGTH).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)
