"""Adapters on layers whose outputs lie one after the other in a fused layer, as in W_qkv = [W_q; W_k; W_v].

Cutting an adapter of the fused layer is exact where the method has tensors along the outputs: their rows go
to the parts, and every part gets the rest. Putting adapters on the parts together is exact where the rest is
the same in all. Low-rank products can always be put together: where the A_i differ, [B_1 A_1; B_2 A_2] is a
block-diagonal B times the stacked A, with the sum of the ranks, and of a Hadamard product (LoHa) each factor is
such a product. A block-diagonal B is cut into its blocks again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from studio.adapters.base import method_of
from studio.adapters.layers import wide
from studio.errors import ConfigError

Entry = Mapping[str, Tensor]
Pairs = Sequence[tuple[str, str]]

# method -> its tensors along the outputs, and which dimension that is
_ROWS: dict[str, dict[str, int]] = {
    "lora": {"lora_up.weight": 0},
    "dora": {"lora_up.weight": 0, "dora_scale": 0},
    "tucker": {"lora_up.weight": 0},
    "hira": {"hira_B": 0},
    "loha": {"hada_w1_a": 0, "hada_w2_a": 0},
    "lokr": {"lokr_w1": 0, "lokr_w1_a": 0},
    "diff": {"diff": 0, "diff_b": 0},
    "bias": {"diff_b": 0},
    "ia3": {"weight": 0},
    "oft": {"oft_blocks": 0, "rescale": 0},
    "oftv2": {},
    "c3a": {"c3a_kernel": 0},
    "miss": {"miss_block": 1},
    "road": {"road_theta": 0, "road_alpha": 0},
}
# method -> the factors (out, rank, ...) and (rank, in, ...) of its products
_PRODUCTS: dict[str, Pairs] = {
    "lora": [("lora_up.weight", "lora_down.weight")],
    "dora": [("lora_up.weight", "lora_down.weight")],
    "hira": [("hira_B", "hira_A")],
    "loha": [("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")],
}
# factors, or whole matrices, of which the first has the outputs and the second the inputs
_MATRICES: Pairs = [
    *(("lora_up.weight", "lora_down.weight"), ("hira_B", "hira_A"), ("hada_w1_a", "hada_w1_b")),
    *(("diff", "diff"), ("c3a_kernel", "c3a_kernel")),
    *(("lokr_w1", "lokr_w1"), ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2"), ("lokr_w2_a", "lokr_w2_b")),
]
_NEUTRAL = {"rescale": 1.0, "road_alpha": 1.0}  # the value that changes nothing, where it is not 0


def _rows(entry: Entry) -> dict[str, int]:
    """Suffix -> dimension of the tensors along the outputs. Raises ConfigError where outputs depend on each other."""
    method = _method(entry)
    if method not in _ROWS or _coupled(method, entry):
        raise ConfigError(f"{method} has no exact form there: its outputs depend on each other")
    if method == "ia3" and _number(entry, "on_input"):
        return {}
    return {suffix: dim for suffix, dim in _ROWS[method].items() if suffix in entry}


def _number(entry: Entry, suffix: str) -> int:
    if entry[suffix].numel() != 1:
        raise ConfigError(f"{suffix} is {tuple(entry[suffix].shape)}, not one number")
    return int(entry[suffix])


def _method(entry: Entry) -> str:
    method = method_of(frozenset(entry))
    return method.method if method else "an entry of no method"


def _coupled(method: str, entry: Entry) -> bool:
    """Whether these settings of the method make the outputs depend on each other."""
    if method == "dora":  # magnitudes of the input channels: norms over all outputs
        return entry["dora_scale"].shape[:1] != entry["lora_up.weight"].shape[:1]
    if method == "oft":  # BOFT's butterflies, and a bound on the norm of all blocks together
        bound = entry.get("alpha")
        return entry["oft_blocks"].ndim != 3 or (bound is not None and not bound.is_meta and bool(bound.any()))
    return "hada_t1" in entry


def expansion(entry: Entry) -> float | None:
    """Outputs over inputs of the entry's layer; None where the tensors do not show both."""
    pairs = [(entry[up].shape, entry[down].shape) for up, down in _MATRICES if up in entry and down in entry]
    if not pairs or any(len(shape) < 2 or 0 in shape for pair in pairs for shape in pair):
        return None
    return math.prod(up[0] / down[1] for up, down in pairs)


def reversed_halves(entry: Entry) -> dict[str, Tensor]:
    """The adapter of a layer whose outputs' two halves have changed places; its own inverse. Errors as for `split`."""
    rolled = {}
    for suffix, dim in _rows(entry).items():
        half, _ = _sizes(entry, suffix, dim, (1, 1))
        rolled[suffix] = entry[suffix].roll(half, dim)
    return {**entry, **rolled}


# -- cutting ---------------------------------------------------------------------------------


