"""How files spell the tensors of an adapter: ending of a key after the module -> our suffix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from studio.adapters import METHODS
from studio.formats.reading import ALPHA, DOWN, MAGNITUDE, UP

Spelling = Mapping[str, str]


def pair(up: str, down: str) -> dict[str, str]:
    """The spelling of a LoRA whose factors' keys end so."""
    return {up: UP, down: DOWN, ".alpha": ALPHA, ".dora_scale": MAGNITUDE}


def spelled(methods: Iterable[str]) -> dict[str, str]:
    """kohya's and LyCORIS's spelling of these methods, which is ours."""
    suffixes = frozenset().union(*(METHODS[name].needed | METHODS[name].optional for name in methods))
    return {f".{suffix}": suffix for suffix in sorted(suffixes)}


KOHYA = pair(".lora_up.weight", ".lora_down.weight")
PEFT = pair(".lora_B.weight", ".lora_A.weight")
DIFFUSERS = pair(".lora.up.weight", ".lora.down.weight")
PROCESSOR = pair("_lora.up.weight", "_lora.down.weight")
ENCODER = pair(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight")

LORA = ("dora", "lora")
PEFT_MAGNITUDE = ".lora_magnitude_vector.weight"


def processor(path: str) -> str:
    """The name that attention layers had in diffusers before PEFT: `attn1.processor.to_out` for `attn1.to_out.0`."""
    name = path.replace(".to_", ".processor.to_")
    return name.removesuffix(".0") if name.endswith(".to_out.0") else name
