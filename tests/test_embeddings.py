"""Textual inversions: every form that tools write, adapters bundled with them, and their words in prompts."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from layers import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor

from studio import cli
from studio.adapters import AdapterConfig, AdapterPlan, inject
from studio.diffusion.generate import GenerateRequest, generate
from studio.diffusion.lora import apply_loras, check_mentioned, loras
from studio.diffusion.prompts import encode_prompts
from studio.errors import ConfigError
from studio.families.loading import load_base
from studio.formats import FORMATS, format_of, read_adapter, write_adapter
from studio.formats.describe import describe_adapter
from studio.formats.embeddings import ENCODERS, from_rows
from studio.formats.state import AdapterState

WIDTH = 16
LORA = {"lora_down.weight": torch.ones(2, WIDTH), "lora_up.weight": torch.ones(WIDTH, 2), "alpha": torch.tensor(1.0)}
TEXT_LAYER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def vectors(seed: int, number: int = 2) -> Tensor:
    """(number, WIDTH), of the size of a token's embedding in the tiny encoders."""
    return torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(seed)) / WIDTH**0.5


def tokens_of(family: str, *tokens: str) -> AdapterState:
    """A state with these tokens, other vectors for each encoder."""
    components = list(ENCODERS[family].values())
    embeddings = {
        token: {component: vectors(10 * place + number) for number, component in enumerate(components)}
        for place, token in enumerate(tokens)
    }
    return AdapterState(family, {}, {}, embeddings=embeddings)


def same(one: AdapterState, other: AdapterState) -> bool:
    pairs = [
        (one.embeddings[token][component], other.embeddings[token][component])
        for token in one.embeddings
        for component in one.embeddings[token]
    ]
    names = {token: set(parts) for token, parts in one.embeddings.items()}
    assert names == {token: set(parts) for token, parts in other.embeddings.items()}
    return all(torch.equal(a, b) for a, b in pairs)


# -- files -----------------------------------------------------------------------------------


FORMS: dict[str, tuple[dict[str, Any], str, str, tuple[str, ...]]] = {
    # file -> (its content, the token, the family, the components)
    "ink.safetensors": ({"emb_params": vectors(1)}, "ink", "sd", ("text_encoder",)),
    "one-trainer.safetensors": ({"emp_params": vectors(1)}, "one-trainer", "sd", ("text_encoder",)),
    "learned_embeds.safetensors": ({"<cat-toy>": vectors(1)[:1]}, "<cat-toy>", "sd", ("text_encoder",)),
    "learned_embeds.bin": ({"<cat>": vectors(1)[0]}, "<cat>", "sd", ("text_encoder",)),
    "xl.safetensors": (
        {"clip_l": vectors(1), "clip_g": vectors(2)},
        *("xl", "sdxl", ("text_encoder", "text_encoder_2")),
    ),
    "kohya.pt": ({"clip_l": vectors(1), "clip_g": vectors(2)}, "kohya", "sdxl", ("text_encoder", "text_encoder_2")),
    "flux.safetensors": (
        {"clip_l": vectors(1), "t5xxl": vectors(2)},
        *("flux", "flux", ("text_encoder", "text_encoder_2")),
    ),
    "three.safetensors": (
        {"clip_l": vectors(1), "clip_g": vectors(2), "t5": vectors(3)},
        *("three", "sd3", ("text_encoder", "text_encoder_2", "text_encoder_3")),
    ),
    "charturner.pt": (
        {
            "string_to_token": {"*": torch.tensor(265)},
            "string_to_param": {"*": vectors(1).requires_grad_()},
            **{"name": "another", "step": 3000, "sd_checkpoint": None, "sd_checkpoint_name": "v1-5"},
        },
        *("charturner", "sd", ("text_encoder",)),
    ),
}


@pytest.mark.parametrize("file", FORMS)
def test_every_form_is_read(file: str, tmp_path: Path) -> None:
    content, token, family, components = FORMS[file]
    (save_file if file.endswith(".safetensors") else torch.save)(content, tmp_path / file)
    state = read_adapter(tmp_path / file)
    assert format_of(tmp_path / file) == "embedding"
    assert (state.family, list(state.embeddings), set(state.embeddings[token])) == (family, [token], set(components))
    assert not state.tensors and describe_adapter(tmp_path / file)["format"] == "embedding"
    first = state.embeddings[token]["text_encoder"]
    assert torch.equal(first, vectors(1)[: len(first)])


@pytest.mark.parametrize("family", ENCODERS)
def test_a_token_comes_back_from_its_own_file(family: str, tmp_path: Path) -> None:
    state = tokens_of(family, "ink-v1.5")
    path = write_adapter(state, tmp_path / "ink-v1.5", "embedding")
    again = read_adapter(path)
    assert again.family == family and same(state, again)
    assert set(load_file(path)) == ({"ink-v1.5"} if family == "sd" else set(ENCODERS[family]))
    assert again.metadata["modelspec.architecture"].endswith("/textual-inversion")


