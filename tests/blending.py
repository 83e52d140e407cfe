"""Three random LoRAs on one layer, what they change, and their blends, for the tests of the algebra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from studio.algebra import BLENDS, blend
from studio.formats.state import AdapterState

LAYER, WEIGHTS = "net.layer", [0.7, -0.4, 0.9]
BY_ENTRIES = [name for name, way in BLENDS.items() if not way.coefficients]


def lora(seed: int, out: int = 24, inputs: int = 30, rank: int = 3, name: str = LAYER) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, inputs, generator=generator), torch.randn(out, rank, generator=generator)
    return AdapterState("net", {name: {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}})


STATES = [lora(seed, rank=2 + seed) for seed in range(3)]


def product(entry: Mapping[str, Tensor]) -> Tensor:
    """dW in float64, of a LoRA or a full difference."""
    if "diff" in entry:
        return entry["diff"].double()
    up, down = entry["lora_up.weight"].double(), entry["lora_down.weight"].double()
    return float(entry["alpha"]) / len(down) * up @ down


DELTAS = [product(one.tensors[LAYER]) for one in STATES]


def blended(states: Sequence[AdapterState], weights: Sequence[float], method: str, **settings: object) -> Tensor:
    return product(blend(states, weights, method, **settings).tensors[LAYER])


def weights_for(method: str) -> tuple[list[AdapterState], list[float]]:
    """Inputs that the method takes: slerp is between two, and neither is subtracted."""
    return (STATES[:2], [0.7, 0.4]) if method == "slerp" else (STATES, WEIGHTS)
