"""The activations that a forward pass keeps for the backward pass.

Counted are distinct storages of tensors that autograd saves, and of new tensors that any Python
object holds beside them, other than the output; weights are not counted.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.engine.figures import Figure
from benchmarks.engine.pair import DORA, DROPOUT, LORA, Kind, share_random_factors, with_ours, with_peft
from benchmarks.engine.workloads import Size, Workload, llama
from studio.seeds import sample_generator

MIB = 1 << 20


class Projections(nn.Module):
    """The queries, keys and values of one input, (B, tokens, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def saved(size: Size) -> Iterator[Figure]:
    """q, k and v on one input, then a whole model."""
    for kind, dtype, bound in ((LORA, torch.bfloat16, 1.3), (DROPOUT, torch.float32, 2.6)):
        work = _projections(dtype)
        x = work.arguments["x"]
        name = f"{kind.name}, {str(dtype).removeprefix('torch.')} input of {x.nbytes / MIB:g} MiB, fp32 adapters"
        yield _figure(f"activations saved by q, k, v: {name}", work, kind, bound)
    work = llama(size)
    for kind in (LORA, DROPOUT, DORA):
        name = f"activations saved in all: {work.name}, {kind.name}"
        yield _figure(name, work, kind, 120 if kind is DORA else None)


def _projections(dtype: torch.dtype) -> Workload:
    torch.manual_seed(0)
    model = Projections(1024).to(dtype).requires_grad_(False).eval()
    x = torch.randn(1, 512, 1024, generator=sample_generator("projections")).to(dtype).requires_grad_()
    return Workload("q, k, v", model, r"(q|k|v)_proj", {"x": x})


def _figure(name: str, work: Workload, kind: Kind, bound: float | None) -> Figure:
    theirs, (model, adapters) = with_peft(work.model, work.targets, kind).train(), with_ours(work, kind)
    share_random_factors(adapters, theirs)
    adapters.train()
    adapters.set_keys([0])
    bare, peft, ours = (saved_bytes(work, one) / MIB for one in (copy.deepcopy(work.model), theirs, model))
    target = "-" if bound is None else f"at most {bound:g} MiB"
    return Figure(name, "MiB", peft, ours, bound, target, note=f"bare {bare:.3g} MiB")


@dataclass(eq=False)
class _Saved:
    """What autograd keeps in a tensor's place; it dies with the node that saved it."""

    tensor: Tensor


def saved_bytes(work: Workload, model: nn.Module) -> int:
    """What one forward pass keeps, in bytes, after one that fills whatever is cached for good."""
    model(**work.arguments)
    gc.collect()
    live = _live_tensors()
    weights = {_place(tensor) for tensor in live if isinstance(tensor, nn.Parameter)}
    held = {_place(tensor) for tensor in live}
    saved: WeakSet[_Saved] = WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        kept = _Saved(tensor.detach())
        saved.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        output = model(**work.arguments)
    gc.collect()
    held |= {_place(tensor) for tensor in tree_leaves(output)}
    beside = [tensor for tensor in _live_tensors() if _place(tensor) not in held]
    sizes = {_place(tensor): tensor.untyped_storage().nbytes() for tensor in [*beside, *(one.tensor for one in saved)]}
    return sum(size for place, size in sizes.items() if place not in weights)


def _live_tensors() -> list[Tensor]:
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
