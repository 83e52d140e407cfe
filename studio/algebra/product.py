"""dW as a product of factors: sums, and the best approximations of a smaller rank.

A sum of products is the product of the factors side by side, exactly, with the sum of the ranks. The best
approximation of a smaller rank (Eckart-Young) comes from the factors too, never from the full matrix:
U D = (Qu Ru)(Qd Rd)^T = Qu (Ru Rd^T) Qd^T, whose singular values are those of the small Ru Rd^T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from studio.algebra.cut import Cut
from studio.errors import ConfigError


@dataclass(frozen=True)
class Product:
    """dW = scale * up @ down, for each group of a convolution and for each expert, once for other layers.

    `up` is (groups, out, rank), `down` (groups, rank, n) with n = in * kernel, of the shape `inner`, both in
    the file's dtype: whoever computes with them widens them. Groups share the rank of a LoRA, `experts` have
    it each. An `embedding`'s dW is stored transposed, (vocabulary, width).
    """

    up: Tensor
    down: Tensor
    inner: tuple[int, ...]
    scale: float = 1.0
    experts: bool = False
    embedding: bool = False

    @property
    def sharing(self) -> int:
        """How many groups share the rank."""
        return 1 if self.experts else len(self.down)

    @property
    def rank(self) -> int:
        """The rank as a file states it."""
        return self.down.shape[1] * self.sharing

    @property
    def size(self) -> int:
        """The number of entries of dW."""
        return self.up.shape[0] * self.up.shape[1] * self.down.shape[2]

    def entry(self) -> dict[str, Tensor]:
        """A LoRA's, as in a file; alpha / rank is the scale."""
        down, up = self.down, self.up
        if not self.experts:
            down = down.reshape(self.rank, *self.inner)
            up = up.reshape(-1, up.shape[2], *(1,) * (len(self.inner) - 1))  # (out, rank / groups, 1, ...)
        tensors = {"lora_down.weight": down.contiguous(), "lora_up.weight": up.contiguous()}
        return {**tensors, "alpha": torch.tensor(float(self.scale * self.rank))}

    def to(self, dtype: torch.dtype) -> Product:
        """The same product with factors of `dtype`."""
        return replace(self, up=self.up.to(dtype), down=self.down.to(dtype))

    def dense(self) -> Tensor:
        """dW in the shape of the layer's weight, in fp32."""
        delta = self.scale * (self.up.float() @ self.down.float())  # (groups, out, n)
        if self.experts:
            return delta
        return delta[0].T if self.embedding else delta.reshape(-1, *self.inner)

    def rows(self, number: int) -> Tensor:
        """Up to `number` evenly spaced rows of each group's dW, (groups, rows, n)."""
        every = -(-self.up.shape[1] // number)
        return self.scale * self.up[:, ::every].float() @ self.down.float()

    def inner_product(self, other: Product) -> float:
        """The sum of the products of the entries of both dW, through the factors; errors as for `concat`."""
        _check_alike([self, other])
        left = self.up.float().mT @ other.up.float()  # (groups, rank, other's rank)
        right = self.down.float() @ other.down.float().mT
        return self.scale * other.scale * float((left.double() * right.double()).sum())


def concat(products: Sequence[Product], weights: Sequence[float]) -> Product:
    """The exact weighted sum, in fp32 and of scale 1: ranks add up. Raises ConfigError for different shapes."""
    _check_alike(products)
    first = products[0]
    ranks = [one.down.shape[1] for one in products]
    up = torch.empty(*first.up.shape[:2], sum(ranks), device=first.up.device)
    for part, one, weight in zip(up.split(ranks, dim=2), products, weights, strict=True):
        part.copy_(one.up).mul_(weight * one.scale)
    down = torch.empty(len(first.down), sum(ranks), first.down.shape[2], device=first.down.device)
    for part, one in zip(down.split(ranks, dim=1), products, strict=True):
        part.copy_(one.down)
    return replace(first, up=up, down=down, scale=1.0)


def _check_alike(products: Sequence[Product]) -> None:
    """Raises ConfigError for changes of different shapes."""
    first = products[0]
    if any(one.up.shape[:2] != first.up.shape[:2] or one.down.shape[2] != first.down.shape[2] for one in products):
        raise ConfigError("the adapters have different shapes there: they are for different bases")


def shorten(products: Sequence[Product], cut: Cut) -> list[tuple[Product, Tensor]]:
    """(the best product that `cut` asks for, of scale 1, all singular values (groups, up to the rank)) of each.

    All have the same shapes, and are computed at once; they get the same rank, that of the one that needs most.
    """
    own = of_one_group(cut, products[0].sharing)
    up = torch.stack([one.up.float() if one.scale == 1 else one.scale * one.up.float() for one in products])
    down = torch.stack([one.down.float() for one in products])  # (products, groups, rank, n)
    up, down, values = best_product(up, down, lambda found: max(map(own.keeps, found)))
    shortened = zip(products, up, down, values, strict=True)
    return [(replace(one, up=ups, down=downs, scale=1.0), found) for one, ups, downs, found in shortened]


def best_of_matrix(
    weight: Tensor, cut: Cut, groups: int = 1, experts: bool = False, embedding: bool = False
) -> tuple[Product, Tensor]:
    """The same for a full `weight`: (out, in, *kernel), (vocabulary, width) or (experts, out, in)."""
    matrix = weight.T if embedding else weight
    stacked = matrix if experts else matrix.reshape(groups, len(matrix) // groups, -1)  # (groups, out, n)
    own = of_one_group(cut, 1 if experts else groups)
    left, values, right = _svd(stacked.float())
    up, down = _balanced(left, values, right, own.keeps(values))
    return Product(up, down, tuple(matrix.shape[2 if experts else 1 :]), experts=experts, embedding=embedding), values


def of_one_group(cut: Cut, sharing: int) -> Cut:
    """`cut` for each of the groups that share its rank. Raises ConfigError where it does not divide."""
    if cut.rank is None or sharing == 1:
        return cut
    if cut.rank % sharing:
        raise ConfigError(f"rank {cut.rank} does not divide into the {sharing} groups of a convolution")
    return replace(cut, rank=cut.rank // sharing)


def best_product(up: Tensor, down: Tensor, rank: int | Callable[[Tensor], int]) -> tuple[Tensor, Tensor, Tensor]:
    """(up, down, singular values) with up @ down the best approximation of `rank` to the given one.

    `up` is (..., out, r) and `down` (..., r, n); the singular values (..., up to r) are those of the whole
    product, and both factors take their square roots. `rank` may be a function of them.
    """
    with one_thread():
        outer, up_core = torch.linalg.qr(up)
        inner, down_core = torch.linalg.qr(down.mT)
        left, values, right = _svd(up_core @ down_core.mT)
        up, down = _balanced(left, values, right, rank if isinstance(rank, int) else rank(values))
        return outer @ up, down @ inner.mT, values


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(left, singular values, right). Raises ConfigError for factors whose product leaves fp32."""
    if not matrix.isfinite().all():
        raise ConfigError("the values are too large to compute with: the file is damaged, or its training diverged")
    return torch.linalg.svd(matrix, full_matrices=False)


def _balanced(left: Tensor, values: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first `rank` of an SVD as two factors that share the singular values."""
    root = values[..., :rank].sqrt()
    return left[..., :rank] * root[..., None, :], root[..., None] * right[..., :rank, :]


@contextmanager
def one_thread() -> Iterator[None]:
    """Work on narrow matrices gains little from threads, and loses a hundredfold where other programs use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
