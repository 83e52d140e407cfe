"""EVA: LoRA's `lora_down` from the principal components of what a layer reads (arXiv:2410.07170).

The inputs x of a layer over a few batches, centred, have the right singular vectors v_1, v_2, ... with
singular values s_i; v_i explains the share s_i^2 / sum ||x - mean||^2 of their variance. They are followed
batch by batch (incremental SVD: Ross et al. 2008, as in scikit-learn's IncrementalPCA). The ranks of all
layers go to the largest shares of all layers, at most rho times its own rank to each; `lora_down` becomes
these v_i, and `lora_up` zero, so that nothing changes at first.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from studio.adapters.adapter_set import AdapterSet
from studio.adapters.base import Adapter
from studio.adapters.inits.initial import svd_lowrank
from studio.adapters.layers import WeightView
from studio.adapters.methods.lora import LoRA
from studio.errors import ConfigError
from studio.seeds import sample_generator


@dataclass
class Components:
    """The `most` principal components of all rows seen."""

    most: int
    vectors: Tensor | None = None  # (components, in)
    values: Tensor | None = None  # (components,), singular
    mean: Tensor | None = None  # (in,)
    variance: float = 0.0  # sum of ||row - mean||^2
    seen: int = 0  # rows
    similarity: Tensor | None = None  # (components,), of each to its former self

    def add(self, rows: Tensor, generator: torch.Generator) -> None:
        """Takes in `rows` (n, in)."""
        count, mean = len(rows), rows.mean(0)
        centred = rows - mean
        self.variance += float(centred.square().sum())
        before = self.vectors
        if before is not None:
            assert self.mean is not None and self.values is not None
            shift = (self.seen * count / (self.seen + count)) ** 0.5 * (self.mean - mean)  # (in,)
            self.variance += float(shift.square().sum())
            centred = torch.cat([self.values[:, None] * before, centred, shift[None]])
            mean = self.mean + (mean - self.mean) * count / (self.seen + count)
        self.seen, self.mean = self.seen + count, mean
        rank = min(2 * self.most, *centred.shape)  # twice as many as needed, as in peft
        _, values, right = svd_lowrank(centred, rank, 4, generator)
        self.vectors, self.values = right[: self.most], values[: self.most]
        if before is not None:
            common = min(len(before), len(self.vectors))
            # the sign of a component is arbitrary
            self.similarity = torch.cosine_similarity(self.vectors[:common], before[:common]).abs()

    def settled(self, rank: int, tau: float) -> bool:
        """Whether the first `rank` have stopped turning."""
        return self.similarity is not None and bool((self.similarity[:rank] >= tau).all())

    @property
    def shares(self) -> Tensor:
        """The share of the variance that each explains."""
        assert self.values is not None
        return self.values.square() / max(self.variance, torch.finfo(torch.float32).tiny)


@dataclass
class _Inputs:
    """A hook that follows what its layer reads; layers that read the same tensor follow it once."""

    name: str
    components: Components
    rows: Callable[[Tensor], Tensor]
    latest: list[Any]  # [weak reference to a tensor, its components], shared by all hooks
    paused: bool = False
    handle: Any = field(default=None, repr=False)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if self.latest and self.latest[0]() is x and self.latest[1].most == self.components.most:
            self.components = self.latest[1]
            return
        self.latest[:] = weakref.ref(x), self.components
        if not self.paused:
            self.components.add(self.rows(x.detach()).float(), sample_generator("eva", self.name))


def _all_rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)  # (tokens, in)


@torch.no_grad()
def initialise_from_activations(
    adapters: AdapterSet,
    passes: Iterable[Any],
    rho: float = 2.0,
    tau: float = 0.99,
    rows: Callable[[Tensor], Tensor] = _all_rows,
) -> AdapterSet:
    """A new set, attached in place of `adapters`, whose LoRAs on linear layers start from their inputs.

    `passes` makes one forward pass of the base for each of its items: `(model(**batch) for batch in
    batches)`. It is read until no component that gets a rank turns any more (its cosine to its former self
    is `tau` or more), or to its end; two passes at least. `rho` >= 1: the most a layer's rank may grow;
    1 leaves the ranks as they are. `rows` picks what counts of a layer's input (..., in) as (n, in): leave
    padding out there. A layer that gets no rank leaves the set; one that gets another keeps its scale.
    Adapters on other layers (convolutions, embeddings), and other methods, stay as they are.
    Raises ConfigError for `rho` below 1, or without anything to start.
    """
    if rho < 1:
        raise ConfigError(f"rho is {rho}; it must be 1 or more")
    chosen = {name: one for name, one in adapters.items() if _fits(one)}
    if not chosen:
        raise ConfigError("EVA starts LoRAs on linear layers, and the set has none")
    enabled, adapters.enabled = adapters.enabled, False
    try:
        hooks = _follow(adapters, chosen, passes, rho, tau, rows)
    finally:
        adapters.enabled = enabled
    ranks = _ranks(chosen, hooks)
    adapters.detach()
    started: dict[str, Adapter] = {}
    for name, one in adapters.items():
        if name not in chosen:
            started[name] = one
        elif ranks[name]:
            vectors = hooks[name].components.vectors
            assert vectors is not None
            started[name] = _started(chosen[name], WeightView(adapters.targets[name]), vectors[: ranks[name]])
    return AdapterSet({name: adapters.targets[name] for name in started}, started, adapters.seed).attach()


def _fits(adapter: Adapter) -> bool:
    return isinstance(adapter, LoRA) and adapter.spec.kind == "linear" and adapter.spec.called


def _follow(
    adapters: AdapterSet,
    chosen: Mapping[str, LoRA],
    passes: Iterable[Any],
    rho: float,
    tau: float,
    rows: Callable[[Tensor], Tensor],
) -> dict[str, _Inputs]:
    """The components of each layer's input, after as many passes as they need."""
    latest: list[Any] = []
    hooks = {}
    for name, adapter in chosen.items():
        most = min(round(rho * adapter.config.rank), adapter.spec.in_features)
        hooks[name] = _Inputs(name, Components(most), rows, latest)
        hooks[name].handle = adapters.targets[name].layer.register_forward_pre_hook(hooks[name], with_kwargs=True)
    try:
        for _ in passes:
            ranks = _ranks(chosen, hooks)
            for name, hook in hooks.items():
                hook.paused = hook.components.settled(ranks[name], tau)
            if all(hook.paused for hook in hooks.values()):
                break
    finally:
        for hook in hooks.values():
            hook.handle.remove()
    return hooks


