"""What one adapter does to one layer, whatever its method: dW, as factors or as a tensor, and db."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from studio.adapters import WeightView
from studio.adapters.base import method_of
from studio.adapters.methods import Full, LoRA, NormTuning
from studio.algebra.cut import Cut
from studio.algebra.product import Product, best_of_matrix, concat, of_one_group, shorten
from studio.errors import ConfigError

Entry = Mapping[str, Tensor]
"""What a file has for one layer: on-disk suffix -> tensor."""

_EMBEDDING = re.compile(r"(.*\.)?(\w+_embedding|embed_tokens|shared|relative_attention_bias|wte|wpe)")


@contextmanager
def located(name: str) -> Iterator[None]:
    """Puts the layer's name before what a ConfigError says."""
    try:
        yield
    except ConfigError as problem:
        raise ConfigError(f"{name}: {problem}") from problem


@dataclass(frozen=True)
class Layer:
    """What is known of a layer beside the adapters' entries: the base's weight, where it is at hand.

    `kind` is as in `LayerSpec`, or None where nothing tells; `groups` are a convolution's.
    """

    base: WeightView | None
    kind: str | None
    groups: int = 1

    @classmethod
    def of(cls, name: str, base: WeightView | None, entries: Iterable[Entry]) -> Layer:
        """From the base, or else from what the name and the factors in `entries` tell."""
        if base is not None:
            return cls(base, base.target.spec.kind, base.target.spec.groups)
        if _EMBEDDING.fullmatch(name):
            return cls(None, "embedding")
        for entry in entries:
            if method_of(frozenset(entry)) is LoRA:
                up, down = entry["lora_up.weight"], entry["lora_down.weight"]
                return cls(None, "experts") if _of_experts(up) else cls(None, "layer", len(down) // up.shape[1])
        return cls(None, None)


@dataclass(frozen=True)
class Change:
    """dW as a product where the method has factors, otherwise as a tensor of the weight's shape; db (out,)."""

    weight: Product | Tensor | None = None
    bias: Tensor | None = None
    norm: bool = False

    def dense(self) -> Tensor | None:
        """dW as a tensor of the weight's shape, or None."""
        return self.weight.dense() if isinstance(self.weight, Product) else self.weight

    def to(self, dtype: torch.dtype) -> Change:
        """The same change with tensors of `dtype`."""
        weight, bias = self.weight, self.bias
        return replace(
            self, weight=weight if weight is None else weight.to(dtype), bias=bias if bias is None else bias.to(dtype)
        )

    def entry(self) -> dict[str, Tensor]:
        """As in a file: a LoRA, or the change itself under `diff` and `diff_b`, on norms `w_norm` and `b_norm`."""
        if isinstance(self.weight, Product):
            assert self.bias is None, "no method holds factors and a bias"
            return self.weight.entry()
        names = NormTuning.names if self.norm else Full.names
        tensors = zip(names, (self.weight, self.bias), strict=True)
        return {name: tensor.contiguous() for name, tensor in tensors if tensor is not None}


def change_of(entry: Entry, layer: Layer) -> Change:
    """What the file's `entry` does to its layer; in the file's dtype, but float64 becomes fp32.

    Raises ConfigError where that is known only with the base, or does not fit it.
    """
    method = method_of(frozenset(entry))
    if method is not None and issubclass(method, Full):
        return _of_tensors(entry, layer)
    if method is LoRA:
        product = _of_lora(entry, layer.kind)
        if layer.base is not None and product.size != math.prod(layer.base.shape):
            shapes = [tuple(entry[name].shape) for name in ("lora_up.weight", "lora_down.weight")]
            raise ConfigError(
                f"the file's LoRA is {shapes[0]} and {shapes[1]}, the base's weight {layer.base.shape}: "
                "the file is for another base"
            )
        return Change(product)
    if method is None or layer.base is None:
        raise ConfigError(
            f"the change of '{method.method if method else '?'}' is known only with the base: give `bases`, the "
            "weights of the model that the adapters are for"
        )
    base = layer.base if layer.base.target.device.type != "meta" else _Shape(layer.base.target)
    adapter = method.from_export(base.target.spec, dict(entry))
    adapter.share([adapter], 0)
    change = adapter.delta_bias(base)
    bias = None if change is None else _read(change)
    if adapter.low_rank and bias is None:
        up, down = map(_read, adapter.factors(base))
        embedding = layer.kind == "embedding"
        return Change(
            Product(up[None], down[None], base.shape[:1] if embedding else base.shape[1:], embedding=embedding)
        )
    return Change(_read(adapter.delta_weight(base)), bias, layer.kind == "norm")


class _Shape(WeightView):
    """A weight on the meta device: enough for methods that do not read it."""

    def stored(self) -> Tensor:
        raise ConfigError("the change depends on the base's weight, and `bases` has its shape only")


def _read(tensor: Tensor) -> Tensor:
    """In fp32, on the CPU."""
    return tensor.detach().float().cpu()


def _of_experts(up: Tensor) -> bool:
    """Whether a LoRA's `up` is (experts, out, rank), and not (out, rank, 1): shapes alone tell, but for rank 1."""
    return up.ndim == 3 and up.shape[2] > 1


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _of_tensors(entry: Entry, layer: Layer) -> Change:
    """Entries whose tensors are the changes themselves; a norm's bias has two names."""
    weight = next((_narrow(entry[name]) for name in ("diff", "w_norm") if name in entry), None)
    bias = next((_narrow(entry[name]) for name in ("diff_b", "b_norm") if name in entry), None)
    if weight is not None and layer.base is not None:
        if weight.numel() != math.prod(layer.base.shape):
            raise ConfigError(f"the change is {tuple(weight.shape)}, the base's weight {layer.base.shape}")
        weight = weight.reshape(layer.base.shape)
    return Change(weight, bias, "w_norm" in entry)


def _of_lora(entry: Entry, kind: str | None) -> Product:
    """A LoRA's factors; its layer shows in their shapes, but for experts of rank 1, which need the `kind`."""
    up, down = _narrow(entry["lora_up.weight"]), _narrow(entry["lora_down.weight"])
    experts = kind == "experts" if kind else _of_experts(up)
    rank = down.shape[1 if experts else 0]
    scale = float(entry["alpha"]) / rank if "alpha" in entry else 1.0
    if experts:
        return Product(up, down, tuple(down.shape[2:]), scale, experts=True)
    own = up.shape[1]  # rank / groups
    if rank % own:
        raise ConfigError(
            f"the factors {tuple(up.shape)} and {tuple(down.shape)} do not fit each other; for experts, give `bases`"
        )
    groups = rank // own
    up, inner = up.reshape(groups, -1, own), tuple(down.shape[1:])  # (groups, out / groups, rank / groups)
    return Product(up, down.reshape(groups, own, -1), inner, scale, embedding=kind == "embedding")


# -- several ---------------------------------------------------------------------------------


def weighted_sum(changes: Sequence[Change], weights: Sequence[float]) -> Change:
    """The exact sum: a product where all are, otherwise a tensor."""
    norm = any(one.norm for one in changes)
    products = [one.weight for one in changes if isinstance(one.weight, Product)]
    if len(products) == len(changes):
        return Change(concat(products, weights), None, norm)
    pairs = list(zip(changes, weights, strict=True))
    weight = added([(one.dense(), share) for one, share in pairs])
    return Change(weight, added([(one.bias, share) for one, share in pairs]), norm)


def added(terms: Sequence[tuple[Tensor | None, float]]) -> Tensor | None:
    """The weighted sum of the tensors that are there, in fp32; None without any.

    Raises ConfigError for different shapes; dimensions of size 1 may differ.
    """
    total: Tensor | None = None
    for tensor, weight in terms:
        if tensor is None:
            continue
        term = weight * tensor.float()
        total = term if total is None else total + aligned(term, total)
    return total


def gram(changes: Mapping[int, Change], inputs: int) -> Tensor:
    """The inner products of dW and db of the changes by their places, (inputs, inputs); zeros where there is none."""
    products = torch.zeros(inputs, inputs, dtype=torch.float64)
    for place, one in changes.items():
        for other_place, other in changes.items():
            if place <= other_place:
                products[place, other_place] = products[other_place, place] = _inner_product(one, other)
    return products


def _inner_product(one: Change, other: Change) -> float:
    if isinstance(one.weight, Product) and isinstance(other.weight, Product):
        return one.weight.inner_product(other.weight)
    pairs = ((one.dense(), other.dense()), (one.bias, other.bias))
    return sum(
        float((left.float() * aligned(right.float(), left)).sum())
        for left, right in pairs
        if left is not None and right is not None
    )


def aligned(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the shape of `like`. Raises ConfigError where they differ by more than dimensions of size 1."""
    if [n for n in tensor.shape if n > 1] != [n for n in like.shape if n > 1]:
        raise ConfigError("the adapters have different shapes there: they are for different bases")
    return tensor.reshape(like.shape)


# -- fewer ranks -----------------------------------------------------------------------------

Shortened = tuple[Change, float, float]
"""A change, the squared norm that it lost, and that of the whole, 0 where nothing was cut."""


def cut_down(changes: Mapping[str, tuple[Layer, Change]], cut: Cut) -> dict[str, Shortened]:
    """What `cut` leaves of the changes of some layers; the very same of those that it leaves alone.

    A bias and a norm have no LoRA: a layer whose bias changes keeps its full change. Raises ConfigError naming the
    layer, for a rank that does not divide into groups, and for a tensor whose layer is not known well enough.
    """
    shortened: dict[str, Shortened] = {}
    alike: dict[Hashable, list[str]] = defaultdict(list)
    for name, (layer, change) in changes.items():
        weight = change.weight
        with located(name):
            if isinstance(weight, Product):
                if cut.shortens(weight.rank):
                    of_one_group(cut, weight.sharing)
                    alike[name if cut.dynamic else (weight.up.shape, weight.down.shape, weight.experts)].append(name)
            elif cut != Cut() and weight is not None and weight.ndim > 1 and change.bias is None:
                shortened[name] = _with_losses(*best_of_matrix(weight, cut, layer.groups, *_layout(weight, layer)))
    for names in alike.values():
        with located(", ".join(names)):
            found = shorten([changes[name][1].weight for name in names], cut)  # type: ignore[misc]
        shortened |= {name: _with_losses(*one) for name, one in zip(names, found, strict=True)}
    return {name: shortened.get(name, (change, 0.0, 0.0)) for name, (_, change) in changes.items()}


def _with_losses(product: Product, values: Tensor) -> Shortened:
    squares = values.double().square().sum(0).tolist()  # over groups
    return Change(product), sum(squares[product.down.shape[1] :]), sum(squares)


def _layout(weight: Tensor, layer: Layer) -> tuple[bool, bool]:
    """Whether the weight is that of experts, and of an embedding."""
    if weight.ndim == 3 and layer.kind is None:
        raise ConfigError(
            f"a change of the shape {tuple(weight.shape)} may be of a convolution or of experts: give `bases`, the "
            "weights of the model that the adapters are for"
        )
    return layer.kind == "experts", layer.kind == "embedding"
