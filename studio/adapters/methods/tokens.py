"""Trainable tokens: some rows of an embedding are trained, W[ids] -> rows; peft's TrainableTokens.

dW[ids] = rows - W[ids], and zero elsewhere. The rows themselves are the parameters and go into the file:
a vocabulary that was lengthened with random rows (`resize_token_embeddings`) gets the trained ones
whatever it starts with. Strength s gives (1 - s) W[ids] + s rows.

On a Linear these are rows of the output: an output head gives the tokens' logits. Where one set adapts
an embedding and a head that hold the same tensor (tied), they train the same rows; an embedding alone
leaves its tied head as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio.adapters.base import Adapter, AdapterConfig, read_options
from studio.adapters.layers import LayerSpec, WeightView, wide
from studio.errors import ConfigError


@dataclass(frozen=True)
class TokenOptions:
    """`token_ids`: the rows to train, each once, in 0..vocabulary - 1."""

    token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ConfigError("method 'tokens' needs the option token_ids: the rows of the vocabulary to train")
        if len(set(self.token_ids)) < len(self.token_ids):
            raise ConfigError(f"token_ids names a token twice: {list(self.token_ids)}")


class TrainableTokens(Adapter):
    """`token_rows` (tokens, width), the new rows of the table, and `token_ids` (tokens,), their places."""

    method = "tokens"
    kinds = frozenset({"embedding", "linear"})
    Options = TokenOptions
    needed = frozenset({"token_ids", "token_rows"})
    integers = frozenset({"token_ids"})

    token_ids: Tensor

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        self.register_buffer("token_ids", torch.tensor(sorted(self.options.token_ids)))
        self.token_rows = nn.Parameter(torch.zeros(len(self.token_ids), spec.weight_shape[1]))
        self._table = id(self)  # equal where two adapters sit on one tensor
        self._owner = True

    @classmethod
    def check(cls, spec: LayerSpec, config: AdapterConfig) -> None:
        super().check(spec, config)
        for token in read_options(cls, config.options).token_ids:
            if not 0 <= token < spec.weight_shape[0]:
                raise ConfigError(f"token {token} is not in 0..{spec.weight_shape[0] - 1}, the rows of this layer")
            if token == spec.options.get("padding_idx"):
                raise ConfigError(f"token {token} is the padding, which gets no gradient: leave it out of token_ids")

    @torch.no_grad()
    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        """The rows as they are in the base."""
        self.token_rows.copy_(self._base_rows(weight))
        self._table = id(getattr(weight.target.layer, weight.target.parameter))

    @classmethod
    def share(cls, adapters: Sequence[TrainableTokens], seed: int) -> None:
        """Tied layers train the same rows."""
        owners: dict[tuple[int, tuple[int, ...]], TrainableTokens] = {}
        for adapter in adapters:
            owner = owners.setdefault((adapter._table, tuple(sorted(adapter.options.token_ids))), adapter)
            adapter.token_rows, adapter._owner = owner.token_rows, owner is adapter

    def rates(self) -> Iterator[tuple[nn.Parameter, float]]:
        if self._owner:
            yield from super().rates()

    def _base_rows(self, weight: WeightView) -> Tensor:
        """W[ids] (tokens, width)."""
        name = f"rows {self.options.token_ids}"
        return weight.memo(name, lambda dense: wide(dense[self.token_ids.to(dense.device)]))

    def _delta(self, weight: WeightView) -> Tensor:
        """The rows of dW that are not zero, (tokens, width)."""
        return self.token_rows - self._base_rows(weight)

    def delta_weight(self, weight: WeightView) -> Tensor:
        delta = self._delta(weight)
        return delta.new_zeros(weight.shape).index_add(0, self.token_ids, delta)

    def forward(self, x: Tensor, y: Tensor, base: Tensor | None, weight: WeightView) -> Tensor:
        """Only for the tokens: no table of the vocabulary's size, and no product with one."""
        delta = self.strength * self._delta(weight).to(y.dtype)
        if self.spec.kind == "linear":
            return y.index_add(-1, self.token_ids, F.linear(self.dropped(x).to(y.dtype), delta))
        x = x.long()
        place = torch.searchsorted(self.token_ids, x).clamp_max(len(self.token_ids) - 1)
        place = torch.where(self.token_ids[place] == x, place, len(self.token_ids))
        return y + self.spec.scale * F.embedding(place, F.pad(delta, (0, 0, 0, 1)))  # the last row, of zeros: others

    def export(self) -> dict[str, Tensor]:
        return {"token_ids": self.token_ids, "token_rows": self.token_rows.detach()}

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> TrainableTokens:
        ids, rows = tensors["token_ids"], tensors["token_rows"]
        if ids.ndim != 1 or rows.shape != (len(ids), spec.weight_shape[1]) or ids.is_floating_point():
            raise ConfigError(
                f"the file's {ids.numel()} tokens ({ids.dtype}) have rows {tuple(rows.shape)}; this layer's table is "
                f"{spec.weight_shape}, and the tokens must be integers"
            )
        adapter = cls(spec, AdapterConfig(cls.method, options={"token_ids": ids.tolist()}))
        with torch.no_grad():
            adapter.token_rows.copy_(rows[ids.argsort()])
        return adapter
