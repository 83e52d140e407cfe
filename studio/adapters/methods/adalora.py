"""AdaLoRA: dW = scale * up @ diag(e) @ down, the rank going where it matters (Zhang et al. 2023, arXiv:2303.10512).

Every weight's sensitivity I = |w dL/dw| is smoothed, Ibar <- b1 Ibar + (1 - b1) I, as is its uncertainty,
U <- b2 U + (1 - b2) |I - Ibar|. A triplet (a column of up, an e, a row of down) scores
Ibar U of its e plus the means of Ibar U over its two vectors, and a budget that falls with the cube of the
time decides how many triplets of all layers together keep their e. Formulas and schedule are peft's.

A masked triplet trains on and may come back. After `patience` budget steps in a row, or when the final
phase begins, it leaves for good: its e is zero then, so that dW stays, while parameters and the
optimizer's state shrink. A layer keeps one triplet, masked if need be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from studio.adapters.base import AdapterConfig
from studio.adapters.layers import LayerSpec, WeightView
from studio.adapters.lowrank import LowRank, down_shape, up_shape
from studio.adapters.optimizer_state import check_replaceable, replace_parameter
from studio.errors import ConfigError


@dataclass(frozen=True)
class AdaLoRAOptions:
    """`target_rank`: the mean rank in the end, None meaning two thirds of the first, as in the paper.

    Steps 0..`tinit` keep every triplet, the last `tfinal` of `total_steps` train what is left, and each
    `delta_t`-th step between them is a budget step. `patience`: the budget steps in a row after which a
    masked triplet leaves; None: only when the final phase begins, which is peft's schedule exactly.
    `beta1` and `beta2` in (0, 1) smooth; `orth_reg_weight` multiplies the orthogonality penalty.
    """

    target_rank: int | None = None
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    total_steps: int | None = None
    patience: int | None = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (("target_rank", 1), ("tinit", 0), ("tfinal", 0), ("delta_t", 1), ("patience", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be {least} or more")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")
        if self.orth_reg_weight < 0:
            raise ConfigError(f"orth_reg_weight is {self.orth_reg_weight}; it must be 0 or more")
        if self.total_steps is not None and self.tinit >= self.total_steps - self.tfinal:
            raise ConfigError(
                f"tinit {self.tinit} and tfinal {self.tfinal} leave none of the {self.total_steps} steps to "
                "lower the rank in: decrease them, or train for longer"
            )

    @property
    def final_step(self) -> int:
        """The step at which the ranks are settled. Raises ConfigError without `total_steps`."""
        if self.total_steps is None:
            raise ConfigError("AdaLoRA's budget follows the length of the training: set its option total_steps")
        return self.total_steps - self.tfinal

    def budget(self, step: int, first: int, last: int) -> int:
        """How many triplets keep their e at a step in tinit..final_step, from `first` down to `last`."""
        left = 1 - (step - self.tinit) / (self.final_step - self.tinit)
        return int((first - last) * left**3 + last)


_RANK_DIMS = {"lora_down": 0, "lora_up": 1, "lora_e": 0}  # the parameters of a triplet


class AdaLoRA(LowRank):
    """LoRA's factors with a diagonal, `lora_e` (rank, 1), between them. Written to files exactly as a LoRA."""

    method = "adalora"
    grouped = False
    Options = AdaLoRAOptions
    rank_dims = {
        f"{name}{statistic}": dim
        for name, dim in _RANK_DIMS.items()
        for statistic in ("", "_sensitivity", "_uncertainty")
    } | {"masked": 0}

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        self.lora_down = nn.Parameter(torch.zeros(down_shape(spec, config.rank)))
        self.lora_up = nn.Parameter(torch.zeros(up_shape(spec, config.rank)))
        self.lora_e = nn.Parameter(torch.zeros(config.rank, 1))
        for name in _RANK_DIMS:
            self.register_buffer(f"{name}_sensitivity", torch.zeros_like(getattr(self, name)))
            self.register_buffer(f"{name}_uncertainty", torch.zeros_like(getattr(self, name)))
        self.register_buffer("masked", torch.zeros(config.rank, dtype=torch.int64))  # budget steps in a row

    @classmethod
    def check(cls, spec: LayerSpec, config: AdapterConfig) -> None:
        super().check(spec, config)
        target = config.options.get("target_rank")
        if target is not None and target > config.rank:
            raise ConfigError(f"target_rank {target} is above the rank {config.rank} to start from")

    @property
    def target_rank(self) -> int:
        """This layer's share of the last budget."""
        return self.options.target_rank or max(1, round(self.config.rank * 2 / 3))

    @torch.no_grad()
    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        """N(0, 0.02) factors and e = 0, as in peft."""
        self.lora_down.normal_(0, 0.02, generator=generator)
        self.lora_up.normal_(0, 0.02, generator=generator)
        self.lora_e.zero_()

    @property
    def scale(self) -> float:
        """alpha / (rank + 1e-5) of the first rank, which it keeps; alpha / sqrt(rank) like that with rsLoRA."""
        return super().scale * self.config.rank / (self.config.rank + 1e-5)

    def down_weight(self) -> Tensor:
        return self.lora_down

    def up_weight(self) -> Tensor:
        return self.lora_up * self.lora_e.reshape(1, -1, *(1,) * self.spec.dims)  # (out, rank[, 1...])

    def export(self) -> dict[str, Tensor]:
        """e folded into `lora_up`; triplets with e = 0 add nothing and are left out, but for one.

        Layers end with ranks of their own, and get one alpha all the same, since diffusers misreads a file
        with several: the rest of the scale is in `lora_up`.
        """
        places = self.lora_e.flatten().nonzero().flatten()
        places = places if len(places) else places.new_zeros(1)
        alpha = float(self.config.rank if self.config.alpha is None else self.config.alpha)
        return {
            "lora_down.weight": self.lora_down.detach()[places],
            "lora_up.weight": self.up_weight().detach()[:, places] * (self.scale * len(places) / alpha),
            "alpha": torch.tensor(alpha),
        }

    # -- importance ---------------------------------------------------------------------------

    def observe(self) -> None:
        """Smooths sensitivity and uncertainty with the gradients at hand; none counts as zero."""
        for name in _RANK_DIMS:
            parameter = getattr(self, name)
            now = torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs()
            sensitivity = getattr(self, f"{name}_sensitivity").lerp_(now, 1 - self.options.beta1)
            getattr(self, f"{name}_uncertainty").lerp_((now - sensitivity).abs(), 1 - self.options.beta2)

    def scores(self) -> Tensor:
        """The importance of each triplet, (rank,)."""
        down, up, e = (
            getattr(self, f"{name}_sensitivity") * getattr(self, f"{name}_uncertainty") for name in _RANK_DIMS
        )
        return e.flatten() + (down.flatten(1).mean(1) + up.flatten(1).mean(0))

    def mask(self, low: Tensor) -> None:
        """Masks the triplets where `low` (rank,) says so, and frees the others."""
        self.masked.copy_(torch.where(low, self.masked + 1, 0))
        self.lora_e.masked_fill_(self.masked[:, None] > 0, 0)

    def prune(self, gone: Tensor, optimizer: Optimizer | None) -> None:
        """Takes the triplets where `gone` (rank,) says so out of the parameters, the statistics and the optimizer."""
        places = (~gone).nonzero().flatten()
        if len(places) == 0:  # a LoRA has a rank of 1 or more
            places = self.scores().argmax()[None]
        if len(places) == len(gone):
            return
        for name, dim in self.rank_dims.items():
            kept = partial(torch.index_select, dim=dim, index=places)
            tensor = getattr(self, name)
            if isinstance(tensor, nn.Parameter):
                replace_parameter(tensor, kept(tensor.data), optimizer, kept)
            else:
                setattr(self, name, kept(tensor))

    # -- all layers together ------------------------------------------------------------------

    @classmethod
    def share(cls, adapters: Sequence[AdaLoRA], seed: int) -> None:
        """Nothing but the budget, whose schedule must be one."""
        schedules = {replace(one.options, target_rank=None) for one in adapters}
        if len(schedules) > 1:
            raise ConfigError("AdaLoRA's layers share one budget: only target_rank may differ between them")

    @classmethod
    def penalty(cls, adapters: Sequence[AdaLoRA]) -> Tensor | None:
        """`orth_reg_weight` times the mean of |up^T up - 1| and |down down^T - 1| (Frobenius norms) over all layers."""
        weight = adapters[0].options.orth_reg_weight
        if not weight:
            return None
        vectors = [one.lora_down.flatten(1) for one in adapters] + [one.lora_up.flatten(1).T for one in adapters]
        norms = [(rows @ rows.T - torch.eye(len(rows)).to(rows)).norm() for rows in vectors]
        return weight * torch.stack([norm.to(norms[0].device) for norm in norms]).mean()

    @classmethod
    @torch.no_grad()
    def after_step(cls, adapters: Sequence[AdaLoRA], step: int, optimizer: Optimizer | None) -> None:
        """Scores, masks and prunes.

        Raises ConfigError without `total_steps`, and as `check_replaceable` does.
        """
        options = adapters[0].options
        final = options.final_step
        if step == 0:
            for one in adapters:
                for parameter in one.parameters():
                    check_replaceable(parameter, optimizer)
        if step < final:
            for one in adapters:
                one.observe()
        if step == final or (options.tinit < step < final and step % options.delta_t == 0):
            cls._allocate(adapters, step, optimizer)
        elif step > final:
            for one in adapters:
                one.lora_e.masked_fill_(one.masked[:, None] > 0, 0)

    @classmethod
    def _allocate(cls, adapters: Sequence[AdaLoRA], step: int, optimizer: Optimizer | None) -> None:
        """A budget step: the least important triplets lose their e, and some of them leave."""
        options = adapters[0].options
        scores = [one.scores() for one in adapters]
        everything = torch.cat([one.cpu() for one in scores])
        budget = options.budget(
            step, sum(one.config.rank for one in adapters), sum(one.target_rank for one in adapters)
        )
        excess = len(everything) - budget
        threshold = float(everything.kthvalue(excess).values) if excess > 0 else -1.0
        patience = 1 if step == options.final_step else options.patience
        for one, score in zip(adapters, scores, strict=True):
            one.mask(score <= threshold)
            if patience is not None:
                one.prune(one.masked >= patience, optimizer)
