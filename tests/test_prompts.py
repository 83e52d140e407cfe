"""Prompt syntax, and the conditioning of weighted and long prompts."""

from __future__ import annotations

import pytest
import tiny
import torch

from studio.diffusion.prompts import encode_prompts, extract_loras, parse_weights, plain
from studio.errors import ConfigError
from studio.families.loading import load_base

UP = 1.1


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("a cat", [("a cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", UP), (" cat", 1)]),
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("(a [b] c)", [("a ", UP), ("b", 1), (" c", UP)]),
        ("((a))[[b]]", [("a", UP**2), ("b", UP**-2)]),
        ("(a (b:2):0.5)", [("a ", 0.5), ("b", 1)]),
        ("(a: .5 )", [("a", 0.5)]),
        (r"a \(b\) \[c\] \\", [("a (b) [c] \\", 1)]),
        ("stray ) and ] and :1.2)", [("stray ) and ] and :1.2)", 1)]),
        ("a (b [c", [("a ", 1), ("b ", UP), ("c", 1)]),
        ("a (b:1.2", [("a ", 1), ("b:1.2", UP)]),
        ("time 12:30, ratio (16:9)", [("time 12:30, ratio ", 1), ("16", 9)]),
        ("", []),
    ],
)
def test_attention_syntax(prompt, spans):
    (section,) = parse_weights(prompt)
    assert [text for text, _ in section] == [text for text, _ in spans]
    assert [weight for _, weight in section] == pytest.approx([weight for _, weight in spans])


def test_break_parts_sections_even_inside_brackets():
    assert parse_weights("a BREAK b") == [[("a", 1.0)], [("b", 1.0)]]
    assert parse_weights("(a BREAK b:1.5)") == [[("a", 1.5)], [("b", 1.5)]]
    assert parse_weights("BREAKFAST, OUTBREAK") == [[("BREAKFAST, OUTBREAK", 1.0)]]


def test_lora_tags_are_taken_out():
    assert extract_loras("a cat <lora:ink:0.8>, dark <lora:my lora v1.2>") == (
        "a cat , dark",
        [("ink", 0.8), ("my lora v1.2", 1.0)],
    )
    assert extract_loras("x <3 and y > 2") == ("x <3 and y > 2", [])


LITERAL = [
    *("a cat", "", "a (red:1.3) [b] cat", r"C:\(x\) \\", "a ) b ] (c [d", "x <3 and y > 2", "12:30) :1.2)"),
    *("a BREAK b", "BREAKFAST BREAK", r"\BREAK (BREAK)", "<lora:ink:0.8> <b:c>", r"\<lora:ink:0.8>", "<<lora:a:1>>"),
]


@pytest.mark.parametrize("text", LITERAL)
def test_plain_text_survives_the_syntax(text):
    assert extract_loras(plain(text)) == (plain(text), [])
    assert parse_weights(plain(text)) == [[(text, 1.0)] if text else []]


@pytest.mark.parametrize("tag", ["<lora:ink:much>", "<lora:ink:0.5:0.7>", "<lora: :1>", "<hypernet:ink:1>"])
def test_bad_tags_are_refused(tag):
    with pytest.raises(ConfigError, match=tag.strip("<>")):
        extract_loras(f"a cat {tag}")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request):
    return load_base(str(tiny.folder(request.param)))


def encode(base, *prompts, clip_skip=0):
    return encode_prompts(*base, prompts, clip_skip)


@pytest.mark.parametrize("clip_skip", [0, 1])
@pytest.mark.parametrize("prompt", ["a cat, sitting", "", "x" * 75])
def test_plain_prompts_are_encoded_as_the_family_does(base, prompt, clip_skip):
    family, models = base
    expected = family.encode_prompt(models, [prompt], clip_skip)
    found = encode(base, prompt, clip_skip=clip_skip)
    torch.testing.assert_close(found.encoder_hidden_states, expected.encoder_hidden_states, rtol=0, atol=0)
    if expected.pooled is not None:
        torch.testing.assert_close(found.pooled, expected.pooled, rtol=0, atol=0)


def test_long_prompts_are_their_chunks_side_by_side(base):
    first, second = "a " * 75, "b " * 20
    whole = encode(base, first + second, "short")
    assert whole.encoder_hidden_states.shape[:2] == (2, 154)
    parts = encode(base, first, second, "short", "")
    expected = parts.encoder_hidden_states.reshape(2, 154, -1)
    torch.testing.assert_close(whole.encoder_hidden_states, expected)
    torch.testing.assert_close(
        encode(base, "a BREAK b").encoder_hidden_states,
        encode(base, "a", "b").encoder_hidden_states.reshape(1, 154, -1),
    )
    if whole.pooled is not None:
        torch.testing.assert_close(whole.pooled, parts.pooled[[0, 2]])


def test_chunks_end_at_a_comma_near_their_end(base):
    kept_whole = encode(base, "a" * 60 + "," + "b" * 30).encoder_hidden_states
    expected = encode(base, "a" * 60 + ",", "b" * 30).encoder_hidden_states
    torch.testing.assert_close(kept_whole, expected.reshape(1, 154, -1))


def test_weights_scale_tokens_and_keep_the_mean_of_each_encoder(base):
    plain = encode(base, "a cat").encoder_hidden_states[0]
    weighted = encode(base, "a (cat:1.5)").encoder_hidden_states[0]
    for before, after in zip(plain.split(16, dim=-1), weighted.split(16, dim=-1), strict=True):
        torch.testing.assert_close(after.mean(), before.mean(), rtol=1e-3, atol=1e-6)
        ratio = after / before
        torch.testing.assert_close(ratio[2] / ratio[1], torch.full((16,), 1.5))  # start, "a", "cat", end, ...
        torch.testing.assert_close(ratio[3], ratio[1])


def test_a_prompt_does_not_depend_on_its_neighbours(base):
    alone = encode(base, "a (cat:1.5)").encoder_hidden_states[0]
    beside = encode(base, "x", "a (cat:1.5)").encoder_hidden_states[1]
    torch.testing.assert_close(alone, beside)


def test_clip_skip_beyond_the_encoder_is_refused(base):
    with pytest.raises(ConfigError, match="at most 2"):
        encode(base, "a", clip_skip=3)
