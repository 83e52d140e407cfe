"""Other ranks for an adapter: the best LoRA of a rank, or of the smallest rank that keeps enough, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from studio.adapters import WeightView
from studio.algebra.change import Layer, change_of, located
from studio.algebra.cut import Cut
from studio.algebra.report import CombinedState, Tally
from studio.errors import ConfigError
from studio.formats.metadata import merged
from studio.formats.state import AdapterState


@torch.no_grad()
def resize(
    state: AdapterState,
    rank: int | None = None,
    *,
    energy: float | None = None,
    sv_ratio: float | None = None,
    frobenius: float | None = None,
    bases: Mapping[str, WeightView] | None = None,
    name: str = "1",
    dtype: torch.dtype | None = None,
) -> CombinedState:
    """`state` as a LoRA of the ranks that `Cut` chooses, with alpha = rank, which keeps its strength.

    With one of `energy`, `sv_ratio` and `frobenius`, each layer gets a rank of its own, `rank` at most. Layers
    that have no more than that stay as they are, norms and layers whose bias changes too;
    what changes is fp32, or `dtype`. `bases` as in `blend`;
    `name` calls the input in the metadata. Raises ConfigError where nothing says how far to cut, and as `blend`
    does.
    """
    cut = Cut(rank, energy, sv_ratio, frobenius)
    if cut == Cut():
        raise ConfigError("give a rank, an energy, an sv_ratio or a frobenius: how far to cut")
    tally, entries = Tally(), {}
    for layer_name, entry in state.tensors.items():
        layer = Layer.of(layer_name, None if bases is None else bases.get(layer_name), [entry])
        with located(layer_name):
            change = change_of(entry, layer)
        shorter = tally.cut({layer_name: (layer, change)}, cut)[layer_name]
        with located(layer_name):
            entries[layer_name] = entry if shorter is change else tally.entry(shorter, dtype)
    stated = cut.stated() | ({"dtype": str(dtype)} if dtype else {})
    metadata = merged([state.metadata], [name], [1.0], "resize", stated)
    return CombinedState(state.family, entries, metadata, tally.report(), embeddings=state.embeddings)
