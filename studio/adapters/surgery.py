"""Rank surgery: other ranks for LoRA and DoRA in the middle of training, with the optimizer's state.

Another basis of the bottleneck, down' = T down and up' = up T^-1, keeps up @ down. With G the gradient of the
product, the factors' own are up^T G and G down^T, so they and everything linear in them (momentum, Adam's
exp_avg) become T^-T g_down and g_up T^T, exactly. Squares (exp_avg_sq) are carried over with the elementwise
square of the same matrix: exact where T is diagonal or a permutation, and otherwise as if the gradients of
different ranks were uncorrelated.

With the triangular factors of QR, up = Q_1 R_1 and down^T = Q_2 R_2, and the SVD R_1 R_2^T = U S V^T (rank by
rank, never a full matrix), T = S^-1/2 U^T R_1 and T^-1 = R_2^T V S^-1/2 give up' = Q_1 U sqrt(S) and
down' = sqrt(S) V^T Q_2^T; their first rows and columns are the best approximation of a lower rank.

`config` keeps the rank and alpha that an adapter started with, and so the scale; a file gets the alpha of its
own rank. A training state of any rank loads into an adapter of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from studio.adapters.adapter_set import AdapterSet
from studio.adapters.inits.initial import initial_factors
from studio.adapters.layers import Target, WeightView
from studio.adapters.lowrank import laid_out
from studio.adapters.methods.dora import DoRA
from studio.adapters.methods.lora import LoRA
from studio.adapters.optimizer_state import (
    FIRST_MOMENTS,
    SECOND_MOMENTS,
    check_replaceable,
    replace_parameter,
    state_of,
)
from studio.errors import ConfigError
from studio.seeds import sample_generator


@dataclass(frozen=True)
class ShrinkReport:
    """What shrinking kept: layer -> its rank now, and layer -> sum of kept s^2 / sum of all s^2 of up @ down."""

    ranks: Mapping[str, int]
    energy: Mapping[str, float]

    def __str__(self) -> str:
        worst = sorted(self.energy.items(), key=lambda item: item[1])[:3]
        named = ", ".join(f"{name} {share:.2%}" for name, share in worst)
        mean = sum(self.energy.values()) / len(self.energy)
        return f"rank {sum(self.ranks.values())} in {len(self.ranks)} layers keeps {mean:.2%} of the energy ({named})"


@torch.no_grad()
def grow(adapters: AdapterSet, rank: int, optimizer: Optimizer | None = None, seed: int = 0) -> None:
    """Raises the rank to `rank` where it is lower; the function stays as it is.

    New rows of `lora_down` are Kaiming-uniform, a function of (seed, layer, rank), and new columns of `lora_up`
    zero; on Embedding the other way round. Raises ConfigError for a set with other methods than LoRA and DoRA,
    a rank that does not divide into a convolution's groups, or an optimizer whose state cannot follow.
    """
    for name, adapter in changeable(adapters, optimizer, rank).items():
        if rank > rank_of(adapter):
            _change(adapter, adapters.targets[name], _identity(adapter, rank), optimizer, seed)


@torch.no_grad()
def shrink(
    adapters: AdapterSet,
    rank: int | None = None,
    *,
    energy: float | None = None,
    optimizer: Optimizer | None = None,
    seed: int = 0,
) -> ShrinkReport:
    """Lowers the rank to `rank` where it is higher, or to the smallest that keeps a share `energy` in (0, 1].

    What is kept is the best approximation of up @ down of that rank, balanced. Raises ConfigError as `grow`
    does, for an energy out of range, and for factors that cannot be exchanged: an anchored initialisation
    (PiSSA, OLoRA), whose starting point would remain, and LoRA-FA's frozen `lora_down`.
    """
    if (rank is None) == (energy is None):
        raise TypeError("shrink takes either a rank or an energy")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy is {energy}; it must be above 0, and 1 at most")
    ranks, kept = {}, {}
    for name, adapter in changeable(adapters, optimizer, rank, exchanged=True, truncated=True).items():
        shares = _shares(adapter)
        groups = adapter.spec.groups
        enough = rank if rank is not None else groups * (int((shares < energy).sum()) + 1)
        ranks[name] = min(enough, rank_of(adapter))
        kept[name] = float(shares[ranks[name] // groups - 1])
        if ranks[name] < rank_of(adapter):
            _change(adapter, adapters.targets[name], _singular(adapter, ranks[name]), optimizer, seed)
    return ShrinkReport(ranks, kept)


@torch.no_grad()
def rebalance(adapters: AdapterSet, optimizer: Optimizer | None = None, seed: int = 0) -> None:
    """Makes up = U sqrt(S) and down = sqrt(S) V^T of their own SVD; the function stays as it is.

    Ranks that add nothing (after `grow`, say) start again as new ones, or both their factors would be zero,
    and stay so; an adapter whose product is zero is left alone. Raises ConfigError as `grow` does, and for
    LoRA-FA's frozen `lora_down`.
    """
    for name, adapter in changeable(adapters, optimizer, exchanged=True).items():
        basis = _singular(adapter, rank_of(adapter))
        if not basis.empty.all():
            _change(adapter, adapters.targets[name], basis, optimizer, seed)


def rank_of(adapter: LoRA) -> int:
    """The rank of the factors now; `config.rank` is the one at the start."""
    return adapter.lora_down.shape[0]


# -- what is allowed ------------------------------------------------------------------------------


def changeable(
    adapters: AdapterSet,
    optimizer: Optimizer | None,
    rank: int | None = None,
    exchanged: bool = False,
    truncated: bool = False,
) -> dict[str, LoRA]:
    """Layer -> adapter, if the rank of all of them can become `rank`, or else ConfigError.

    `exchanged`: both factors become others; `truncated`: less is left of them.
    """
    if adapters.gate.merged:
        raise RuntimeError("unmerge the adapters first: the base holds factors of the present rank")
    members: dict[str, LoRA] = {}
    for name, adapter in adapters.items():
        if not isinstance(adapter, LoRA) or type(adapter) not in (LoRA, DoRA):
            raise ConfigError(f"{name}: the rank of '{adapter.method}' is fixed; rank surgery is for lora and dora")
        if adapter.spec.kind == "experts":
            raise ConfigError(f"{name}: rank surgery is not defined for experts; leave them out of the adapter")
        if rank is not None and (rank < 1 or rank % adapter.spec.groups):
            raise ConfigError(f"{name}: the rank cannot become {rank}; choose a multiple of {adapter.spec.groups}")
        if exchanged and adapter.options.freeze_down:
            raise ConfigError(f"{name}: lora_down is frozen (freeze_down), and an SVD would exchange it")
        if truncated and adapter.anchor_down is not None:
            raise ConfigError(
                f"{name}: what init '{adapter.options.init}' started from is subtracted at its full rank; "
                "export the adapter, and reduce the file's rank"
            )
        for parameter in (adapter.lora_down, adapter.lora_up):
            check_replaceable(parameter, optimizer)
            _check_moments(parameter, optimizer)
        members[name] = adapter
    return members


def _check_moments(parameter: Tensor, optimizer: Optimizer | None) -> None:
    for key, value in state_of(parameter, optimizer).items():
        own = isinstance(value, Tensor) and value.shape == parameter.shape
        if own and key not in FIRST_MOMENTS | SECOND_MOMENTS:
            raise ConfigError(
                f"{type(optimizer).__name__} keeps '{key}', which is neither a first nor a second moment of the "
                "gradient: the rank cannot change under it. Use adamw or sgd"
            )


# -- bases ----------------------------------------------------------------------------------------

_ROUNDING = 1e-7
"""Singular values below this share of |up| |down| are what fp32 factors leave of a zero."""


@dataclass(frozen=True)
class _Basis:
    """T and its inverse on what is kept, for each group of a convolution; `empty` marks the ranks that start anew."""

    there: Tensor  # T, (groups, new, old)
    back: Tensor  # (groups, old, new)
    empty: Tensor  # (groups, new), bool


def _by_rank(factor: Tensor, groups: int, up: bool) -> Tensor:
    """A factor, or a moment of it, as (groups, rank / groups, the rest), in float64 on the CPU: whatever the device
    computes with (TF32), a rank that is kept stays bit for bit."""
    rows = factor.detach().cpu().double().reshape(groups, factor.shape[0] // groups, -1)
    return rows.mT if up else rows


def _as_factor(ranked: Tensor, like: Tensor, up: bool) -> Tensor:
    """Undoes `_by_rank` for any rank: (rank, in / groups, *kernel), or (out, rank / groups, 1, ...) for `up`.

    Laid out as `like` is, and a loaded one too.
    """
    shape = (like.shape[0], ranked.shape[1], *like.shape[2:]) if up else (-1, *like.shape[1:])
    factor = (ranked.mT if up else ranked).reshape(shape).to(like)
    return laid_out(factor, like)


def _identity(adapter: LoRA, rank: int) -> _Basis:
    """The ranks as they are, and new ones behind those of each group."""
    groups = adapter.spec.groups
    old, new = rank_of(adapter) // groups, rank // groups
    there = torch.eye(new, old, dtype=torch.float64).expand(groups, -1, -1)
    return _Basis(there, there.mT, (torch.arange(new) >= old).expand(groups, -1))


def _svd(adapter: LoRA) -> tuple[Tensor, Tensor, Tensor]:
    """S (groups, k), and T and T^-1 without their S^-1/2: (groups, k, old) and (groups, old, k)."""
    groups = adapter.spec.groups
    up, down = _by_rank(adapter.lora_up, groups, True), _by_rank(adapter.lora_down, groups, False)
    up_r, down_r = (torch.linalg.qr(one.mT, mode="r").R for one in (up, down))  # (groups, <= old, old)
    left, values, right = torch.linalg.svd(up_r @ down_r.mT, full_matrices=False)
    rounding = _ROUNDING * up.norm(dim=(1, 2)) * down.norm(dim=(1, 2))  # (groups,)
    return torch.where(values > rounding[:, None], values, 0), left.mT @ up_r, down_r.mT @ right.mT


def _singular(adapter: LoRA, rank: int) -> _Basis:
    """The `rank` largest singular directions of up @ down, balanced; `empty` where there are fewer."""
    values, there, back = _svd(adapter)
    new = rank // adapter.spec.groups
    more = max(new - values.shape[1], 0)  # of a rank above the width of the layer
    root = torch.where(values > 0, values.rsqrt(), 0)
    there = F.pad(root[:, :, None] * there, (0, 0, 0, more))[:, :new]
    back = F.pad(back * root[:, None, :], (0, more))[:, :, :new]
    return _Basis(there, back, F.pad(root, (0, more))[:, :new] == 0)


def _shares(adapter: LoRA) -> Tensor:
    """What the first 1, 2, ... ranks of each group hold of all energy, (rank / groups,); ones where there is none."""
    energies = _svd(adapter)[0].square().sum(0).cumsum(0)
    shares = energies / energies[-1] if energies[-1] > 0 else torch.ones_like(energies)
    return F.pad(shares, (0, rank_of(adapter) // adapter.spec.groups - len(shares)), value=1.0)


# -- the change -----------------------------------------------------------------------------------


def _change(adapter: LoRA, target: Target, basis: _Basis, optimizer: Optimizer | None, seed: int) -> None:
    """Brings the factors of one layer, and their moments, into another basis."""
    config = replace(adapter.config, rank=basis.empty.numel())
    generator = sample_generator(seed, "surgery", target.name, config.rank)
    up, down = initial_factors("kaiming", adapter.spec, config, generator, WeightView(target))
    _change_factor(adapter.lora_down, down, basis.there, basis.back.mT, basis.empty, optimizer, up=False)
    _change_factor(adapter.lora_up, up, basis.back.mT, basis.there, basis.empty, optimizer, up=True)


def _change_factor(
    factor: nn.Parameter,
    fresh: Tensor,
    turn: Tensor,
    gradient_turn: Tensor,
    empty: Tensor,
    optimizer: Optimizer | None,
    up: bool,
) -> None:
    """`turn` @ the factor, `gradient_turn` @ its moments; `empty` ranks become those of `fresh`.

    An empty rank has no first moment, and the mean second moment of the old ranks. With none, Adam, which no
    longer corrects the bias at this step count, would divide by the root of one squared gradient times
    1 - beta2 alone: steps several times as long as the learning rate, until the average has caught up.
    """
    groups, rows = len(turn), empty[:, :, None]

    def moments(value: Tensor) -> Tensor:
        return _as_factor(gradient_turn @ _by_rank(value, groups, up), value, up)

    def squares(value: Tensor) -> Tensor:
        former = _by_rank(value, groups, up)
        return _as_factor(torch.where(rows, former.mean(1, keepdim=True), gradient_turn.square() @ former), value, up)

    changed = torch.where(rows, _by_rank(fresh, groups, up), turn @ _by_rank(factor, groups, up))
    replace_parameter(factor, _as_factor(changed, factor.detach(), up), optimizer, moments, squares)
