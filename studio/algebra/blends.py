"""The ways to blend: what each makes of the dW of several adapters, layer by layer.

A method is a small function below. Those with coefficients (linear, slerp) weigh whole dW, so that low-rank
inputs stay low-rank; the others work entry by entry. Keyword-only arguments are its settings. In the
formulas, d_i is the dW of input i and w_i its weight, negative to subtract; a bias or a norm goes the
same way as a weight. Entry by entry, inputs without the layer take no part; with coefficients they are zero.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from studio.errors import ConfigError, nearest

Deltas = Sequence[Tensor]
Weights = Sequence[float]
Gram = Callable[[], Tensor]
"""Computes the inner products of the inputs' dW, (inputs, inputs)."""
Draw = Callable[[int], torch.Generator]
"""The generator for the mask of input i, a function of seed, layer and i."""


@dataclass(frozen=True)
class Blend:
    """One way to blend: its function, `settings` (name -> default), and where it comes from.

    With `coefficients`, the function is (weights, gram, **settings) -> the coefficient of each input;
    otherwise (deltas, weights, draw, **settings) -> the blended tensor.
    """

    name: str
    function: Callable[..., Any]
    settings: Mapping[str, Any]
    paper: str
    coefficients: bool

    @property
    def formula(self) -> str:
        """What it computes, in words and signs."""
        return inspect.getdoc(self.function) or ""

    def with_settings(self, given: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
        """All settings. Raises ConfigError for one that the method does not have, and for values out of range."""
        for name in given:
            if name not in self.settings:
                known = f"It has {', '.join(self.settings)}." if self.settings else "It has none."
                raise ConfigError(f"'{self.name}' has no setting '{name}'.{nearest(name, self.settings)} {known}")
        settings = {**self.settings, **given}
        if self.coefficients:  # the functions check their settings: a try on zeros is enough
            self.function(weights, lambda: torch.zeros(len(weights), len(weights)), **settings)
        else:
            zeros = [torch.zeros(1, 1) for _ in weights]
            self.function(zeros, weights, lambda index: torch.Generator(), **settings)
        return settings


BLENDS: dict[str, Blend] = {}


def find_blend(name: str) -> Blend:
    """The method of this name, or ConfigError with near misses."""
    if name not in BLENDS:
        raise ConfigError(f"unknown blend '{name}'.{nearest(name, BLENDS)} Blends: {', '.join(BLENDS)}")
    return BLENDS[name]


def _register(paper: str, coefficients: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.replace("_", "-")
        parameters = inspect.signature(function).parameters.values()
        settings = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
        BLENDS[name] = Blend(name, function, settings, paper, coefficients)
        return function

    return register


# -- with coefficients -----------------------------------------------------------------------


@_register(paper="arXiv:2212.04089", coefficients=True)
def linear(weights: Weights, gram: Gram, *, normalise: bool = False) -> list[float]:
    """sum_i w_i d_i: task arithmetic. A negative weight subtracts.

    With `normalise`, w_i / sum_j w_j: an interpolation.
    """
    if not normalise:
        return list(weights)
    if not sum(weights):
        raise ConfigError("the weights add up to 0, so they cannot be normalised")
    return [weight / sum(weights) for weight in weights]


@_register(paper="Shoemake 1985", coefficients=True)
def slerp(weights: Weights, gram: Gram) -> list[float]:
    """(sin((1 - t) a) d_1 + sin(t a) d_2) / sin(a), with t = w_2 / (w_1 + w_2) and a the angle between d_1 and d_2.

    The angle is that of whole layers; where it is 0 or 180 degrees, or one is zero, (1 - t) d_1 + t d_2.
    """
    if len(weights) != 2:
        raise ConfigError(f"slerp is between two adapters; {len(weights)} were given")
    if min(weights) < 0 or not sum(weights):
        raise ConfigError(f"slerp goes from one adapter to another: its weights are 0 or more, not {list(weights)}")
    t = weights[1] / sum(weights)
    (first, between), (_, second) = gram().tolist()
    cosine = between / math.sqrt(first * second) if first * second > 0 else 1.0
    if 1 - abs(cosine) < 1e-7:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


# -- entry by entry --------------------------------------------------------------------------


@_register(paper="arXiv:1506.02626")
def magnitude_prune(deltas: Deltas, weights: Weights, draw: Draw, *, density: float = 0.5) -> Tensor:
    """sum_i w_i trim(d_i): of each d_i the share `density` of largest magnitude."""
    return _sum(w * _largest(d, density) for d, w in zip(deltas, weights, strict=True))


@_register(paper="arXiv:2306.01708")
def ties(deltas: Deltas, weights: Weights, draw: Draw, *, density: float = 0.5, scale: float = 1.0) -> Tensor:
    """scale * mean of the w_i trim(d_i) whose sign is that of sum_i w_i trim(d_i): trim, elect sign, disjoint mean.

    trim keeps the share `density` of largest magnitude (the paper: 0.2); zeros are not counted in the mean;
    `scale` is the paper's lambda.
    """
    return scale * _elected([w * _largest(d, density) for d, w in zip(deltas, weights, strict=True)])


@_register(paper="arXiv:2311.03099")
def dare(deltas: Deltas, weights: Weights, draw: Draw, *, density: float = 0.5) -> Tensor:
    """sum_i w_i m_i d_i / density, with m_i = 1 with the probability `density` and 0 otherwise: drop and rescale.

    The paper's drop rate is 1 - density.
    """
    return _sum(w * _random(d, density, draw(i)) for i, (d, w) in enumerate(zip(deltas, weights, strict=True)))


@_register(paper="arXiv:2311.03099")
def dare_ties(deltas: Deltas, weights: Weights, draw: Draw, *, density: float = 0.5, scale: float = 1.0) -> Tensor:
    """As ties, with DARE's drop and rescale instead of trim."""
    pairs = enumerate(zip(deltas, weights, strict=True))
    return scale * _elected([w * _random(d, density, draw(i)) for i, (d, w) in pairs])


@_register(paper="arXiv:2406.11617")
def della(
    deltas: Deltas, weights: Weights, draw: Draw, *, density: float = 0.5, epsilon: float = 0.2, scale: float = 1.0
) -> Tensor:
    """As ties, with MAGPRUNE instead of trim: m d / p with m = 1 with the probability p, larger for larger magnitudes.

    In each row (one output), p rises with the magnitude's rank from density - epsilon / 2 to density + epsilon / 2.
    """
    pairs = enumerate(zip(deltas, weights, strict=True))
    return scale * _elected([w * _by_rank(d, density, epsilon, draw(i)) for i, (d, w) in pairs])


@_register(paper="arXiv:2312.06795")
def breadcrumbs(deltas: Deltas, weights: Weights, draw: Draw, *, density: float = 0.5, gamma: float = 0.01) -> Tensor:
    """sum_i w_i m_i d_i, where m_i leaves out the share `gamma` of largest magnitude, and keeps the next `density`.

    In the paper, gamma is 1 minus this one, and beta is 1 - density - gamma.
    """
    return _sum(w * _without_outliers(d, density, gamma) for d, w in zip(deltas, weights, strict=True))


# -- masks -----------------------------------------------------------------------------------


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Their sum, in the first one's memory."""
    first, *rest = terms
    for term in rest:
        first += term
    return first


def _elected(terms: Deltas) -> Tensor:
    """The mean of those `terms` that have, at each place, the sign of the sum."""
    positive = _sum([terms[0].clone(), *terms[1:]]) >= 0
    total, count = torch.zeros_like(terms[0]), torch.zeros_like(terms[0])
    for term in terms:
        agrees = torch.where(positive, term > 0, term < 0)
        total += term * agrees
        count += agrees
    return total / count.clamp(min=1)


def _check(density: float) -> None:
    if not 0 < density <= 1:
        raise ConfigError(f"density is {density}; it must be above 0, and 1 at most")


def _largest(delta: Tensor, density: float) -> Tensor:
    _check(density)
    return delta * (delta.abs() >= _magnitude(delta, int(density * delta.numel())))


def _magnitude(delta: Tensor, place: int) -> Tensor:
    """The `place`-th largest magnitude, from 1."""
    return delta.abs().flatten().kthvalue(delta.numel() - max(place, 1) + 1).values


def _random(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    _check(density)
    return delta * (torch.rand(delta.shape, generator=generator) < density) / density


def _by_rank(delta: Tensor, density: float, epsilon: float, generator: torch.Generator) -> Tensor:
    if epsilon < 0 or density - epsilon / 2 <= 0 or density + epsilon / 2 > 1:
        raise ConfigError(f"density {density} and epsilon {epsilon}: density +- epsilon / 2 must lie in (0, 1]")
    rows = delta.reshape(len(delta) if delta.ndim > 1 else 1, -1)  # (out, n)
    ranks = rows.abs().argsort(1).argsort(1)
    keep = density - epsilon / 2 + epsilon * (ranks + 0.5) / rows.shape[1]
    return (rows * (torch.rand(rows.shape, generator=generator) < keep) / keep).reshape(delta.shape)


def _without_outliers(delta: Tensor, density: float, gamma: float) -> Tensor:
    _check(density)
    if gamma < 0 or gamma + density > 1:
        raise ConfigError(f"density {density} and gamma {gamma}: gamma is 0 or more, and their sum 1 at most")
    outliers = int(gamma * delta.numel())
    kept = delta.abs() >= _magnitude(delta, outliers + int(density * delta.numel()))
    return delta * (kept & (delta.abs() < _magnitude(delta, outliers)) if outliers else kept)
