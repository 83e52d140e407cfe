"""How LoRA's factors start: random, or from the base's own weight W (out, in * kernel).

| init | up (out, rank) | down (rank, in * kernel) | |
|---|---|---|---|
| kaiming | 0 | U(-b, b), b = 1 / sqrt(in * kernel) | arXiv:2106.09685's code, peft's default |
| gaussian | 0 | N(0, 1 / rank), 1 / rank being the deviation | peft |
| orthogonal | P Q_even / 10 | (R Q_odd)^T / 10 | up @ down = 0 while neither is 0; peft, after datta0 |
| pissa | U sqrt(S / scale) | sqrt(S / scale) V^T | the largest singular triplets of W, arXiv:2404.02948 |
| olora | Q | R | the first rank columns and rows of W = Q R, arXiv:2406.01775 |

"pissa_niter_4" is PiSSA by a randomised SVD of 4 iterations, as in peft. On Embedding, W is the transposed
table, and the random roles are exchanged. PiSSA and OLoRA take scale * up @ down out of the base in the
papers; here the base stays as it is, and the starting product is subtracted (`anchored`): the same function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from studio.adapters.base import AdapterConfig
from studio.adapters.layers import LayerSpec, WeightView, wide
from studio.adapters.lowrank import down_shape, up_shape
from studio.errors import ConfigError, nearest

Factors = tuple[Tensor, Tensor]  # up, down


@dataclass(frozen=True)
class Init:
    """`compute(spec, config, generator, weight)` gives (up, down).

    `anchored`: dW is not zero there, so the starting point is subtracted. `grouped`: defined for grouped
    convolutions and experts too.
    """

    compute: Callable[[LayerSpec, AdapterConfig, torch.Generator, WeightView], Factors]
    anchored: bool = False
    grouped: bool = False


def initial_factors(
    init: str, spec: LayerSpec, config: AdapterConfig, generator: torch.Generator, weight: WeightView
) -> Factors:
    """(up, down) in fp32, of `up_shape` and `down_shape`."""
    up, down = find_init(init).compute(spec, config, generator, weight)
    return up.reshape(up_shape(spec, config.rank)).float(), down.reshape(down_shape(spec, config.rank)).float()


def find_init(name: str) -> Init:
    """The initialisation of this name. Raises ConfigError for an unknown one, or one that needs more than W."""
    if name in INITS:
        return INITS[name]
    fast = re.fullmatch(r"pissa_niter_(\d+)", name)
    if fast:
        return Init(partial(_pissa, iterations=int(fast[1])), anchored=True)
    if name in LATER:
        raise ConfigError(f"init '{name}' needs more than the base's weight: leave init out, and call {LATER[name]}")
    raise ConfigError(f"unknown init '{name}'.{nearest(name, INITS)} Inits: {', '.join(INITS)}, pissa_niter_4")


def check_init(name: str, spec: LayerSpec, rank: int) -> Init:
    """`find_init`, if it is defined for the layer at this rank; else ConfigError."""
    init = find_init(name)
    if (spec.groups > 1 or spec.kind == "experts") and not init.grouped:
        what = "experts" if spec.kind == "experts" else "a grouped convolution"
        raise ConfigError(f"init '{name}' is not defined for {what}: use kaiming there")
    if name == "orthogonal" and rank % 2:
        raise ConfigError(f"rank is {rank}; init 'orthogonal' splits an orthogonal matrix in two and needs an even one")
    most = min(spec.out_features, math.prod(down_shape(spec, 1)))
    if init.anchored and rank > most:
        raise ConfigError(f"rank is {rank}; a weight {spec.weight_shape} has only {most} directions for '{name}'")
    return init


# -- independent of the base ------------------------------------------------------------------


def _kaiming(spec: LayerSpec, config: AdapterConfig, generator: torch.Generator, weight: WeightView) -> Factors:
    draw = partial(nn.init.kaiming_uniform_, a=math.sqrt(5), generator=generator)
    return _zero_product(spec, config, generator, draw)


def _gaussian(spec: LayerSpec, config: AdapterConfig, generator: torch.Generator, weight: WeightView) -> Factors:
    return _zero_product(spec, config, generator, lambda down: down.normal_(std=1 / config.rank, generator=generator))


def _zero_product(
    spec: LayerSpec, config: AdapterConfig, generator: torch.Generator, draw: Callable[[Tensor], Tensor]
) -> Factors:
    """A drawn down and zero up; for Embedding a normal up and zero down, as in peft."""
    up, down = torch.zeros(up_shape(spec, config.rank)), torch.zeros(down_shape(spec, config.rank))
    if spec.kind == "embedding":
        return up.normal_(generator=generator), down
    draw(down.flatten(0, 1) if spec.kind == "experts" else down)  # in place; for an expert as for a layer
    return up, down


def _orthogonal(spec: LayerSpec, config: AdapterConfig, generator: torch.Generator, weight: WeightView) -> Factors:
    """Combinations of the odd and of the even rows of one orthogonal matrix: their product vanishes."""
    rank = config.rank
    rows = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    columns = math.prod(down_shape(spec, 1))
    down = torch.randn(columns, rank // 2, generator=generator) @ rows[0::2]  # (in * kernel, rank)
    up = torch.randn(rank // 2, spec.out_features, generator=generator).T @ rows[1::2]  # (out, rank)
    return up / 10, down.T / 10


# -- from the base's weight -------------------------------------------------------------------


def _matrix(spec: LayerSpec, weight: WeightView) -> Tensor:
    """W as (out, in * kernel)."""
    dense = wide(weight.dense())
    return dense.T if spec.kind == "embedding" else dense.flatten(1)


def _pissa(
    spec: LayerSpec,
    config: AdapterConfig,
    generator: torch.Generator,
    weight: WeightView,
    iterations: int | None = None,
) -> Factors:
    """The principal part of W, its singular values shared evenly; an exact SVD without `iterations`."""
    matrix, rank = _matrix(spec, weight), config.rank
    if iterations is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        left, values, right = svd_lowrank(matrix, rank, iterations, generator)
    root = (values[:rank] / config.scale).sqrt()  # (rank,)
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _olora(spec: LayerSpec, config: AdapterConfig, generator: torch.Generator, weight: WeightView) -> Factors:
    q, r = torch.linalg.qr(_matrix(spec, weight))
    return q[:, : config.rank], r[: config.rank]


def svd_lowrank(
    matrix: Tensor, rank: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(U (m, rank), S (rank,), V^T (rank, n)), near the largest singular triplets of `matrix` (m, n).

    Halko, Martinsson and Tropp, algorithm 5.1 (arXiv:0909.4061): `torch.svd_lowrank`, which draws from
    the global stream. A few `iterations` of subspace iteration are enough.
    """
    is_wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if is_wide else matrix
    basis = torch.randn(tall.shape[1], rank, generator=generator).to(tall)
    space = torch.linalg.qr(tall @ basis).Q  # (m, rank)
    for _ in range(iterations):
        space = torch.linalg.qr(tall @ torch.linalg.qr(tall.T @ space).Q).Q
    left, values, right = torch.linalg.svd(space.T @ tall, full_matrices=False)
    left = space @ left
    return (right.T, values, left.T) if is_wide else (left, values, right)


INITS: dict[str, Init] = {
    "kaiming": Init(_kaiming, grouped=True),
    "gaussian": Init(_gaussian, grouped=True),
    "orthogonal": Init(_orthogonal),
    "pissa": Init(_pissa, anchored=True),
    "olora": Init(_olora, anchored=True),
}

LATER = {"eva": "initialise_from_activations", "loftq": "initialise_from_originals"}
"""peft's names of what starts after injection -> the function to call."""
