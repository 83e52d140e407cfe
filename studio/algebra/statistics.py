"""How much an adapter changes, and where: norms, singular values and shares of energy, by layer and by block.

All of it comes from the factors: of dW = U D, with the triangles of U = Qu Ru and D^T = Qd Rd, the singular
values are those of the rank-sized Ru Rd^T, and their squares add up to ||dW||_F^2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from studio.adapters import WeightView
from studio.adapters.base import method_of
from studio.adapters.layers import wide
from studio.adapters.targets import Roles
from studio.algebra.change import Entry, Layer, change_of
from studio.algebra.product import Product
from studio.errors import ConfigError
from studio.formats.reading import rank_of
from studio.formats.state import AdapterState

ENERGY = 0.9
"""The share of a layer's squared norm that `directions` counts singular values for."""
_SMALL = 256  # the smaller side up to which a change without factors gets an SVD


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's change at strength 1.

    `norm` is ||dW||_F, None where only the base's weights tell. `rank` is the inner width of its factors, where
    the method has any; `directions` the number of singular values that hold `ENERGY` of the squared norm, and
    `effective_rank` the exponential of the entropy of all (Roy and Vetterli 2007), where they are cheap to have.
    """

    name: str
    block: str
    role: str
    method: str
    rank: int | None
    norm: float | None
    directions: int | None
    effective_rank: float | None


@dataclass(frozen=True)
class BlockStatistics:
    """A block of the model. `norm` is that of all its layers together, `energy` its share of the squared norm of
    the whole adapter, in [0, 1]; both None where a layer's norm is unknown. `ranks` are all that occur, and
    `directions` the mean over the layers that have them."""

    block: str
    layers: int
    ranks: tuple[int, ...]
    directions: float | None
    norm: float | None
    energy: float | None


class ShapeView(WeightView):
    """A layer of which only the shape is known, as in a model on the meta device."""

    def dense(self) -> Tensor:
        raise ConfigError(f"{self.target.name}: only the shape of its weight is known")


@torch.no_grad()
def layer_statistics(
    state: AdapterState, roles: Roles, bases: Mapping[str, WeightView] | None = None
) -> list[LayerStatistics]:
    """One for each layer, block by block as the model runs. `bases` (layer -> weight of the base) is needed for
    methods whose change is not in the file alone, for some of them only its shape."""
    role = roles_of(state.tensors, roles)
    found = []
    for name, entry in state.tensors.items():
        method = method_of(frozenset(entry))
        assert method is not None, f"{name}: no format reads entries of no method"
        norm, values = _spectrum(name, entry, None if bases is None else bases.get(name))
        spread = None if values is None else _spread(values)
        directions, effective = spread or (None, None)
        block, kind, rank = block_of(name), method.named(entry), rank_of(entry)
        found.append(LayerStatistics(name, block, role[name], kind, rank, norm, directions, effective))
    return sorted(found, key=lambda layer: block_order(layer.block))


def block_statistics(layers: Sequence[LayerStatistics]) -> list[BlockStatistics]:
    """The same by block, in the same order."""
    whole = _total(layer.norm for layer in layers)
    blocks: dict[str, list[LayerStatistics]] = {}
    for layer in layers:
        blocks.setdefault(layer.block, []).append(layer)
    found = []
    for block, own in blocks.items():
        norm = _total(layer.norm for layer in own)
        energy = None if norm is None or whole is None else (norm / whole) ** 2 if whole else 0.0
        counts = [layer.directions for layer in own if layer.directions is not None]
        mean = sum(counts) / len(counts) if counts else None
        ranks = tuple(sorted({layer.rank for layer in own if layer.rank is not None}))
        found.append(BlockStatistics(block, len(own), ranks, mean, norm, energy))
    return found


def _total(norms: Iterable[float | None]) -> float | None:
    """The norm of several changes side by side; None where one is unknown."""
    squares = 0.0
    for norm in norms:
        if norm is None:
            return None
        squares += norm**2
    return math.sqrt(squares)


def _spectrum(name: str, entry: Entry, base: WeightView | None) -> tuple[float | None, Tensor | None]:
    """(||dW||_F, its singular values); None for what is unknown, or costs an SVD of the whole matrix."""
    try:
        weight = change_of(entry, Layer.of(name, base, [entry])).weight
    except ConfigError:  # known with the base only
        return None, None
    if weight is None:
        return 0.0, None  # the bias alone changes
    if isinstance(weight, Product):
        values = singular_values(weight)
        return float(values.norm()), values
    matrix = wide(weight).flatten(1) if weight.ndim > 1 else wide(weight)
    values = torch.linalg.svdvals(matrix) if matrix.ndim > 1 and min(matrix.shape) <= _SMALL else None
    return float(matrix.norm()), values


def singular_values(product: Product) -> Tensor:
    """Those of dW, of all groups or experts one after the other."""
    _, up = torch.linalg.qr(wide(product.up), mode="r")
    _, down = torch.linalg.qr(wide(product.down).mT, mode="r")
    return abs(product.scale) * torch.linalg.svdvals(up @ down.mT).flatten()


def _spread(values: Tensor) -> tuple[int, float]:
    """(how many of the largest hold `ENERGY`, the effective rank); zeros for a change that is zero."""
    ordered = values.double().sort(descending=True).values
    squares = ordered.square().cumsum(0)
    if not len(ordered) or not squares[-1] > 0:
        return 0, 0.0
    directions = int((squares < ENERGY * squares[-1]).sum()) + 1
    shares = ordered / ordered.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return directions, float(entropy.exp())


# -- where a layer is ------------------------------------------------------------------------

_BLOCK = re.compile(r"(?P<component>\w+)\.(?:.*?\.)??(?P<stage>\w*(?:blocks|layers|block))\.(?P<number>\d+)\..+")
_STAGES = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks")


def block_of(name: str) -> str:
    """ "unet.up_blocks.1", "unet.mid_block", "text_encoder.layers.3"; "unet" for a layer outside of all blocks."""
    component, _, path = name.partition(".")
    if path.startswith("mid_block."):
        return f"{component}.mid_block"
    match = _BLOCK.fullmatch(name)
    return f"{match['component']}.{match['stage']}.{match['number']}" if match else component


def block_order(block: str) -> tuple[str, int, int]:
    """Where a block stands: text encoders first, then the denoiser from input to output."""
    component, _, rest = block.partition(".")
    stage, _, number = rest.partition(".")
    return component, _STAGES.index(stage) if stage in _STAGES else -1, int(number or 0)


def roles_of(names: Iterable[str], roles: Roles) -> dict[str, str]:
    """Layer -> its role in the family ("cross-attention" rather than "attention", which has more), or "other"."""
    names = list(names)
    held = {
        role: {name for name in names if any(re.fullmatch(expression, name) for expression in expressions)}
        for role, expressions in roles.items()
    }
    found = {}
    for name in names:
        own = [role for role in held if name in held[role]]
        narrow = [role for role in own if not any(held[role] > held[other] for other in own)]
        found[name] = narrow[0] if narrow else "other"
    return found
