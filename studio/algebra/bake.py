"""Any method as what every tool reads: a plain LoRA, or the full difference of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from studio.adapters import WeightView
from studio.algebra.change import Layer, change_of
from studio.algebra.combine import combine
from studio.algebra.report import BlendReport, CombinedState
from studio.errors import ConfigError
from studio.formats.metadata import merged
from studio.formats.state import AdapterState

Bases = Mapping[str, WeightView] | None


def bake_lora(state: AdapterState, rank: int | None = None, bases: Bases = None) -> CombinedState:
    """The state with every dW as a LoRA: exact for methods that are low-rank themselves, else the best of `rank`.

    Norms, and layers of which the bias alone changes, stay as they are. The report's residuals are the errors.
    `bases` as in `blend`. Raises ConfigError where a rank is needed, and where a bias changes with the weight,
    which no LoRA holds.
    """
    baked = combine([state], [1.0], rank, bases)
    full = {name: entry for name, entry in baked.tensors.items() if "diff" in entry}
    if biased := [name for name, entry in full.items() if "diff_b" in entry]:
        raise ConfigError(
            f"{len(biased)} layers change their bias too, which no LoRA holds: {', '.join(biased[:5])}. Bake into diff"
        )
    if full:
        raise ConfigError(
            f"the changes of {len(full)} layers may have any rank: {', '.join([*full][:5])}. Give the rank to keep of "
            "them (--rank 32), or bake into diff"
        )
    return baked


@torch.no_grad()
def bake_diff(state: AdapterState, bases: Bases = None) -> CombinedState:
    """The state with every dW and db as they are, under `diff` and `diff_b` (on norms `w_norm` and `b_norm`); exact.

    `bases` and errors as in `blend`.
    """
    entries = {}
    for name, entry in state.tensors.items():
        try:
            change = change_of(entry, Layer.of(name, None if bases is None else bases.get(name), [entry]))
        except ConfigError as problem:
            raise ConfigError(f"{name}: {problem}") from problem
        entries[name] = replace(change, weight=change.dense()).entry()
    metadata = merged([state.metadata], ["1"], [1.0], "bake", {})
    report = BlendReport(residuals=dict.fromkeys(entries, 0.0))
    return CombinedState(state.family, entries, metadata, report, embeddings=state.embeddings)
