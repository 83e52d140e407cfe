"""Prompt methods: how they start, the face of an adapter set, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_prompt_methods import CONFIGS, TOKENS, close, randomised
from tiny_text import batch, build, distilbert, mamba
from torch import nn

from studio.adapters import PromptConfig, attach_prompt
from studio.errors import ConfigError

# -- initialisation ---------------------------------------------------------------------------------


def test_words_are_rows_of_the_vocabulary() -> None:
    model = build("llama")
    table = model.get_input_embeddings().weight
    for words in ([7, 8], [7, 8, 9, 7, 8]):
        prompt_set = attach_prompt(model, PromptConfig("prompt", len(words), "text", token_ids=(7, 8, 9)))
        assert torch.equal(prompt_set.prompt.embedding, table[words])
        prompt_set.detach()
    drawn = attach_prompt(model, PromptConfig("prompt", 50, "vocabulary")).prompt.embedding
    assert all((table == row).all(dim=1).any() for row in drawn) and len(set(drawn[:, 0].tolist())) > 10


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prompt_of_words_begins_as_these_words(name: str, method: str) -> None:
    model, ids = build(name).train(), torch.tensor([[9, 8, 7]])
    inputs = batch(name)["input_ids"]
    expected = model.eval()(torch.cat((ids.expand(2, -1), inputs), dim=1)).logits[:, 3:]
    model.train()
    attach_prompt(model, PromptConfig(method, 3, "text", token_ids=(9, 8, 7)))
    assert model.training and all(module.training for module in model.modules())
    assert close(model.eval()(inputs).logits, expected)


@pytest.mark.parametrize("key", CONFIGS)
def test_the_seed_alone_decides_the_initialisation(key: str) -> None:
    model = build("llama")
    before = torch.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        prompt_set = attach_prompt(model, CONFIGS[key], seed)
        drawn.append(torch.cat([parameter.detach().flatten() for parameter in prompt_set.parameters()]))
        prompt_set.detach()
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before)


# -- the face of an adapter set, and errors ---------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_one_prompt_acts_at_a_time(name: str) -> None:
    first = randomised(model := build(name), "prompt")
    with pytest.raises(ConfigError, match="another prompt acts"):
        randomised(model, "prefix")
    first.set_strength(0)
    second = randomised(model, "prefix")
    with pytest.raises(ConfigError, match="another prompt acts"):
        first.enabled = True
    second.enabled = False
    first.set_strength(1)
    assert first.enabled and not second.enabled


def test_a_set_has_the_face_of_an_adapter_set() -> None:
    prompt_set = attach_prompt(model := build("llama"), PromptConfig("p-tuning", TOKENS, lr=1e-5))
    assert [name for name, _ in prompt_set.items()] == prompt_set.names == [""]
    assert prompt_set.penalty() is None
    [group] = prompt_set.parameter_groups(1e-3)
    assert group["lr"] == 1e-5 and group["name"] == "lr(1e-05)"
    assert len(group["params"]) == len(list(prompt_set.parameters())) == 7
    for refused in (prompt_set.merge, prompt_set.unmerge, prompt_set.merged):
        with pytest.raises(ConfigError, match="has no dW, cannot be merged"):
            refused()
    with pytest.raises(ConfigError, match=r"not 0\.5"):
        prompt_set.set_strength(0.5)
    prompt_set.check_used(lambda: model(**batch("llama")))
    with pytest.raises(ConfigError, match="does not call LlamaModel"):
        prompt_set.check_used(lambda: build("llama")(**batch("llama")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "prefixes"}, "unknown prompt method 'prefixes'. Did you mean prefix"),
        ({"tokens": 0}, "tokens is 0"),
        ({"init": "zeros"}, "init is 'zeros'"),
        ({"init": "text"}, "with 0 token_ids"),
        ({"token_ids": (1,)}, "init is 'random' with 1 token_ids"),
        ({"method": "p-tuning", "encoder": "gru"}, "encoder is 'gru'"),
        ({"method": "p-tuning", "encoder_hidden": 0}, "encoder_hidden is 0"),
        ({"method": "p-tuning", "init": "vocabulary"}, "init is set, but the method 'p-tuning' has no such setting"),
        ({"projection": True}, "projection is set, but the method 'prompt' has no such setting"),
        ({"method": "prefix", "projection": True, "init": "vocabulary"}, "can only begin 'random'"),
        ({"method": "prefix", "encoder_hidden": 8}, "set projection"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptConfig(**settings)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (nn.Linear(2, 2), PromptConfig(), "needs a text model of transformers, and Linear is none"),
        (mamba(), PromptConfig(), "no key-value cache"),
        (distilbert(), PromptConfig("prefix"), "has no key-value cache: prefix tuning needs"),
        (build("llama"), PromptConfig(init="text", token_ids=(3, 99)), "token_ids holds 99"),
        (build("t5"), PromptConfig("prefix", init="vocabulary"), "can only begin 'random'"),
    ],
)
def test_models_that_cannot_have_a_prompt_are_refused(model: Any, config: PromptConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach_prompt(model, config)
