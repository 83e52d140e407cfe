"""Mixed batches: a different adapter, or none, for every sample of one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from studio.adapters.layers import version
from studio.errors import ConfigError

if TYPE_CHECKING:
    from studio.adapters.adapter_set import AdapterSet
    from studio.adapters.base import Adapter
    from studio.adapters.layers import WeightView


@dataclass(frozen=True)
class Rows:
    """The samples that one set acts on, of `total` in the batch; `stacks` belongs to the whole batch."""

    samples: tuple[int, ...]
    total: int
    stacks: dict[int, Any] = field(compare=False)


@contextmanager
def mixed_batch(choice: Sequence[AdapterSet | None]) -> Iterator[None]:
    """Inside the block, sample i of each batch is seen by `choice[i]` alone, or by no set where that is None.

    Sets that are not named act on all samples, as before. With activation checkpointing, the backward
    pass belongs inside the block. Raises ConfigError for a set that cannot act on single samples.
    """
    stacks: dict[int, Any] = {}
    sets = list(dict.fromkeys(one for one in choice if one is not None))
    if not all(one.attached for one in sets):
        raise ConfigError("an adapter of the mixed batch is not attached, and would act on no sample: attach it")
    if any(one.gate.merged for one in sets):
        raise ConfigError("an adapter of the mixed batch is merged into the base, and acts on every sample: unmerge it")
    if not all(one.enabled for one in sets):
        raise ConfigError("an adapter of the mixed batch is switched off: enable it, or give None for its samples")
    before = [one.gate.rows for one in sets]  # of a block around this one
    for one in sets:
        rows = tuple(place for place, chosen in enumerate(choice) if chosen is one)
        one.gate.rows = Rows(rows, len(choice), stacks)
    try:
        yield
    finally:
        for one, rows_before in zip(sets, before, strict=True):
            one.gate.rows = rows_before


def mixed_rows(rows: Rows, x: Tensor) -> Tensor:
    """Ones for the rows of `x` that belong to the samples, zeros for the others: (rows, 1, ...)."""
    keep = torch.zeros(rows.total, dtype=x.dtype, device=x.device)
    keep[list(rows.samples)] = 1
    return keep.repeat_interleave(_each(rows, x)).reshape(-1, *(1,) * (x.ndim - 1))


def _each(rows: Rows, x: Tensor) -> int:
    if x.shape[0] % rows.total:
        raise ConfigError(
            f"a mixed batch of {rows.total} samples meets a layer with an input of {tuple(x.shape)}, "
            "which does not hold whole samples"
        )
    return x.shape[0] // rows.total


def mixed_output(adapters: Sequence[Adapter], x: Tensor, y: Tensor, base: Tensor | None, weight: WeightView) -> Tensor:
    """`y` after each adapter has acted on its own samples."""
    stacked = _stackable(adapters)
    if stacked:
        y = _stacked(stacked, x, y, weight)
    elif base is not None and any(one.gate.rows is None for one in adapters):
        y = y.clone()  # which such an adapter may write into; base stays what it is
    for adapter in adapters:
        if adapter in stacked:
            continue
        if adapter.gate.rows is None:
            y = adapter(x, y, base, weight)
        else:
            y = _on_rows(adapter, adapter.gate.rows, x, y, base, weight)
    return y


def _on_rows(adapter: Adapter, rows: Rows, x: Tensor, y: Tensor, base: Tensor | None, weight: WeightView) -> Tensor:
    """`y` with the rows of the adapter's samples replaced by what the adapter makes of them."""
    each = _each(rows, x)
    own = torch.tensor(rows.samples, device=x.device)
    index = (own[:, None] * each + torch.arange(each, device=x.device)).flatten()  # (samples * each,)
    with _keys_of(adapter, rows):
        mine = adapter(x[index], y[index], None if base is None else base[index], weight)
    return y.index_copy(0, index, mine)


@contextmanager
def _keys_of(adapter: Adapter, rows: Rows) -> Iterator[None]:
    """Dropout by the keys of the adapter's own samples."""
    if not adapter.drops:
        yield
        return
    keys = adapter.dropout_masks.keys  # type: ignore[union-attr]
    everyone = keys.values
    keys.values = tuple(everyone[place] for place in rows.samples) if everyone else ()
    try:
        yield
    finally:
        keys.values = everyone


def _stackable(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The low-rank adapters of the batch, where there are several: one batched product serves them all."""
    chosen = (one for one in adapters if one.gate.rows is not None and one.spec.kind == "linear")
    fits = [one for one in chosen if one.low_rank and not one.drops]
    return fits if len(fits) > 1 else []


def _stacked(adapters: Sequence[Adapter], x: Tensor, y: Tensor, weight: WeightView) -> Tensor:
    """Each sample through its own bottleneck, padded to the largest rank: two batched products."""
    rows = adapters[0].gate.rows
    assert rows is not None
    _each(rows, x)
    if torch.is_grad_enabled():
        up, down, scale = _stack(adapters, rows.total, weight, y.dtype)
    else:  # kept for the next pass of the block, until a parameter or a strength changes
        now = [mark for one in adapters for mark in (id(one), one.strength, *_versions(one))]
        if rows.stacks.get(id(weight), (None,))[0] != now:
            rows.stacks[id(weight)] = now, *_stack(adapters, rows.total, weight, y.dtype)
        _, up, down, scale = rows.stacks[id(weight)]
    h = torch.bmm(x.to(y.dtype).reshape(rows.total, -1, x.shape[-1]), down.mT)  # (samples, tokens, rank)
    return torch.baddbmm(y.reshape(rows.total, -1, y.shape[-1]), h, up, alpha=scale).view(y.shape)


def _versions(adapter: Adapter) -> Iterator[object]:
    return (version(own) for own in adapter._parameters.values() if own is not None)


def _stack(
    adapters: Sequence[Adapter], total: int, weight: WeightView, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float]:
    """(samples, rank, out), (samples, rank, in): the factors of each sample's adapter, zero without one; and the
    scale of their products, where all have the same."""
    products = [one.product(weight) for one in adapters]
    scales = [one.strength * scale for one, (_, _, scale) in zip(adapters, products, strict=True)]
    common = scales[0] if len(set(scales)) == 1 else 1.0
    rank = max([len(down) for _, down, _ in products])
    ups: list[Tensor | None] = [None] * total
    downs: list[Tensor | None] = [None] * total
    for adapter, (up, down, _), scale in zip(adapters, products, scales, strict=True):
        up = up.mT if scale == common else scale * up.mT
        if missing := rank - len(down):
            up, down = F.pad(up, (0, 0, 0, missing)), F.pad(down, (0, 0, 0, missing))
        for sample in adapter.gate.rows.samples:  # type: ignore[union-attr]
            ups[sample], downs[sample] = up, down
    return _stacked_up(ups).to(dtype), _stacked_up(downs).to(dtype), common


def _stacked_up(factors: Sequence[Tensor | None]) -> Tensor:
    """The factors of all samples; zeros where there is none."""
    if any(one is None for one in factors):
        some = next(one for one in factors if one is not None)
        factors = [torch.zeros_like(some) if one is None else one for one in factors]
    return torch.stack(factors)  # type: ignore[arg-type]
