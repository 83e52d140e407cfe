"""VeRA and RandLoRA as PEFT has them: with frozen random matrices that all layers of a component share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from studio.adapters.methods.randlora import Bases
from studio.adapters.methods.vera import Projections
from studio.adapters.projections import read_projection
from studio.errors import ConfigError
from studio.formats.peft.forms import Entry, Layers, PeftMethod
from studio.formats.peft.settings import Config, plain, single
from studio.formats.reading import ALPHA


class ProjectedForm(PeftMethod):
    """VeRA and RandLoRA: the frozen matrices that a component's layers share are written out.

    PEFT sizes them by the largest layers of the component, and refuses others. Ours follow from a seed and these
    sizes: matrices in a file that do not cannot be read.
    """

    ours: ClassVar[str]  # the entry that holds the seed and the sizes
    make: ClassVar[Callable[..., nn.Module]]

    def rank(self, entry: Entry) -> int:
        """The rank, which all layers share."""
        raise NotImplementedError

    def settings(self, layers: Layers) -> dict[str, Any]:
        numbers = single("the size of the shared matrices", [tuple(one[self.ours].tolist()) for one in layers.values()])
        rank = single("r", [self.rank(entry) for entry in layers.values()])
        return {"r": rank, "projection_prng_key": numbers[0], "save_projection": True}

    def shared(self, layers: Layers) -> dict[str, Tensor]:
        entry = next(iter(layers.values()))
        return self._matrices(self.rank(entry), *entry[self.ours].tolist())

    def _matrices(self, rank: int, seed: int, *sizes: int) -> dict[str, Tensor]:
        read_projection(torch.tensor([seed, *sizes]), rank)  # refuses sizes that no machine could make
        made = type(self).make(seed, rank, *sizes)
        return dict(zip(sorted(self.shared_keys), made.buffers(), strict=True))

    def from_peft(self, path: str, tensors: Entry, config: Config) -> dict[str, Tensor]:
        numbers = [config["projection_prng_key"], *config["sizes"]]
        return {**super().from_peft(path, tensors, config), self.ours: torch.tensor(numbers)}

    def with_shared(self, found: Entry, config: Config) -> Config:
        """Raises ConfigError for matrices that are not those of the seed: only the seed is kept."""
        first, second = (found.get(key) for key in sorted(self.shared_keys))
        if first is None or second is None:
            raise ConfigError(f"{self.peft_type} without its projections: save it in peft with save_projection=True")
        if len(first) != config["r"]:
            raise ConfigError(f"{self.peft_type} with projections of the rank {len(first)}, and r {config['r']}")
        sizes = first.shape[-1], second.shape[0]
        expected = self._matrices(config["r"], config["projection_prng_key"], *sizes)
        own = {key: expected[f"base_model.{key.rpartition('.')[2]}"] for key in found}
        if any(not torch.equal(found[key].float(), tensor) for key, tensor in own.items()):
            raise ConfigError(f"{self.peft_type} with projections that are not those of its projection_prng_key")
        return {**config, "sizes": sizes}


class VeRAForm(ProjectedForm):
    """No scale."""

    peft_type = "VERA"
    suffixes = {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}
    shared_keys = frozenset({"base_model.vera_A", "base_model.vera_B"})
    ours, make = "vera_projection", Projections

    def rank(self, entry: Entry) -> int:
        return len(entry["vera_lambda_d"])


class RandLoRAForm(ProjectedForm):
    """One alpha for all layers."""

    peft_type = "RANDLORA"
    suffixes = {"randlora_lambda": "randlora_lambda", "randlora_gamma": "randlora_gamma"}
    shared_keys = frozenset({"base_model.randlora_A", "base_model.randlora_B"})
    ours, make = "randlora_projection", Bases

    def rank(self, entry: Entry) -> int:
        return len(entry["randlora_lambda"])

    def settings(self, layers: Layers) -> dict[str, Any]:
        alphas = [plain(float(one.get(ALPHA, self.rank(one)))) for one in layers.values()]
        return {**super().settings(layers), "randlora_alpha": single("randlora_alpha", alphas)}

    def from_peft(self, path: str, tensors: Entry, config: Config) -> dict[str, Tensor]:
        return {**super().from_peft(path, tensors, config), ALPHA: torch.tensor(float(config["randlora_alpha"]))}
