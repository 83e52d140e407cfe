"""What a combination kept, what it lost, and where its inputs disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from studio.algebra.change import Change, Layer, cut_down
from studio.algebra.cut import Cut
from studio.algebra.product import Product
from studio.errors import ConfigError
from studio.formats.state import AdapterState

ROWS = 16
"""How many rows of a low-rank dW are looked at for sign conflicts and rounding."""


@dataclass(frozen=True)
class BlendReport:
    """The figures of one combination. Norms are Frobenius norms.

    `residuals`: layer -> |sought - result| / |sought|, 0 where it is exact; `residual`: the same of the layers that
    were shortened, all at once; `energy_kept`: the share of their squared norm that they kept, 1 without any.
    `rounding`: |result - stored| / |result| over all layers, where half precision was asked for; the residuals do
    not count it. `sign_conflicts`: layer -> share of the entries of dW where two inputs, with their weights, have
    opposite signs, for layers of two inputs and more. That and the rounding are counted in up to `sampled_rows` evenly
    spaced rows of low-rank layers, or, where it is None, in all entries. `ranks`: layer -> rank, of the layers that
    are a LoRA now. `partial`: layer -> the inputs that have it, where not all do. `left_out`: layers whose weights
    are all 0 (`blend`), tensors that differ and were not taken (`extract`).
    """

    residuals: Mapping[str, float] = field(default_factory=dict)
    energy_kept: float = 1.0
    rounding: float = 0.0
    sign_conflicts: Mapping[str, float] = field(default_factory=dict)
    sampled_rows: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    partial: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def residual(self) -> float:
        return max(1 - self.energy_kept, 0.0) ** 0.5

    @property
    def sign_conflict(self) -> float:
        """The mean over the layers of two inputs and more; 0 without any."""
        return sum(self.sign_conflicts.values()) / (len(self.sign_conflicts) or 1)

    def figures(self) -> dict[str, Any]:
        """Everything that is told of it, as JSON has it."""
        return {**asdict(self), "residual": self.residual, "sign_conflict": self.sign_conflict}

    def __str__(self) -> str:
        counted = f"up to {self.sampled_rows} rows of each layer" if self.sampled_rows else "all entries"
        rounded = f", rounding {self.rounding:.1e}" if self.rounding else ""
        lines = [
            f"energy kept      {self.energy_kept:.4%}, residual {self.residual:.2e}{rounded}",
            f"sign conflicts   {self.sign_conflict:.1%} of the entries ({counted})",
        ]
        worst = sorted(self.residuals.items(), key=lambda item: -item[1])[:3]
        if named := [f"{name} {share:.2e}" for name, share in worst if share]:
            lines.append(f"largest residual {', '.join(named)}")
        if self.partial:
            lines.append(f"not in all inputs {len(self.partial)} of {len(self.residuals)} layers")
        if self.left_out:
            lines.append(f"left out         {len(self.left_out)}: {', '.join(self.left_out[:3])}")
        return "\n".join(lines)


@dataclass(frozen=True)
class CombinedState(AdapterState):
    """An adapter made of others, with its report."""

    report: BlendReport = field(default_factory=BlendReport)

    @property
    def residuals(self) -> Mapping[str, float]:
        return self.report.residuals

    @property
    def energy_kept(self) -> float:
        return self.report.energy_kept


@dataclass
class Tally:
    """Counts while a combination goes through its layers."""

    residuals: dict[str, float] = field(default_factory=dict)
    conflicts: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    sampled: bool = False
    lost: float = 0.0
    whole: float = 0.0
    rounded: float = 0.0
    stored: float = 0.0

    def compare(self, name: str, changes: Mapping[int, Change], shares: Mapping[int, float], sample: bool) -> None:
        """Counts sign conflicts of a layer; with `sample`, in some rows where all are products."""
        weights = {place: change.weight for place, change in changes.items() if change.weight is not None}
        if len(weights) < 2:
            return
        sample = sample and all(isinstance(one, Product) for one in weights.values())
        signed = (shares[place] * (one.rows(ROWS) if sample else _dense(one)) for place, one in weights.items())
        self.conflicts[name] = sign_conflict(list(signed))
        self.sampled |= sample

    def cut(self, changes: Mapping[str, tuple[Layer, Change]], cut: Cut) -> dict[str, Change]:
        """What `cut` leaves of the changes of some layers: the very same where that is all."""
        found = cut_down(changes, cut)
        for name, (change, lost, whole) in found.items():
            self.residuals[name] = (lost / whole) ** 0.5 if lost else 0.0
            self.lost, self.whole = self.lost + lost, self.whole + whole
            if isinstance(change.weight, Product):
                self.ranks[name] = change.weight.rank
        return {name: change for name, (change, _, _) in found.items()}

    def entry(self, change: Change, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The layer's tensors for a file, in `dtype` where one is asked for. Raises ConfigError where it overflows."""
        if dtype is None:
            return change.entry()
        stored = change.to(dtype)
        if not all(torch.stack(tensor.aminmax()).isfinite().all() for tensor in stored.entry().values()):
            raise ConfigError(f"it has values beyond {dtype}: keep fp32, or lower the weights")
        exact, rounded = (_sample(one) for one in (change, stored))
        self.rounded += float((exact - rounded).square().sum())
        self.stored += float(exact.square().sum())
        return stored.entry()

    def report(self, partial: Mapping[str, tuple[str, ...]] | None = None, left_out: Sequence[str] = ()) -> BlendReport:
        """The figures of all layers so far."""
        return BlendReport(
            residuals=self.residuals,
            energy_kept=1 - self.lost / (self.whole or 1),
            rounding=(self.rounded / (self.stored or 1)) ** 0.5,
            sign_conflicts=self.conflicts,
            sampled_rows=ROWS if self.sampled else None,
            ranks=self.ranks,
            partial=partial or {},
            left_out=tuple(left_out),
        )


def _dense(weight: Product | Tensor) -> Tensor:
    return weight.dense() if isinstance(weight, Product) else weight.float()


def _sample(change: Change) -> Tensor:
    """Values of the change: some rows of a product, all of a tensor."""
    if isinstance(change.weight, Product):
        return change.weight.rows(ROWS)
    parts = [part for part in (change.weight, change.bias) if part is not None]
    return torch.cat([part.float().flatten() for part in parts])


def sign_conflict(deltas: Sequence[Tensor]) -> float:
    """The share of the places where one of `deltas` is above zero and another below."""
    lowest = highest = deltas[0]
    for delta in deltas[1:]:
        delta = delta.reshape(lowest.shape)
        lowest, highest = torch.minimum(lowest, delta), torch.maximum(highest, delta)
    return int(((lowest < 0) & (highest > 0)).count_nonzero()) / lowest.numel()
