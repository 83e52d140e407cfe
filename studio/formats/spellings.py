"""How tools end the keys of a LoRA's factors after the layer's name: all of it is one of our suffixes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from studio.formats.reading import ALPHA, DOWN, MAGNITUDE, UP

PROCESSOR = "_lora"
"""diffusers before PEFT: the factors were in the attention's processor, `attn1.processor.to_q_lora.down.weight`."""
_PAIRS = (  # (down, up)
    (".lora_down.weight", ".lora_up.weight"),  # kohya, OneTrainer
    (".lora_A.weight", ".lora_B.weight"),  # PEFT's files
    (".lora_A.default.weight", ".lora_B.default.weight"),  # the state dict of a model under PEFT
    (".lora_A", ".lora_B"),  # Mochi
    (".lora.down.weight", ".lora.up.weight"),  # diffusers' denoisers
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),  # diffusers' text encoders
    (f"{PROCESSOR}.down.weight", f"{PROCESSOR}.up.weight"),
)
LORA_ENDINGS: Mapping[str, str] = {
    **{down: DOWN for down, _ in _PAIRS},
    **{up: UP for _, up in _PAIRS},
    ".alpha": ALPHA,
    ".dora_scale": MAGNITUDE,
}


def split_key(key: str, endings: Mapping[str, str]) -> tuple[str, str, str]:
    """(the layer's name, the ending, what it is of ours) of a key; all empty where it has none of `endings`."""
    found = [ending for ending in endings if key.endswith(ending)]
    if not found:
        return "", "", ""
    ending = max(found, key=len)
    return key.removesuffix(ending), ending, endings[ending]


def without_processor(path: str) -> str:
    """The layer's path now: "attn1.processor.to_out" is "attn1.to_out.0"."""
    path = path.replace(".processor.", ".")
    return f"{path}.0" if path.endswith(".to_out") else path


def plain_endings(suffixes: Iterable[str]) -> dict[str, str]:
    """The endings of methods whose keys end in our own suffixes."""
    return {f".{suffix}": suffix for suffix in suffixes}
