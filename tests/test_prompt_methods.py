"""Prompt, prefix and P-tuning: equality with peft, files both ways, generation, checkpointing, exact resume."""

from __future__ import annotations

import copy
import json
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from tiny_text import MODELS, batch, build, llava
from torch import Tensor, nn

from studio.adapters import PromptConfig, PromptSet, attach_prompt, load_prompt
from studio.errors import ConfigError

TOKENS = 3
CONFIGS = {
    "prompt": PromptConfig("prompt", TOKENS),
    "prefix": PromptConfig("prefix", TOKENS),
    "prefix-projection": PromptConfig("prefix", TOKENS, projection=True, encoder_hidden=10),
    "p-tuning": PromptConfig("p-tuning", TOKENS, encoder_hidden=10),
    "p-tuning-lstm": PromptConfig("p-tuning", TOKENS, encoder="lstm", encoder_hidden=10),
}


def peft_config(key: str, task: str, **more: Any) -> Any:
    ours = CONFIGS[key]
    common = {"task_type": task, "num_virtual_tokens": TOKENS, **more}
    if ours.method == "prompt":
        return peft.PromptTuningConfig(**common)
    if ours.method == "prefix":
        return peft.PrefixTuningConfig(prefix_projection=ours.projection, encoder_hidden_size=10, **common)
    return peft.PromptEncoderConfig(
        encoder_reparameterization_type=ours.encoder.upper(), encoder_hidden_size=10, encoder_dropout=0.0, **common
    )


PEFT_NAMES = {"p-tuning": ["mlp_head"], "p-tuning-lstm": ["lstm_head", "mlp_head"], "prefix-projection": ["transform"]}


def pairs(key: str, ours: nn.Module, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The same parameters of our prompt and of peft's prompt encoder: both declare them in the same order."""
    parts = [theirs.embedding, *(getattr(theirs, name) for name in PEFT_NAMES.get(key, []))]
    reference = [parameter for part in parts for parameter in part.parameters()]
    return list(zip(ours.parameters(), reference, strict=True))


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 1e-6 + 1e-4 * theirs.abs().max())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("key", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_are_pefts(name: str, key: str, padded: bool) -> None:
    task = MODELS[name][1]
    submodules = {"num_transformer_submodules": 1} if task == "SEQ_2_SEQ_LM" and "prefix" not in key else {}
    theirs = peft.get_peft_model(build(name), peft_config(key, task, **submodules)).eval()
    model = build(name)
    parameters = pairs(key, attach_prompt(model, CONFIGS[key], seed=1).prompt, theirs.prompt_encoder["default"])
    for mine, reference in parameters:
        assert mine.shape == reference.shape
        reference.data.copy_(mine.data)
    inputs = batch(name, padded)
    expected = theirs(**inputs)
    result = model(**inputs)
    extra = expected.logits.shape[1] - result.logits.shape[1] if task == "CAUSAL_LM" else 0
    assert extra == (TOKENS if task == "CAUSAL_LM" and "prefix" not in key else 0)
    assert close(result.logits, expected.logits[:, extra:])
    assert close(result.loss, expected.loss)
    expected.loss.backward()
    result.loss.backward()
    for mine, reference in parameters:
        assert mine.grad.abs().max() > 0
        assert close(mine.grad, reference.grad)


# -- files ------------------------------------------------------------------------------------------


def randomised(model: Any, key: str) -> PromptSet:
    return attach_prompt(model, CONFIGS[key], seed=5)


@pytest.mark.parametrize("key", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "t5", "llama-cls"])
def test_peft_reads_the_exported_prompt(name: str, key: str, tmp_path: Any) -> None:
    task, inputs = MODELS[name][1], batch(name)
    prompt_set = randomised(model := build(name), key)
    expected = model(**inputs).logits
    tensors = prompt_set.state()[""]
    if name == "llama-cls":  # peft trains and stores a classifier's head beside the prompt
        tensors["base_model.score.weight"] = model.score.weight
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    kind = {"prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING", "p-tuning": "P_TUNING"}[CONFIGS[key].method]
    config = {"peft_type": kind, "task_type": task, "num_virtual_tokens": TOKENS, "inference_mode": True}
    if kind != "PREFIX_TUNING":
        config["num_transformer_submodules"] = 1
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path)(**inputs).logits
    extra = TOKENS if task == "CAUSAL_LM" and kind != "PREFIX_TUNING" else 0
    assert close(expected, theirs[:, extra:])


@pytest.mark.parametrize("key", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_prompt_is_the_exported_one(name: str, key: str) -> None:
    inputs = batch(name)
    prompt_set = randomised(model := build(name), key)
    expected, state = model(**inputs).logits, prompt_set.state()
    prompt_set.detach()
    loaded = load_prompt(model, CONFIGS[key].method, state)
    assert torch.equal(loaded.state()[""]["prompt_embeddings"], state[""]["prompt_embeddings"])
    assert close(model(**inputs).logits, expected) and not loaded.training


def test_a_prompt_of_another_width_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(3, 5\), but 'prompt' needs \(3, 16\)"):
        load_prompt(build("llama"), "prompt", {"": {"prompt_embeddings": torch.zeros(TOKENS, 5)}})


@pytest.mark.parametrize("key", CONFIGS)
def test_training_resumes_exactly(key: str) -> None:
    inputs = batch("llama")

    def start() -> tuple[Any, PromptSet, torch.optim.Optimizer]:
        prompt_set = randomised(model := build("llama"), key)
        return model, prompt_set, torch.optim.AdamW(prompt_set.parameter_groups(1e-2))

    def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    model, undisturbed, optimizer = start()
    losses = train(model, optimizer, 3)
    assert losses[-1] < losses[0]
    saved = copy.deepcopy((undisturbed.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 2)
    model, resumed, optimizer = start()
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, 2)
    after = resumed.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in undisturbed.state_dict().items())


