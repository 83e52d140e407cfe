"""Will these adapters fight? How much of an adapter's own effect another one doubles or cancels, before any picture.

With a = w_1 dW_1 and b = w_2 dW_2, the score of a pair is

    min(1, |<a, b>| / min(|a|^2, |b|^2)) = min(1, |cos(a, b)| * max(|a|, |b|) / min(|a|, |b|)):

the share of the weaker one's own effect, <a, a>, that the other adds (a positive cosine) or takes away (a negative
one), where the layers' inputs are alike in all directions. 0 is no interference; at 1, the weaker one is doubled or
lost. Of a block, the products <a, b> of its layers add up; of the whole, their absolute values by block do, for what
one block cancels another one cannot make good.

That adapters change the same directions (`rows` and `columns`, the overlap of subspaces as in section 7.2 of
arXiv:2106.09685) does not make them fight: in the same subspace, two unrelated changes leave each other alone. All
figures come from the factors, never from a full matrix where a method has factors.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from studio.adapters import WeightView
from studio.adapters.layers import wide
from studio.algebra.change import Change, Layer, change_of, gram
from studio.algebra.inputs import Inputs, check_inputs
from studio.algebra.product import Product, one_thread
from studio.algebra.report import ROWS, sign_conflict
from studio.algebra.statistics import ENERGY, block_of, block_order
from studio.algebra.strengths import Strengths
from studio.errors import ConfigError
from studio.formats.state import AdapterState
from studio.seeds import sample_generator

DIRECTIONS = 64
"""Of a change without factors, the overlap looks at so many leading directions."""


@dataclass(frozen=True)
class Encounter:
    """Two adapters in one block, or in all.

    `score` in [0, 1] is the predicted interference (above), `cosine` that of the weighted changes, `ratio` >= 1 the
    larger norm over the smaller (None where one changes nothing). `rows` and `columns` are the overlap of what
    they read and of what they write, the mean squared cosine of the principal angles of the subspaces with 90% of
    their energy, and `sign_conflict` the share of the entries with opposite signs, each the mean over the layers that
    both have, weighted by |a| |b|, and None where there is no such layer.
    """

    block: str
    score: float
    cosine: float
    ratio: float | None
    rows: float | None
    columns: float | None
    sign_conflict: float | None


@dataclass(frozen=True)
class Pair:
    """Two adapters by name: block by block as the model runs, and in all."""

    first: str
    second: str
    blocks: Sequence[Encounter]
    whole: Encounter


@dataclass(frozen=True)
class Analysis:
    """`norms`: |w dW| of each adapter. `suggested`: strengths instead of the weights given; see `suggest`."""

    names: Sequence[str]
    weights: Sequence[float]
    norms: Sequence[float]
    pairs: Sequence[Pair]
    suggested: Sequence[float]


@torch.no_grad()
def analyze(
    states: Sequence[AdapterState],
    weights: Sequence[float],
    *,
    strengths: Sequence[Strengths] | None = None,
    bases: Mapping[str, WeightView] | None = None,
    names: Sequence[str] | None = None,
) -> Analysis:
    """Compares every pair of adapters with these weights; arguments and errors as for `blend`.

    Raises ConfigError for fewer than two adapters too.
    """
    inputs = check_inputs(states, weights, names, strengths)
    if len(states) < 2:
        raise ConfigError("one adapter has nobody to fight with: give two or more")
    tallies: dict[str, _Block] = defaultdict(lambda: _Block(len(states)))
    with one_thread():
        for name in inputs.layers:
            try:
                tallies[block_of(name)].add(name, *_changes(name, inputs, bases))
            except ConfigError as problem:
                raise ConfigError(f"{name}: {problem}") from problem
    blocks = {name: tallies[name] for name in sorted(tallies, key=block_order)}
    total = sum(block.gram for block in blocks.values())
    pairs = [_pair(inputs.names, first, second, blocks, total) for first, second in combinations(range(len(states)), 2)]
    return Analysis(inputs.names, weights, total.diag().sqrt().tolist(), pairs, suggest(weights, total))


def _changes(
    name: str, inputs: Inputs, bases: Mapping[str, WeightView] | None
) -> tuple[dict[int, Change], dict[int, float]]:
    """What each adapter does to a layer, and the weight it does it with."""
    layer = Layer.of(name, None if bases is None else bases.get(name), inputs.entries(name).values())
    changes = {place: change_of(entry, layer) for place, entry in inputs.entries(name).items()}
    return changes, {place: inputs.weights[place] * inputs.factors[place].get(name, 1.0) for place in changes}


def suggest(weights: Sequence[float], total: Tensor) -> list[float]:
    """Strengths from the inner products `total` of the weighted changes, (n, n).

    Norm-balanced: whoever is above the geometric mean of the norms comes down to it, nobody goes up. Then all shrink
    by the one factor that brings the norm of the sum down to that of orthogonal changes of these norms: what adapters
    agree on is not applied twice.
    """
    norms = total.diag().sqrt()
    acting = norms[norms > 0]
    if not len(acting):
        return list(weights)
    balanced = (acting.log().mean().exp() / norms.clamp(min=1e-30)).clamp(max=1)
    apart = balanced.square() @ total.diag()
    together = balanced @ total @ balanced
    shrunk = balanced * (apart / together).sqrt().clamp(max=1) if together > 0 else balanced
    return [weight * float(factor) for weight, factor in zip(weights, shrunk, strict=True)]


# -- pairs -----------------------------------------------------------------------------------


class _Block:
    """Sums over the layers of a block: inner products, and figures of pairs with their weights |a| |b|."""

    def __init__(self, inputs: int) -> None:
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.figures: dict[tuple[int, int], list[tuple[float, tuple[float, float, float]]]] = defaultdict(list)

    def add(self, name: str, changes: Mapping[int, Change], weights: Mapping[int, float]) -> None:
        """Counts one layer."""
        shares = torch.tensor([weights.get(place, 0.0) for place in range(len(self.gram))], dtype=torch.float64)
        products = gram(changes, len(self.gram)) * shares * shares[:, None]
        self.gram += products
        acting = {place: one for place, one in changes.items() if shares[place] and _is_matrix(one)}
        spaces = {place: _spaces(one, name) for place, one in acting.items()}
        for pair in combinations(acting, 2):
            importance = float((products[pair[0], pair[0]] * products[pair[1], pair[1]]).sqrt())
            rows, columns = (_overlap(*(spaces[place][side] for place in pair)) for side in (0, 1))
            conflict = _conflict(*((acting[place], weights[place]) for place in pair))
            self.figures[pair].append((importance, (rows, columns, conflict)))


def _pair(names: Sequence[str], first: int, second: int, blocks: Mapping[str, _Block], total: Tensor) -> Pair:
    pair = first, second
    found = [
        _encounter(block, one.gram, pair, one.figures[pair], one.gram[pair].abs()) for block, one in blocks.items()
    ]
    every = [figure for one in blocks.values() for figure in one.figures[pair]]
    absolute = sum(one.gram[pair].abs() for one in blocks.values())
    return Pair(names[first], names[second], found, _encounter("all", total, pair, every, absolute))


def _encounter(
    block: str,
    products: Tensor,
    pair: tuple[int, int],
    figures: Sequence[tuple[float, tuple[float, float, float]]],
    shared: Tensor,
) -> Encounter:
    """From inner products, figures, and the |<a, b>| that counts for the score."""
    norms = [math.sqrt(max(float(products[place, place]), 0)) for place in pair]
    small, large = sorted(norms)
    score = min(1.0, float(shared) / small**2) if small else 0.0
    cosine = float(products[pair]) / (small * large) if small else 0.0
    weight = sum(importance for importance, _ in figures)
    means = [
        sum(importance * figure[place] for importance, figure in figures) / weight if weight else None
        for place in range(3)
    ]
    ratio = large / small if small else None
    return Encounter(block, score, max(-1.0, min(1.0, cosine)), ratio, *means)


# -- one layer -------------------------------------------------------------------------------


def _is_matrix(change: Change) -> bool:
    return isinstance(change.weight, Product) or (change.weight is not None and change.weight.ndim > 1)


def _spaces(change: Change, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Orthonormal bases (n, k) of what dW reads, and (out, k) of what it writes, for each group or expert.

    They hold `ENERGY` of the squared norm. From QR of the factors; of a matrix without, from its product with
    `DIRECTIONS` random vectors (arXiv:0909.4061).
    """
    weight = change.weight
    if isinstance(weight, Product):
        up, down = wide(weight.up), wide(weight.down).mT  # (groups, out, r), (groups, n, r)
    else:
        assert weight is not None
        matrix = wide(weight).flatten(1)
        test = torch.randn(matrix.shape[1], DIRECTIONS, generator=sample_generator("directions", name))
        up = torch.linalg.qr(matrix @ (matrix.T @ (matrix @ test))).Q[None]  # one power iteration
        down = (matrix.T @ up[0])[None]
    written, up_core = torch.linalg.qr(up)
    read, down_core = torch.linalg.qr(down)
    left, values, right = torch.linalg.svd(up_core @ down_core.mT)
    rows, columns = [], []
    for group, own in enumerate(values):
        squares = own.square().cumsum(0)
        kept = int((squares < ENERGY * squares[-1]).sum()) + 1
        columns.append(written[group] @ left[group, :, :kept])
        rows.append(read[group] @ right[group, :kept].mT)
    return rows, columns


def _overlap(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The mean squared cosine of the principal angles between the spaces, over groups."""
    shared = [
        float((one.T @ other).square().sum()) / min(one.shape[1], other.shape[1])
        for one, other in zip(first, second, strict=True)
    ]
    return sum(shared) / len(shared)


def _conflict(*parts: tuple[Change, float]) -> float:
    """The share of entries with opposite signs; of products, in some rows."""
    products = [change.weight for change, _ in parts if isinstance(change.weight, Product)]
    deltas = [one.rows(ROWS) for one in products] if len(products) == 2 else [one.dense() for one, _ in parts]
    signed = [weight * wide(delta) for delta, (_, weight) in zip(deltas, parts, strict=True) if delta is not None]
    return sign_conflict(signed)
