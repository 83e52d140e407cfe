"""Arithmetic on adapters: weighted sums, exact or as the nearest LoRA of a given rank.

A sum of low-rank changes is low-rank: the factors side by side give it exactly, with the sum of the ranks.
Its best approximation of a smaller rank (Eckart-Young) comes from the factors too, never from the full
matrix: U D = (Qu Ru)(Qd Rd)^T = Qu (Ru Rd^T) Qd^T, whose singular values are those of the small Ru Rd^T.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from studio.adapters import Adapter, WeightView
from studio.adapters.base import method_of
from studio.adapters.inject import adapter_of_entry
from studio.adapters.layers import wide
from studio.adapters.methods import Full, LoRA, NormTuning
from studio.errors import ConfigError
from studio.formats.state import AdapterState

Entry = Mapping[str, Tensor]
Parts = Sequence[tuple[Entry, float]]
"""What the states have for one layer, with their weights."""


@dataclass(frozen=True)
class CombinedState(AdapterState):
    """A sum of adapters, and how near it is.

    `residuals`: layer -> |sum - result| / |sum| (Frobenius norms), 0 where it is exact. `energy_kept`: the
    share of the squared norm that the shortened layers kept, 1 without any.
    """

    residuals: Mapping[str, float] = field(default_factory=dict)
    energy_kept: float = 1.0


@torch.no_grad()
def combine(
    states: Sequence[AdapterState],
    weights: Sequence[float],
    rank: int | None = None,
    bases: Mapping[str, WeightView] | None = None,
) -> CombinedState:
    """The sum of weight * dW over `states`, layer by layer, with the true dW of every method.

    Layers of low-rank methods become a LoRA: the exact one, with the sum of the ranks, or the best one of
    `rank` (a multiple of a convolution's groups). Layers of other methods become a full difference
    (`diff`), or with `rank` the best LoRA, unless their bias changes; norms, biases and full differences are
    added as they are. `bases` (layer -> weight of the base) is needed for methods other than these and
    LoRA, whose dW is not in the file alone. Raises ConfigError for states of different families or shapes,
    a base that is missing, and settings that make no sense.
    """
    _check(states, weights, rank)
    entries: dict[str, Entry] = {}
    products: dict[str, Product] = {}
    for name in dict.fromkeys(name for state in states for name in state.tensors):
        pairs = zip(states, weights, strict=True)
        parts = [(state.tensors[name], weight) for state, weight in pairs if name in state.tensors]
        try:
            total = _sum(parts, None if bases is None else bases.get(name), rank)
        except ConfigError as problem:
            raise ConfigError(f"{name}: {problem}") from problem
        if isinstance(total, Product):
            products[name] = total
        else:
            entries[name] = total
    shortened, lost, whole = _shortened(products, rank)
    entries |= {name: product.entry() for name, product in shortened.items()}
    ordered = {name: entries[name] for state in states for name in state.tensors}
    residuals = {name: (lost[name] / whole[name]) ** 0.5 if lost.get(name) else 0.0 for name in ordered}
    kept = 1 - sum(lost.values()) / (sum(whole.values()) or 1)
    return CombinedState(states[0].family, ordered, _metadata(states), residuals, kept)


def _check(states: Sequence[AdapterState], weights: Sequence[float], rank: int | None) -> None:
    if not states or len(states) != len(weights):
        raise ConfigError(f"{len(states)} adapters and {len(weights)} weights: give one weight for each adapter")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; it must be 1 or more")
    families = sorted({state.family for state in states})
    if len(families) > 1:
        raise ConfigError(f"adapters for different families cannot be combined: {', '.join(families)}")


_OF_THE_BASE = ("ss_base_model_version", "ss_v2", "ss_sd_model_name", "modelspec.prediction_type")


def _metadata(states: Sequence[AdapterState]) -> dict[str, str]:
    """What all states say alike of their base."""
    first, *rest = (state.metadata for state in states)
    return {key: first[key] for key in _OF_THE_BASE if key in first and all(one.get(key) == first[key] for one in rest)}


# -- one layer -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """dW as up @ down, for each group of a convolution and for each expert, once for other layers.

    `up` is (groups, out, rank), `down` (groups, rank, n) with n = in * kernel, of the shape `inner`. Groups
    share the rank of a LoRA, `experts` have it each.
    """

    up: Tensor
    down: Tensor
    inner: tuple[int, ...]
    experts: bool = False

    @property
    def sharing(self) -> int:
        """How many groups share the rank."""
        return 1 if self.experts else len(self.down)

    def entry(self) -> Entry:
        """As a LoRA's, of scale 1."""
        rank = self.down.shape[1] * self.sharing
        down, up = self.down, self.up
        if not self.experts:
            down = down.reshape(rank, *self.inner)
            up = up.reshape(-1, up.shape[2], *(1,) * (len(self.inner) - 1))  # (out, rank / groups, 1, ...)
        tensors = {"lora_down.weight": down.contiguous(), "lora_up.weight": up.contiguous()}
        return {**tensors, "alpha": torch.tensor(float(rank))}


def _sum(parts: Parts, base: WeightView | None, rank: int | None) -> Product | Entry:
    """The sum for one layer: a product where all parts are low-rank, or where it is to become one."""
    methods = [method_of(frozenset(entry)) for entry, _ in parts]
    if all(method is not None and issubclass(method, Full) for method in methods):
        return _added(parts)
    found = [_product(entry, base) for entry, _ in parts]
    products = [one for one in found if isinstance(one, Product)]
    if len(products) < len(found):
        assert base is not None
        return _difference(parts, base, rank)
    first = products[0]
    if any(one.up.shape[:2] != first.up.shape[:2] or one.down.shape[2] != first.down.shape[2] for one in products):
        raise ConfigError("the adapters have different shapes there: they are for different bases")
    ups = [weight * one.up for one, (_, weight) in zip(products, parts, strict=True)]
    down = torch.cat([one.down for one in products], dim=1)
    return Product(torch.cat(ups, dim=2), down, first.inner, first.experts)


def _added(parts: Parts) -> Entry:
    """The sum of entries whose tensors are the changes themselves; a norm's bias has two names."""
    total: dict[str, Tensor] = {}
    of_norm = any("w_norm" in entry for entry, _ in parts)
    for entry, weight in parts:
        for name, tensor in entry.items():
            suffix = "b_norm" if of_norm and name == "diff_b" else name
            if suffix in total and total[suffix].numel() != tensor.numel():
                raise ConfigError("the adapters have different shapes there: they are for different bases")
            change = weight * wide(tensor)
            total[suffix] = total[suffix] + change.reshape(total[suffix].shape) if suffix in total else change
    return total


def _product(entry: Entry, base: WeightView | None) -> Product | None:
    """The factors of an entry; None where its method has none."""
    if LoRA.owns(frozenset(entry)):
        return _of_lora(entry, None if base is None else base.target.spec.kind)
    adapter, view = _adapter(entry, base)
    if not adapter.low_rank:
        return None
    up, down = (wide(factor).cpu() for factor in adapter.factors(view))
    return Product(up[None], down[None], _inner(view))


def _of_lora(entry: Entry, kind: str | None) -> Product:
    """A LoRA's factors; its layer shows in their shapes, but for experts of rank 1, which need the `kind`."""
    up, down = wide(entry["lora_up.weight"]), wide(entry["lora_down.weight"])
    experts = kind == "experts" if kind else up.ndim == 3 and up.shape[2] > 1
    rank = down.shape[1 if experts else 0]
    scale = float(entry["alpha"]) / rank if "alpha" in entry else 1.0
    if experts:
        return Product(scale * up, down, tuple(down.shape[2:]), experts=True)
    own = up.shape[1]  # rank / groups
    if rank % own:
        raise ConfigError(
            f"the factors {tuple(up.shape)} and {tuple(down.shape)} do not fit each other; for experts, give `bases`"
        )
    groups = rank // own
    return Product(scale * up.reshape(groups, -1, own), down.reshape(groups, own, -1), tuple(down.shape[1:]))


def _adapter(entry: Entry, base: WeightView | None) -> tuple[Adapter, WeightView]:
    """The adapter of an entry on its layer of the base."""
    if base is None:
        method = method_of(frozenset(entry))
        raise ConfigError(
            f"the change of '{method.method if method else '?'}' is known only with the base: give `bases`, the "
            "weights of the model that the adapters are for"
        )
    adapter = adapter_of_entry(base.target, entry)
    adapter.share([adapter], 0)
    return adapter, base


def _inner(view: WeightView) -> tuple[int, ...]:
    return view.shape[:1] if view.target.spec.kind == "embedding" else view.shape[1:]


def _difference(parts: Parts, base: WeightView, rank: int | None) -> Product | Entry:
    """The sum of dW as a full matrix, and as its factors where `rank` asks for a LoRA that can hold it."""
    weight, bias = torch.zeros(base.shape), None
    for entry, share in parts:
        adapter, view = _adapter(entry, base)
        weight += share * wide(adapter.delta_weight(view)).cpu()
        change = adapter.delta_bias(view)
        if change is not None:
            bias = share * wide(change).cpu() + (0 if bias is None else bias)
    spec = base.target.spec
    names = NormTuning.names if spec.kind == "norm" else Full.names
    if bias is not None:
        return dict(zip(names, (weight, bias), strict=True))
    if rank is None or spec.groups > 1 or spec.kind not in ("linear", "conv", "embedding"):
        return {names[0]: weight}
    matrix = (weight.T if spec.kind == "embedding" else weight).flatten(1)  # (out, n)
    up, values, down = torch.linalg.svd(matrix, full_matrices=False)
    return Product((up * values)[None], down[None], _inner(base))


# -- all layers ------------------------------------------------------------------------------


def _shortened(
    products: Mapping[str, Product], rank: int | None
) -> tuple[dict[str, Product], dict[str, float], dict[str, float]]:
    """(the best products of `rank`; layer -> squared norm of what is lost; of the whole), equal shapes at once."""
    done = dict(products)
    lost: dict[str, float] = {}
    whole: dict[str, float] = {}
    alike: dict[tuple[torch.Size, torch.Size, int], list[str]] = defaultdict(list)
    for name, product in products.items():
        if rank is not None and rank % product.sharing:
            raise ConfigError(f"{name}: rank {rank} does not divide into the {product.sharing} groups of a convolution")
        if rank is not None and rank < product.down.shape[1] * product.sharing:
            alike[product.up.shape, product.down.shape, rank // product.sharing].append(name)
    for (_, _, own), names in alike.items():
        up = torch.stack([products[name].up for name in names])  # (layers, groups, out, sum of ranks)
        down = torch.stack([products[name].down for name in names])
        up, down, values = best_product(up, down, own)
        squares = values.square().double().sum(1)  # (layers, sum of ranks)
        for place, name in enumerate(names):
            done[name] = replace(products[name], up=up[place], down=down[place])
            whole[name], lost[name] = float(squares[place].sum()), float(squares[place, own:].sum())
    return done, lost, whole


def best_product(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(up, down, singular values) with up @ down the best approximation of `rank` to the given one.

    `up` is (..., out, r) and `down` (..., r, n); the singular values (..., up to r) are those of the whole
    product, and both factors take their square roots.
    """
    outer, up_core = torch.linalg.qr(up)
    inner, down_core = torch.linalg.qr(down.mT)
    left, values, right = torch.linalg.svd(up_core @ down_core.mT)
    root = values[..., :rank].sqrt()
    up = outer @ (left[..., :rank] * root[..., None, :])
    return up, (root[..., None] * right[..., :rank, :]) @ inner.mT, values