@pytest.mark.parametrize("family", ENCODERS)
def test_the_metadata_tell_the_family_where_an_encoder_is_missing(family: str, tmp_path: Path) -> None:
    part = tokens_of(family, "ink").embeddings["ink"]["text_encoder"]
    state = AdapterState(family, {}, {}, embeddings={"ink": {"text_encoder": part}})
    assert read_adapter(write_adapter(state, tmp_path / "ink", "embedding")).family == family


def test_a_file_of_its_own_holds_one_token_under_its_name(tmp_path: Path) -> None:
    for state, name in ((tokens_of("sdxl", "a", "b"), "a"), (tokens_of("sd", "a"), "other"), (tokens_of("sd"), "none")):
        with pytest.raises(ConfigError, match=r"the file's name is the token|holds one token"):
            write_adapter(state, tmp_path / name, "embedding")
    layered = dataclasses.replace(tokens_of("sd", "a"), tensors={TEXT_LAYER: LORA})
    with pytest.raises(ConfigError, match="embedding"):
        write_adapter(layered, tmp_path / "a", "embedding")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"clip_l": vectors(1), "clip_l_out": vectors(2)}, "clip_l"),
        ({"clip_l": torch.ones(2, 2, 2)}, "(2, 2, 2)"),
        ({"clip_l": torch.ones(2, 2, dtype=torch.int64)}, "floating"),
        ({"emb_params": torch.ones(300, 4)}, "up to 256"),
        ({"emb_params": vectors(1), "clip_l": vectors(1)}, "twice"),
        ({"bundle_emb.ink.clip_l_out": vectors(1)}, "only OneTrainer"),
        ({"bundle_emb.ink.llama": vectors(1)}, "llama"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_no_embedding_is_refused(content: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(content, tmp_path / "ink.safetensors")
    with pytest.raises(ConfigError) as problem:
        read_adapter(tmp_path / "ink.safetensors")
    assert message in str(problem.value)


# -- bundles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_bundle_comes_back_or_is_refused(format: str, family: str, tmp_path: Path) -> None:
    state = dataclasses.replace(tokens_of(family, "ink", "<b>"), tensors={TEXT_LAYER: LORA})
    try:
        path = write_adapter(state, tmp_path / "bundle", format)
    except ConfigError:
        assert format in ("diffusers", "peft", "embedding")
        return
    again = read_adapter(path)
    assert same(state, again) and again.tensors.keys() == state.tensors.keys()
    assert {key for key in load_file(path) if key.startswith("bundle_emb.")} == {
        f"bundle_emb.{token}.{encoder}" for token in ("ink", "<b>") for encoder in ENCODERS[family]
    }


def test_all_spellings_of_a_bundle(tmp_path: Path) -> None:
    """OneTrainer's, and what A1111's tools make of embeddings of Stable Diffusion 1."""
    layer = {f"lora_te_text_model_encoder_layers_0_mlp_fc1.{suffix}": tensor for suffix, tensor in LORA.items()}
    for name in ("clip_l", "emb_params", "string_to_param.*"):
        save_file({**layer, f"bundle_emb.ink.{name}": vectors(1)}, tmp_path / "lora.safetensors")
        found = read_adapter(tmp_path / "lora.safetensors").embeddings
        assert torch.equal(found["ink"]["text_encoder"], vectors(1))
    save_file({**layer, "bundle_emb.ink.clip_g": vectors(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match="clip_g"):
        read_adapter(tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match="a dot"):
        write_adapter(dataclasses.replace(tokens_of("sd", "v1.5"), tensors={TEXT_LAYER: LORA}), tmp_path / "file")


# -- in prompts ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(kind: str) -> Any:
    return load_base(str(tiny.folder(kind)))


@pytest.fixture
def ink(base: Any, tmp_path: Path) -> Path:
    """A textual inversion of two vectors for this base."""
    return write_adapter(tokens_of(base[0].name, "<ink>"), tmp_path / "<ink>", "embedding")


def test_conditioning_and_noise_equal_diffusers(kind: str, base: Any, ink: Path) -> None:
    """`load_textual_inversion` lengthens the vocabulary; the same words then give the same numbers."""
    family, models = base
    pipe = getattr(diffusers, "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline")
    pipe = pipe.from_pretrained(tiny.folder(kind))
    content = load_file(ink)
    if kind == "sdxl":
        pipe.load_textual_inversion(content["clip_l"], token="<ink>")
        pipe.load_textual_inversion(
            content["clip_g"], token="<ink>", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
        )
    else:
        pipe.load_textual_inversion(str(ink))
    prompt = "a cat, <ink> style"
    with torch.no_grad():
        theirs = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        with loras(family, models, [(str(ink), 1.0)]):
            ours = encode_prompts(family, models, [prompt])
        plain = encode_prompts(family, models, [prompt])
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        noise = family.denoise(models, latents, torch.tensor([300]), ours)
        pooled = (
            {"text_embeds": theirs[2], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])} if kind == "sdxl" else {}
        )
        expected = pipe.unet(latents, torch.tensor([300]), theirs[0], added_cond_kwargs=pooled).sample
    assert torch.allclose(ours.encoder_hidden_states, theirs[0], atol=1e-5)
    assert torch.allclose(noise, expected, atol=1e-5)
    assert not torch.allclose(plain.encoder_hidden_states, theirs[0], atol=1e-2), "the word must matter"


def test_words_are_found_whole_and_in_any_case(base: Any) -> None:
    family, models = base
    state = tokens_of(family.name, "ink")
    with torch.no_grad():
        plain = {text: encode_prompts(family, models, [text]) for text in ("pinky", "ink", "in k")}
        models.words.update(state.embeddings)
        try:
            for text, changed in {"pinky": False, "ink": True, "in k": False}.items():
                found = encode_prompts(family, models, [text])
                assert torch.equal(found.encoder_hidden_states, plain[text].encoder_hidden_states) != changed
            one, other = (encode_prompts(family, models, [text]) for text in ("(ink:1.3), a cat", "(INK:1.3), a cat"))
            assert torch.equal(one.encoder_hidden_states, other.encoder_hidden_states)
        finally:
            models.words.clear()


def test_a_long_prompt_is_not_cut_inside_of_a_word(base: Any) -> None:
    """The last of 75 places: the word's two vectors move to the next chunk together."""
    family, models = base
    models.words.update(tokens_of(family.name, "ink").embeddings)
    try:
        with torch.no_grad():
            late = encode_prompts(family, models, ["a " * 74 + "ink"]).encoder_hidden_states
            alone = encode_prompts(family, models, ["ink"]).encoder_hidden_states
    finally:
        models.words.clear()
    assert late.shape[1] == 2 * 77 and torch.allclose(late[:, 77:], alone, atol=1e-6)


def test_trained_rows_become_a_word(tmp_path: Path) -> None:
    """The method `tokens` on "cat": its rows under the name of a file give what training saw."""
    family, models = load_base(str(tiny.folder("sd15")))
    (cat,) = models.tokenizers["text_encoder"]("cat", add_special_tokens=False).input_ids
    plan = AdapterPlan(("re:.*token_embedding",), config=AdapterConfig("tokens", options={"token_ids": [cat]}))
    adapters = inject(family.prefixes(models), plan, family.roles)
    randomise(adapters)
    with torch.no_grad():
        trained = encode_prompts(family, models, ["a cat on a mat"])
    state = tiny.state_of(family, adapters)
    adapters.detach()
    path = write_adapter(read_adapter(write_adapter(state, tmp_path / "rows")), tmp_path / "tabby", "embedding")
    assert read_adapter(path).metadata["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    with torch.no_grad(), loras(family, models, [(str(path), 1.0)]):
        found = encode_prompts(family, models, ["a tabby on a mat"])
    assert torch.allclose(found.encoder_hidden_states, trained.encoder_hidden_states, atol=1e-6)
    assert list(from_rows(state, "tabby").embeddings) == ["tabby"] and not from_rows(state, "tabby").tensors


def test_files_are_applied_and_taken_off(base: Any, ink: Path, tmp_path: Path) -> None:
    family, models = base
    request = GenerateRequest("a <ink> cat", steps=2, seed=1)
    before = np.asarray(generate(family, models, request)[0])
    with loras(family, models, [(str(ink), 1.0)]) as applied:
        inside = np.asarray(generate(family, models, request)[0])
        check_mentioned(applied, ["a cat", "no <INK>"])
        with pytest.raises(ConfigError, match="not in the prompt"):
            check_mentioned(applied, ["a cat", ""])
        with pytest.raises(ConfigError, match="there are two tokens"):
            apply_loras(family, models, [(str(ink), 1.0)])
    assert (inside != before).any() and not models.words
    assert (np.asarray(generate(family, models, request)[0]) == before).all()
    with pytest.raises(ConfigError, match=r"\(<ink>:0.8\)"):
        apply_loras(family, models, [(str(ink), 0.8)])
    wide = AdapterState(family.name, {}, {}, embeddings={"wide": {"text_encoder": torch.ones(1, 24)}})
    with pytest.raises(ConfigError, match="for another base"):
        apply_loras(family, models, [(str(write_adapter(wide, tmp_path / "wide", "embedding")), 1.0)])
    assert not models.words


def test_generate_draws_with_an_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ink = write_adapter(tokens_of("sd", "ink"), tmp_path / "ink", "embedding")
    common = ["studio", "generate", "--model", str(tiny.folder("sd15")), "--steps", "1", "--lora", str(ink)]
    for prompt, code in (("an ink cat", 0), ("a cat", 2)):
        monkeypatch.setattr(sys, "argv", [*common, prompt])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert (end.value.code or 0) == code
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