def _ranks(chosen: Mapping[str, LoRA], hooks: Mapping[str, _Inputs]) -> dict[str, int]:
    """The sum of all ranks, given to the components that explain most."""
    unread = [name for name, hook in hooks.items() if hook.components.vectors is None]
    if unread:
        raise ConfigError(f"{len(unread)} adapted layers read nothing in a forward pass: {', '.join(unread[:5])}")
    shares = [(float(share), name) for name, hook in hooks.items() for share in hook.components.shares]
    budget = sum(adapter.config.rank for adapter in chosen.values())
    counts = Counter(name for _, name in sorted(shares, key=lambda one: -one[0])[:budget])
    return {name: counts[name] for name in chosen}


def _started(adapter: LoRA, weight: WeightView, vectors: Tensor) -> LoRA:
    """A new adapter with `vectors` (rank, in) as `lora_down`, and the scale of the old one."""
    config = replace(adapter.config, rank=len(vectors), options={**adapter.config.options, "init": "kaiming"})
    config = replace(config, alpha=(config.alpha or config.rank) * adapter.scale / config.scale)
    new = type(adapter)(adapter.spec, config)
    new.reset(torch.Generator(), weight)  # all that it draws is replaced
    new.lora_down.copy_(vectors)
    new.lora_up.zero_()
    return new.to(adapter.lora_down.device)
