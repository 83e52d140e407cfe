"""The same adapter, with the same random factors, in peft and in ours."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.engine.workloads import Workload
from studio.adapters import AdapterConfig, AdapterPlan, AdapterSet, inject
from studio.seeds import sample_generator

RANK = 16


@dataclass(frozen=True)
class Kind:
    """The settings of an adapter that both libraries have."""

    name: str = "LoRA"
    dropout: float = 0.0
    dora: bool = False


LORA, DROPOUT, DORA = Kind(), Kind("dropout 0.05", dropout=0.05), Kind("DoRA", dora=True)


def with_peft(model: nn.Module, targets: str, kind: Kind = LORA, adapters: int = 1) -> nn.Module:
    """A copy of `model` with peft's adapters "default", "1", "2" and so on, the first one active."""
    from peft import get_peft_model

    adapted = get_peft_model(copy.deepcopy(model), peft_config(targets, kind))
    for index in range(1, adapters):
        adapted.add_adapter(str(index), peft_config(targets, kind))
    return adapted


def peft_config(targets: str, kind: Kind = LORA):
    """peft's settings of an adapter of `kind`."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=kind.dropout, use_dora=kind.dora, target_modules=targets)


def with_ours(work: Workload, kind: Kind = LORA) -> tuple[nn.Module, AdapterSet]:
    """A copy of the model and the adapters on it, checked by a dry forward pass as a trainer does."""
    model = copy.deepcopy(work.model)
    adapters = inject_ours(model, work.targets, kind)
    adapters.eval()
    adapters.check_used(lambda: work.forward(model))
    return model, adapters


def inject_ours(model: nn.Module, targets: str, kind: Kind = LORA, seed: int = 0) -> AdapterSet:
    """Adapters of `kind` on `model` itself."""
    config = AdapterConfig("dora" if kind.dora else "lora", rank=RANK, alpha=float(RANK), dropout=kind.dropout)
    return inject({"model": model}, AdapterPlan((f"re:model\\.{targets}",), config=config), roles={}, seed=seed)


@torch.no_grad()
def share_random_factors(adapters: AdapterSet, peft_model: nn.Module, peft_name: str = "default") -> None:
    """Random factors (never zero) for `adapters`, copied into peft's adapter: both then are one function."""
    for name, adapter in adapters.items():
        generator = sample_generator("benchmark", peft_name, name)
        theirs = peft_model.base_model.model.get_submodule(name.removeprefix("model."))
        adapter.lora_up.copy_(0.02 * torch.randn(adapter.lora_up.shape, generator=generator))
        theirs.lora_A[peft_name].weight.copy_(adapter.lora_down)
        theirs.lora_B[peft_name].weight.copy_(adapter.lora_up)
        if peft_name in theirs.lora_magnitude_vector:  # DoRA
            magnitude = theirs.lora_magnitude_vector[peft_name].weight
            adapter.dora_scale.mul_(1 + 0.1 * torch.randn(adapter.dora_scale.shape, generator=generator))
            magnitude.copy_(adapter.dora_scale.reshape(magnitude.shape))


def check_equal(ours: Tensor, theirs: Tensor) -> None:
    """Raises AssertionError where |ours - theirs| exceeds 1e-6 + 1e-4 max |theirs|.

    Two functions that differ could not be compared in speed.
    """
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 + 1e-4 * theirs.abs().max().item())
