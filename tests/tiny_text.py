"""Tiny random text models of transformers: decoders, an encoder-decoder, classifiers; and a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 40


def llama(kind: Any = tf.LlamaForCausalLM, **changes: Any) -> Any:
    """Grouped-query attention, and a head width that is not width / heads."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": None,
        "num_labels": 3,
    }
    return kind(tf.LlamaConfig(**settings | changes))


def gpt2() -> Any:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=None
        )
    )


def t5() -> Any:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            eos_token_id=None,
            dropout_rate=0.0,
        )
    )


def bert() -> Any:
    return tf.BertForSequenceClassification(
        tf.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            num_labels=3,
        )
    )


def llama_classifier() -> Any:
    return llama(tf.LlamaForSequenceClassification)


def llava() -> Any:
    """Vision and language: four patches of a picture of 8 x 8 pixels in the place of four tokens 39."""
    vision = tf.CLIPVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = tf.LlavaConfig(
        text_config=llama().config, vision_config=vision, image_token_index=39, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    return tf.LlavaForConditionalGeneration(config)


def mamba() -> Any:
    """A recurrent model, without attention."""
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))


def distilbert() -> Any:
    """An encoder whose attention takes no cache."""
    config = tf.DistilBertConfig(vocab_size=8, dim=8, hidden_dim=8, n_layers=1, n_heads=2)
    return tf.DistilBertForSequenceClassification(config)


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (llama, "CAUSAL_LM"),
    "gpt2": (gpt2, "CAUSAL_LM"),
    "t5": (t5, "SEQ_2_SEQ_LM"),
    "llama-cls": (llama_classifier, "SEQ_CLS"),
    "bert-cls": (bert, "SEQ_CLS"),
}


def build(name: str) -> Any:
    """A random frozen model with weights large enough that every part of it matters."""
    torch.manual_seed(7)
    model = MODELS[name][0]().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def batch(name: str, padded: bool = False) -> dict[str, Tensor]:
    """Two texts of 5 words with labels; `padded`: two words of the second are padding, on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCABULARY, (2, 5), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :2], mask[1, :2] = 0, 0
    labels = torch.randint(1, VOCABULARY, (2, 5), generator=generator)
    labels[:, 0] = -100  # peft also predicts the first word, from the prompt
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([2, 0]) if "cls" in name else labels}
    return inputs | {"token_type_ids": torch.tensor([[0, 0, 0, 1, 1]] * 2)} if name == "bert-cls" else inputs