def split(entry: Entry, shares: Sequence[int]) -> list[dict[str, Tensor] | None]:
    """The adapters of the parts, whose outputs are in the ratio of `shares`; None for a part that has none.

    Raises ConfigError where the method's outputs depend on each other, or do not divide so.
    """
    rows = _rows(entry)
    parts: list[dict[str, Tensor]] = [{} for _ in shares]
    for suffix, tensor in entry.items():
        if suffix in rows:
            pieces = tensor.split(_sizes(entry, suffix, rows[suffix], shares), rows[suffix])
        else:
            pieces = (tensor, *(tensor.clone() for _ in shares[1:]))  # safetensors hold no tensor twice
        for part, piece in zip(parts, pieces, strict=True):
            part[suffix] = piece
    return _trimmed(parts, _PRODUCTS.get(_method(entry), [])) or list(parts)


def _sizes(entry: Entry, suffix: str, dim: int, shares: Sequence[int]) -> list[int]:
    """How the tensor divides into the parts; a group of RoAd's stays whole, and has up to 2 * `group_size` values."""
    tensor = entry[suffix]
    unit = 2 * _number(entry, "group_size") if "group_size" in entry else 1
    if unit < 1 or tensor.ndim <= dim or tensor.shape[dim] % (unit * sum(shares)):
        ratio = " : ".join(map(str, shares))
        raise ConfigError(f"{suffix} {tuple(tensor.shape)} does not divide into outputs in the ratio {ratio}")
    return [tensor.shape[dim] // sum(shares) * share for share in shares]


def _trimmed(parts: Sequence[Entry], pairs: Pairs) -> list[dict[str, Tensor] | None] | None:
    """Each part with its own block of block-diagonal factors, and its share of alpha, so that alpha / rank stays.

    None where there are no such blocks. A part without a block changes nothing, but for DoRA's magnitudes.
    """
    blocks = _blocks(parts, pairs) if pairs else None
    alphas = _cut_alpha(parts[0], blocks) if blocks else None
    if blocks is None or alphas is None or ("dora_scale" in parts[0] and not all(map(len, blocks))):
        return None
    trimmed: list[dict[str, Tensor] | None] = []
    for part, block, alpha in zip(parts, blocks, alphas, strict=True):
        own = slice(block.start, block.stop)
        ups = {up: part[up][:, own].contiguous() for up, _ in pairs}
        downs = {down: part[down][own].clone() for _, down in pairs}
        trimmed.append({**part, **ups, **downs, **alpha} if block else None)
    return trimmed


def _blocks(parts: Sequence[Entry], pairs: Pairs) -> list[range] | None:
    """The places of the rank that each part uses, where those are one block after the other."""
    rank = _rank(parts[0], pairs)
    used = [_used(part, pairs) for part in parts]
    even = range(0, rank + 1, max(rank // len(parts), 1))
    for bounds in (even, _bounds(used, rank)):
        blocks = [range(*ends) for ends in pairwise(bounds)]
        if len(blocks) == len(parts) and any(used) and _within(used, blocks):
            return blocks
    return None


def _rank(entry: Entry, pairs: Pairs) -> int:
    shapes = [(entry[up].shape, entry[down].shape) for up, down in pairs]
    ranks = {size for up, down in shapes for size in (*up[1:2], *down[:1])}
    if len(ranks) != 1 or any(len(shape) < 2 for pair in shapes for shape in pair):
        raise ConfigError(
            f"its factors do not fit each other: {', '.join(f'{tuple(a)} and {tuple(b)}' for a, b in shapes)}"
        )
    return ranks.pop()


def _used(part: Entry, pairs: Pairs) -> list[int]:
    """The places of the rank where one of the factors along the outputs is not zero."""
    places = [wide(part[up]).ne(0).transpose(0, 1).flatten(1).any(1) for up, _ in pairs]
    return torch.stack(places).any(0).nonzero().flatten().tolist()


def _bounds(used: Sequence[Sequence[int]], rank: int) -> list[int]:
    """Where blocks begin that begin with the first place used, and the end of the last; unused ones are empty."""
    bounds = [rank]
    for own in reversed(used):
        bounds.append(own[0] if own else bounds[-1])
    first = min(bounds)
    return [0 if bound == first else bound for bound in reversed(bounds)]


def _within(used: Sequence[Sequence[int]], blocks: Sequence[range]) -> bool:
    return all(not own or (own[0] in block and own[-1] in block) for own, block in zip(used, blocks, strict=True))


def _cut_alpha(entry: Entry, blocks: Sequence[range]) -> list[dict[str, Tensor]] | None:
    """alpha in the ratio of the blocks; None where its parts would not add up to it again."""
    if "alpha" not in entry:
        return [{} for _ in blocks]
    alpha, rank = entry["alpha"], blocks[-1].stop
    if alpha.numel() != 1 or not alpha.is_floating_point():
        return None
    parts = [_stored(float(alpha) * len(block) / rank, alpha) for block in blocks]
    total = _stored(sum(map(float, parts)), alpha)
    exact = total == alpha and all(part.dtype == alpha.dtype for part in parts)
    return [{"alpha": part} for part in parts] if exact else None


def _stored(value: float, like: Tensor) -> Tensor:
    """`value` in the dtype of another alpha, or in fp32 where a shorter one does not hold it."""
    short = torch.full_like(like, value)
    return short if float(short) == value else torch.full_like(like, value, dtype=torch.float32)


# -- putting together ------------------------------------------------------------------------


def fuse(parts: Sequence[Entry | None], shares: Sequence[int]) -> dict[str, Tensor]:
    """The adapter of the fused layer; None stands for a part without an adapter, and at least one has one.

    Raises ConfigError where there is no exact common form: for several methods, sizes that do not fit each
    other, tensors besides the outputs' that differ, or a missing part that the method cannot leave as it is.
    """
    present = [part for part in parts if part is not None]
    first, method = present[0], _method(present[0])
    if any(part.keys() != first.keys() for part in present):
        raise ConfigError(f"its parts have different methods: {', '.join(sorted(set(map(_method, present))))}")
    rows, *_ = [_rows(part) for part in present]
    if len(present) < len(parts) and (not rows or "dora_scale" in rows):
        raise ConfigError(f"{method} is on {len(present)} of its {len(parts)} parts only")
    whole = _completed(parts, rows, shares)
    differing = [name for name in first if name not in rows and not _same([part[name] for part in present])]
    if not differing:
        return {**first, **{name: _joined([part[name] for part in whole], dim) for name, dim in rows.items()}}
    if method not in _PRODUCTS:
        raise ConfigError(f"the {', '.join(differing)} of {method} differ in its parts")
    ranks = [0 if part is None else _rank(part, _PRODUCTS[method]) for part in parts]
    return _stacked(whole, ranks, rows, _PRODUCTS[method])


def _completed(parts: Sequence[Entry | None], rows: Mapping[str, int], shares: Sequence[int]) -> list[Entry]:
    """`parts` with adapters that change nothing for the missing. Raises ConfigError for outputs in another ratio."""
    place, first = next((place, part) for place, part in enumerate(parts) if part is not None)
    whole: list[Entry] = []
    for part, share in zip(parts, shares, strict=True):
        lengths = {name: first[name].shape[dim] * share // shares[place] for name, dim in rows.items()}
        if part is None:
            part = {**first, **{name: _neutral(name, first[name], dim, lengths[name]) for name, dim in rows.items()}}
        if any(part[name].shape[dim] != lengths[name] for name, dim in rows.items()):
            raise ConfigError(f"the outputs of its parts are not in the ratio {' : '.join(map(str, shares))}")
        whole.append(part)
    return whole


def _neutral(name: str, like: Tensor, dim: int, length: int) -> Tensor:
    shape = list(like.shape)
    shape[dim] = length
    return like.new_full(shape, _NEUTRAL.get(name, 0.0))


def _same(tensors: Sequence[Tensor]) -> bool:
    """Whether all are equal: on the meta device, where nothing has a value, only where they are the same object."""
    first, *rest = tensors
    return all(
        one is first or (one.dtype == first.dtype and not one.is_meta and torch.equal(one, first)) for one in rest
    )


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    try:
        return torch.cat(list(tensors), dim)
    except RuntimeError as problem:
        raise ConfigError(f"the sizes of its parts do not fit each other: {problem}") from problem


def _stacked(whole: Sequence[Entry], ranks: Sequence[int], rows: Mapping[str, int], pairs: Pairs) -> dict[str, Tensor]:
    """Stacked (rank, in) factors and block-diagonal (out, rank) ones, of one scale alpha / rank: the first part's.

    Where the scales differ, the rest of a part's is in its factor of the first pair.
    """
    scales = [_scale(part, rank) for part, rank in zip(whole, ranks, strict=True)]
    scale = next((one for one, rank in zip(scales, ranks, strict=True) if rank and one), 1.0)
    entry = {
        name: _joined([part[name] for part in whole], dim) for name, dim in rows.items() if name not in dict(pairs)
    }
    for up, down in pairs:
        entry[down] = _joined([part[down][:rank] for part, rank in zip(whole, ranks, strict=True)], 0)
        factors = [own / scale if up == pairs[0][0] else 1.0 for own in scales]
        blocks = [_block(part[up], ranks, place, factors[place]) for place, part in enumerate(whole)]
        entry[up] = _joined(blocks, 0)
    alpha = {"alpha": _stored(scale * sum(ranks), whole[0]["alpha"])} if "alpha" in whole[0] else {}
    return {**entry, **alpha}


def _scale(entry: Entry, rank: int) -> float:
    return float(entry["alpha"]) / rank if "alpha" in entry and rank else 1.0


def _block(up: Tensor, ranks: Sequence[int], place: int, factor: float) -> Tensor:
    """The rows of the block-diagonal factor (out, sum of ranks, ...) that a part has."""
    rows = up.new_zeros((len(up), sum(ranks), *up.shape[2:]))
    own = up[:, : ranks[place]]
    rows[:, sum(ranks[:place]) : sum(ranks[: place + 1])] = own if factor == 1 else (factor * wide(own)).to(up.dtype)
    return rows