# -- acting on the model ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generating_with_a_cache_repeats_full_passes(name: str, key: str) -> None:
    randomised(model := build(name), key)
    inputs = {k: v for k, v in batch(name, padded=True).items() if k != "labels"}
    options = {"max_new_tokens": 6, "do_sample": False}
    written = model.generate(**inputs, **options)
    assert torch.equal(written, model.generate(**inputs, **options, use_cache=False))
    assert torch.equal(
        model.generate(**inputs, **options, num_beams=2),
        model.generate(**inputs, **options, num_beams=2, use_cache=False),
    )
    if name == "t5" and "prefix" not in key:  # the prompt precedes the encoder's input, and no cache
        assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), written)
    else:
        with pytest.raises(ConfigError, match="use a dynamic cache"):
            model.generate(**inputs, **options, cache_implementation="static")
    if name != "t5":  # padding on the left changes nothing; T5 counts positions over the padding
        alone = inputs["input_ids"][1:, 2:]
        for _ in range(6):
            alone = torch.cat((alone, model(alone).logits[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(alone[0], written[1, 2:])


def gradients(model: Any, prompt_set: PromptSet, inputs: dict[str, Tensor]) -> list[Tensor]:
    prompt_set.zero_grad()
    model(**inputs).loss.backward()
    return [parameter.grad.clone() for parameter in prompt_set.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("key", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_keeps_the_gradients(name: str, key: str, reentrant: bool) -> None:
    prompt_set, inputs = randomised(model := build(name), key), batch(name, padded=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    expected = gradients(model, prompt_set, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    if reentrant and key == "prefix-projection":
        with pytest.raises(ConfigError, match='"use_reentrant": False'):
            gradients(model, prompt_set, inputs)
        return
    checkpointed = gradients(model, prompt_set, inputs)
    assert all(close(mine, plain) for mine, plain in zip(checkpointed, expected, strict=True))


@pytest.mark.parametrize("key", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_detaching_leaves_the_model_as_it_was_and_copies_are_independent(name: str, key: str) -> None:
    model, inputs = build(name), batch(name)
    bare = model(**inputs).logits
    prompt_set = randomised(model, key)
    prompted = model(**inputs).logits
    assert prompted.shape == bare.shape and not torch.allclose(prompted, bare)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        prompt_set.prompt.embedding.zero_()
    assert torch.equal(twin(**inputs).logits, prompted)
    assert not torch.allclose(model(**inputs).logits, prompted)
    prompt_set.set_strength(0)
    assert torch.equal(model(**inputs).logits, bare)
    prompt_set.set_strength(1)
    prompt_set.detach()
    assert torch.equal(model(**inputs).logits, bare)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_classifier_reads_the_last_word_of_a_batch_padded_on_the_right() -> None:
    randomised(model := build("llama-cls"), "prompt")
    ids = batch("llama-cls")["input_ids"]
    expected = model(input_ids=ids[1:, :3]).logits[0]
    ids[1, 3:] = 0
    assert close(model(input_ids=ids, attention_mask=(ids != 0).long()).logits[1], expected)


@pytest.mark.parametrize("key", ["prompt", "prefix"])
def test_a_failed_pass_leaves_nothing_behind(key: str) -> None:
    model, inputs = build("llama"), batch("llama")
    bare = model(**inputs).logits
    prompt_set = randomised(model, key)
    prompted = model(**inputs).logits
    for strength, expected in ((1, prompted), (0, bare)):
        prompt_set.set_strength(1)
        breaking = model.model.norm.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        breaking.remove()
        prompt_set.set_strength(strength)
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("key", ["prompt", "prefix"])
def test_a_compiled_model_has_its_prompt(key: str) -> None:
    prompt_set, inputs = randomised(model := build("llama"), key), batch("llama")
    expected = gradients(model, prompt_set, inputs)
    compiled = gradients(torch.compile(model, backend="eager"), prompt_set, inputs)
    assert all(close(mine, plain) for mine, plain in zip(compiled, expected, strict=True))
    prompt_set.detach()
    model.compile(backend="eager")
    bare = model(**inputs).logits
    late = gradients(model, randomised(model, key), inputs)  # on a model that is compiled, and was called
    assert all(close(mine, plain) for mine, plain in zip(late, expected, strict=True))
    assert not torch.allclose(model(**inputs).logits, bare)


def test_hidden_states_and_tuples_lose_the_prompts_positions_too() -> None:
    randomised(model := build("llama"), "prompt")
    inputs = batch("llama")
    result = model(**inputs, output_hidden_states=True)
    assert {states.shape[1] for states in result.hidden_states} == {5}
    assert torch.equal(model(**inputs, return_dict=False)[1], result.logits)


@pytest.mark.parametrize("key", CONFIGS)
def test_a_model_in_bfloat16_trains_a_prompt_in_float32(key: str) -> None:
    prompt_set = randomised(model := build("llama").to(torch.bfloat16), key)
    assert {grad.dtype for grad in gradients(model, prompt_set, batch("llama"))} == {torch.float32}


def test_a_vision_language_model_has_the_prompt_before_its_merged_input() -> None:
    model = llava().eval()
    inputs = {"input_ids": torch.tensor([[1, 39, 39, 39, 39, 5, 6]]), "pixel_values": torch.ones(1, 3, 8, 8)}
    bare = model(**inputs).logits
    for key in ("prompt", "prefix"):
        prompt_set = randomised(model, key)
        assert not torch.allclose(model(**inputs).logits, bare)
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False))
        prompt_set.detach()
