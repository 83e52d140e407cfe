"""Hot swapping: another adapter into fixed slots, without `torch.compile` compiling again.

A slot is a LoRA of a fixed rank and scale 1. An adapter with dW = up @ down is written into it in place: its
scale and strength go into `lora_up`, and ranks and layers that it does not have are zero. Shapes, hooks and
settings stay, and these are all that a compiled graph depends on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from studio.adapters.adapter_set import AdapterSet
from studio.adapters.base import AdapterConfig
from studio.adapters.inject import adapter_of_entry
from studio.adapters.layers import WeightView
from studio.adapters.methods.lora import LoRA
from studio.adapters.targets import AdapterPlan, Roles, match_targets
from studio.errors import ConfigError


class HotSwapSlot(AdapterSet):
    """Room for one adapter at a time on the layers of `targets`, attached, empty at first, not trainable.

    `targets` are patterns as in `AdapterPlan`; `rank` is the highest that will be loaded. Every call pays for
    the whole rank, whatever is loaded. Attach all slots before compiling.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], targets: Iterable[str], rank: int, roles: Roles | None = None
    ) -> None:
        plan = AdapterPlan(tuple(targets), config=AdapterConfig("lora", rank))
        chosen = match_targets(modules, plan, roles or {})
        slots = {name: LoRA(target.spec, config).to(target.device) for name, (target, config) in chosen.items()}
        super().__init__({name: target for name, (target, _) in chosen.items()}, slots)
        self.rank = rank
        self.requires_grad_(False).eval()
        self.attach()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], strength: float = 1.0) -> None:
        """Replaces what the slot holds by an adapter: `tensors` as in `AdapterSet.state`.

        Raises ConfigError, and changes nothing, for layers that the slot does not have, a rank above the
        slot's, or a method whose dW is not a product of two factors.
        """
        missing = [name for name in tensors if name not in self.targets]
        if missing:
            raise ConfigError(
                f"{len(missing)} of the adapter's {len(tensors)} layers are not in the slot: "
                f"{', '.join(missing[:5])}. Make the slot with these targets too."
            )
        factors = {name: self._factors(name, entry) for name, entry in tensors.items()}
        wide = {name: len(down) for name, (_, down) in factors.items() if len(down) > self.rank}
        if wide:
            named = ", ".join(f"{name} ({rank})" for name, rank in list(wide.items())[:5])
            raise ConfigError(
                f"{len(wide)} layers have a rank above the slot's {self.rank}: {named}. "
                f"Make the slot with rank {max(wide.values())}."
            )
        self.clear()
        for name, slot in self.items():
            if name in factors:
                up, down = factors[name]
                slot.lora_up[:, : len(down)] = strength * up.reshape(len(up), -1, *slot.lora_up.shape[2:])
                slot.lora_down[: len(down)] = down.reshape(-1, *slot.lora_down.shape[1:])

    @torch.no_grad()
    def clear(self) -> None:
        """Empties the slot: the model is the base."""
        for slot in self.adapters:
            slot.lora_up.zero_()
            slot.lora_down.zero_()

    def _factors(self, name: str, entry: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(up (out, r), down (r, in * kernel)) of one layer's file entry."""
        target = self.targets[name]
        adapter = adapter_of_entry(target, entry)
        if not adapter.low_rank:
            raise ConfigError(
                f"{name}: '{adapter.method}' on this layer is no product of two factors: attach it instead"
            )
        return adapter.factors(WeightView(target))
