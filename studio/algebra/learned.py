"""A blend with learned coefficients, one for each adapter, layer and input channel (ZipLoRA, arXiv:2311.13600).

dW = sum_i dW_i diag(m_i), with the adapters' own factors frozen and every m_i starting at 1, the plain sum. One
coefficient for each column of dW, as in the paper, lets an adapter keep the channels that it needs and leave others
to its neighbours; a single one for each layer could only change its norm. A scaled column is a scaled column of
`lora_down`, so the result is a LoRA, exactly. Fitting the coefficients is a trainer's (trainers/blend.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations

import torch
from torch import Tensor, nn

from studio.adapters import AdapterConfig, AdapterSet, LayerSpec, WeightView, named_targets
from studio.adapters.base import method_of
from studio.adapters.methods import LoRA
from studio.algebra.combine import blend
from studio.algebra.strengths import Strengths
from studio.errors import ConfigError
from studio.formats.state import AdapterState


class ColumnScaled(LoRA):
    """A trained LoRA, frozen, with a trainable coefficient for each input channel: scale * up @ (down * columns)."""

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        self.requires_grad_(False)
        self.columns = nn.Parameter(torch.ones(self.lora_down.shape[1]))

    def down_weight(self) -> Tensor:
        return self.lora_down * self.columns.reshape(-1, *(1,) * self.spec.dims)  # (rank, in, *kernel)


def prepared(
    states: Sequence[AdapterState],
    weights: Sequence[float],
    strengths: Sequence[Strengths] | None = None,
    bases: Mapping[str, WeightView] | None = None,
) -> list[AdapterState]:
    """Each adapter as LoRA with its weight in the factors; arguments as for `blend`.

    Raises ConfigError for layers that are not low-rank, naming the first five, and for trained tokens.
    """
    blocks = [{} for _ in states] if strengths is None else strengths
    found: list[AdapterState] = []
    if tokens := [token for state in states for token in state.embeddings]:
        raise ConfigError(f"trained tokens ({', '.join(tokens)}) have no columns: blend them without learning")
    for place, (state, weight, own) in enumerate(zip(states, weights, blocks, strict=True), start=1):
        ready = blend([state], [weight], strengths=[own], bases=bases)
        others = [name for name, entry in ready.tensors.items() if method_of(frozenset(entry)) is not LoRA]
        if others:
            raise ConfigError(
                f"{len(others)} of the {len(ready.tensors)} layers of adapter {place} are not low-rank, so they have "
                f"no columns to scale: {', '.join(others[:5])}. Make it a LoRA first: studio resize FILE --rank 16"
            )
        found.append(ready)
    return found


class LearnedBlend(nn.Module):
    """Adapters on the models of a base, each with its coefficients, which alone train."""

    def __init__(self, modules: Mapping[str, nn.Module], states: Sequence[AdapterState]) -> None:
        super().__init__()
        targets = named_targets(modules)
        self.family = states[0].family
        self.sets = nn.ModuleList()
        for state in states:
            missing = [name for name in state.tensors if name not in targets]
            if missing:
                raise ConfigError(f"{len(missing)} layers are not in the base: {', '.join(missing[:5])}")
            own = {name: targets[name] for name in state.tensors}
            adapters = {name: _scaled(own[name].spec, state.tensors[name]).to(own[name].device) for name in own}
            self.sets.append(AdapterSet(own, adapters))
        for one in self.sets:
            one.attach()

    def detach(self) -> None:
        """Takes the adapters off the models."""
        for one in self.sets:
            one.detach()

    @contextmanager
    def only(self, chosen: int | None) -> Iterator[None]:
        """Inside the block, the adapter of this number acts alone; None: the base."""
        for place, one in enumerate(self.sets):
            one.enabled = place == chosen
        try:
            yield
        finally:
            for one in self.sets:
                one.enabled = True

    def alignment(self) -> Tensor:
        """The mean of |m_i . m_j| / columns over all pairs and their common layers; 0 without any.

        The paper's second loss term, which parts the channels between the adapters.
        """
        by_layer = [{name: adapter.columns for name, adapter in one.items()} for one in self.sets]
        terms = [
            (first[name] * second[name]).mean().abs()
            for first, second in combinations(by_layer, 2)
            for name in first.keys() & second.keys()
        ]
        return torch.stack(terms).mean() if terms else torch.zeros(())

    def states(self) -> list[AdapterState]:
        """Each adapter with its coefficients in `lora_down`: together, at strength 1, they are the blend."""
        return [AdapterState(self.family, one.state()) for one in self.sets]


def _scaled(spec: LayerSpec, entry: Mapping[str, Tensor]) -> ColumnScaled:
    adapter = ColumnScaled.from_export(spec, dict(entry))
    assert isinstance(adapter, ColumnScaled)
    return adapter
