"""The adapter contract.

A method is defined by `delta_weight`: dW from W. Everything else (forward, merge, blend, export)
follows from it, and a method overrides `forward` only where an equal path is cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from studio.adapters.dropout import DropoutMasks
from studio.adapters.layers import LayerSpec, WeightView
from studio.adapters.mixed import Rows
from studio.errors import ConfigError, nearest


@dataclass(frozen=True)
class NoOptions:
    """The settings of a method that has none of its own."""


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of one adapter on one layer.

    `rank` >= 1; `alpha` > 0, None meaning the rank; the scale is alpha / rank, or
    alpha / sqrt(rank) with `rslora` (arXiv:2312.03732); `dropout` in [0, 1) on the adapter's input;
    `lr` overrides the run's learning rate; `options` are those of the method (its `Options`).
    """

    method: str = "lora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    lr: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; it must be 1 or more")
        if self.alpha is not None and self.alpha <= 0:
            raise ConfigError(f"alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if self.method not in METHODS:
            raise ConfigError(f"unknown method '{self.method}'.{nearest(self.method, METHODS)}")

    @property
    def scale(self) -> float:
        """What the product of a low-rank method's factors is multiplied with."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


METHODS: dict[str, type[Adapter]] = {}


@dataclass
class Gate:
    """What all adapters of one set share: whether and how strongly they act.

    `rows` holds the samples of a mixed batch that belong to the set; None means all of them.
    """

    strength: float = 1.0
    enabled: bool = True
    merged: bool = False
    rows: Rows | None = None

    @property
    def open(self) -> bool:
        return self.enabled and not self.merged and self.strength != 0


class Adapter(nn.Module):
    """One adapter on one layer. Parameters carry the names that kohya and LyCORIS use on disk."""

    method: ClassVar[str]
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding"})
    """The layer kinds that the method can sit on; `supports` may say more."""
    grouped: ClassVar[bool] = True
    """Whether it can sit on a convolution in groups."""
    Options: ClassVar[type] = NoOptions
    """A frozen dataclass with the method's own settings and their defaults; it checks them itself."""
    needed: ClassVar[frozenset[str]] = frozenset()
    """The suffixes that every file entry of the method has; empty where it is written as another method."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """The suffixes that an entry may have besides."""
    integers: ClassVar[frozenset[str]] = frozenset()
    """Those of them whose tensors hold integers; `alpha` may, all others hold floating-point numbers."""

    spec: LayerSpec
    config: AdapterConfig
    options: Any
    gate: Gate = Gate()
    """Its set's; this one, always open, until it is in a set."""
    factor: float = 1.0
    """The strength of this layer within its set."""
    dropout_masks: DropoutMasks | None = None

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__()
        self.check(spec, config)
        # past nn.Module.__setattr__, which would look for parameters in them at a quarter of the cost of an adapter
        self.__dict__.update(spec=spec, config=config, options=read_options(type(self), config.options))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("method")
        if name is None:
            return
        if name in METHODS:
            raise TypeError(f"method '{name}' is registered twice")
        METHODS[name] = cls

    @classmethod
    def supports(cls, spec: LayerSpec) -> bool:
        """Whether the method can sit on such a layer."""
        return spec.kind in cls.kinds and (cls.grouped or spec.groups == 1)

    @classmethod
    def check(cls, spec: LayerSpec, config: AdapterConfig) -> None:
        """Raises ConfigError where the method cannot sit on the layer with these settings."""
        if not cls.supports(spec):
            raise ConfigError(f"'{cls.method}' cannot adapt a layer of the kind '{spec.kind}' {spec.weight_shape}")
        if config.dropout and (spec.kind == "embedding" or not spec.called):
            raise ConfigError(
                f"dropout acts on a layer's input, and this one ('{spec.kind}') has none: set it to 0 there"
            )

    @property
    def strength(self) -> float:
        """What dW is multiplied with: the set's strength times the layer's."""
        return self.gate.strength * self.factor

    # -- the method ---------------------------------------------------------------------------

    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        """Initialises the parameters from `generator`, so that dW is zero."""
        raise NotImplementedError

    def delta_weight(self, weight: WeightView) -> Tensor:
        """dW at strength 1, of `weight.shape`: the definition of the method."""
        raise NotImplementedError

    def delta_bias(self, weight: WeightView) -> Tensor | None:
        """What the method adds to the bias at strength 1, (out,), or None."""
        return None

    @property
    def low_rank(self) -> bool:
        """Whether `factors` gives dW as a product."""
        return False

    def product(self, weight: WeightView) -> tuple[Tensor, Tensor, float]:
        """(up, down, scale) with dW = scale * up @ down at strength 1, where `low_rank`; shapes as in `factors`."""
        raise NotImplementedError

    def factors(self, weight: WeightView) -> tuple[Tensor, Tensor]:
        """(up, down) with dW = up @ down at strength 1, where `low_rank`: (out, r) and (r, in * kernel)."""
        up, down, scale = self.product(weight)
        return scale * up, down

    def terms(self, weight: WeightView) -> Mapping[str, Tensor] | None:
        """Name -> what to add to the layer's tensor to merge exactly in its quantised format (QA-LoRA), or None."""
        return None

    def forward(self, x: Tensor, y: Tensor, base: Tensor | None, weight: WeightView) -> Tensor:
        """`y` + strength * (op(x, dW) + db).

        `base` is the layer's own output for `x` and `y` that output with what other adapters have
        added; `base` is None where it is not at hand (something is merged into the layer).
        """
        delta = self.delta_weight(weight).to(y.dtype)
        y = y + self.strength * self.spec.apply(self.dropped(x), delta)
        bias = self.delta_bias(weight)
        return y if bias is None else y + self.strength * self.spec.over_outputs(bias.to(y.dtype))

    @property
    def on_input(self) -> bool:
        """Whether the method transforms the layer's input: op(x, dW) = op(`input_delta`(x), W)."""
        return False

    def input_delta(self, x: Tensor) -> Tensor:
        """What an `on_input` method adds to the input, at strength 1: no product with W is needed then."""
        raise NotImplementedError

    def dropped(self, x: Tensor) -> Tensor:
        """`x` with the adapter's input dropout (inverted) while training."""
        if not self.drops:
            return x
        return self.dropout_masks(x, self.config.dropout) / (1 - self.config.dropout)  # type: ignore[misc]

    @property
    def drops(self) -> bool:
        """Whether dropout acts now."""
        return self.training and self.config.dropout > 0 and self.dropout_masks is not None

    # -- training -----------------------------------------------------------------------------

    def rates(self) -> Iterator[tuple[nn.Parameter, float]]:
        """(parameter, factor on the learning rate) for everything that trains."""
        yield from ((parameter, 1.0) for parameter in self.parameters() if parameter.requires_grad)

    @classmethod
    def share(cls, adapters: Sequence[Any], seed: int) -> nn.Module | None:
        """Called once with all adapters of the method in a set: builds what they share, or returns None."""
        return None

    @classmethod
    def penalty(cls, adapters: Sequence[Any]) -> Tensor | None:
        """A term of the loss for all adapters of the method in a set (AdaLoRA's orthogonality), or None."""
        return None

    @classmethod
    def after_step(cls, adapters: Sequence[Any], step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Called after each optimizer step, gradients still there: `step` counts from 0 (AdaLoRA's budget)."""

    # -- files --------------------------------------------------------------------------------

    def export(self) -> dict[str, Tensor]:
        """What goes into a file: on-disk suffix -> tensor."""
        raise NotImplementedError

    @classmethod
    def owns(cls, suffixes: frozenset[str]) -> bool:
        """Whether a file entry with exactly these suffixes is of this method."""
        return bool(cls.needed) and cls.needed <= suffixes <= cls.needed | cls.optional

    @classmethod
    def named(cls, tensors: Mapping[str, Tensor]) -> str:
        """The name of the method of an entry that `owns` gave to this one, where another's look alike."""
        return cls.method

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> Adapter:
        """The adapter of one file entry; raises ConfigError where the shapes do not fit `spec`."""
        raise NotImplementedError


def read_options(method: type[Adapter], options: Mapping[str, Any]) -> Any:
    """The method's `Options` with these values. Raises ConfigError for an unknown one."""
    if not options:
        return _defaults(method.Options)
    known = [one.name for one in fields(method.Options)]
    for key in options:
        if key not in known:
            choices = f" Options: {', '.join(known)}." if known else " It has none."
            raise ConfigError(f"'{method.method}' has no option '{key}'.{nearest(key, known)}{choices}")
    return method.Options(**options)


@cache
def _defaults(options: type) -> Any:
    return options()


def method_of(suffixes: frozenset[str]) -> type[Adapter] | None:
    """The method whose file entries have exactly such suffixes, or None."""
    return next((one for one in METHODS.values() if one.owns(suffixes)), None)
