"""How tools spell the tensors of an adapter: the ending of a key after the layer's name -> our suffix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from studio.adapters import METHODS
from studio.formats.reading import ALPHA, DOWN, MAGNITUDE, UP

Spelling = Mapping[str, str]


def pair(up: str, down: str) -> dict[str, str]:
    """The spelling of a LoRA whose factors' keys end so."""
    return {up: UP, down: DOWN, ".alpha": ALPHA, ".dora_scale": MAGNITUDE}


OF_PROCESSOR = "_lora"
"""diffusers before PEFT: the factors were in the attention's processor, `attn1.processor.to_q_lora.down.weight`."""
KOHYA = pair(".lora_up.weight", ".lora_down.weight")  # OneTrainer too
PEFT = pair(".lora_B.weight", ".lora_A.weight")
PEFT_MODEL = pair(".lora_B.default.weight", ".lora_A.default.weight")  # the state dict of a model under PEFT
MOCHI = pair(".lora_B", ".lora_A")
DIFFUSERS = pair(".lora.up.weight", ".lora.down.weight")  # denoisers
ENCODER = pair(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight")  # diffusers' text encoders
PROCESSOR = pair(f"{OF_PROCESSOR}.up.weight", f"{OF_PROCESSOR}.down.weight")
LORA_ENDINGS: Spelling = {**KOHYA, **PEFT, **PEFT_MODEL, **MOCHI, **DIFFUSERS, **ENCODER, **PROCESSOR}
"""All of them."""
LORA = ("dora", "lora")
"""The methods that are spelled so."""
PEFT_MAGNITUDE = ".lora_magnitude_vector.weight"


def split_key(key: str, endings: Mapping[str, str]) -> tuple[str, str, str]:
    """(the layer's name, the ending, what it is of ours) of a key; all empty where it has none of `endings`."""
    found = [ending for ending in endings if key.endswith(ending)]
    if not found:
        return "", "", ""
    ending = max(found, key=len)
    return key.removesuffix(ending), ending, endings[ending]


def with_processor(path: str) -> str:
    """The name that attention layers had in diffusers before PEFT: `attn1.processor.to_out` for `attn1.to_out.0`."""
    name = path.replace(".to_", ".processor.to_")
    return name.removesuffix(".0") if name.endswith(".to_out.0") else name


def without_processor(path: str) -> str:
    """The inverse: "attn1.processor.to_out" is "attn1.to_out.0"."""
    path = path.replace(".processor.", ".")
    return f"{path}.0" if path.endswith(".to_out") else path


def plain_endings(suffixes: Iterable[str]) -> dict[str, str]:
    """The endings of keys in kohya's and LyCORIS's spelling, which is ours."""
    return {f".{suffix}": suffix for suffix in suffixes}


def spelled(methods: Iterable[str]) -> dict[str, str]:
    """The endings of these methods' tensors in that spelling."""
    suffixes = frozenset().union(*(METHODS[name].needed | METHODS[name].optional for name in methods))
    return plain_endings(sorted(suffixes))
