"""LoHa and LoKr as PEFT has them: LyCORIS's tensors, in shapes that PEFT works out itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from studio.adapters.methods.lokr import factorization
from studio.errors import ConfigError
from studio.formats.peft.forms import Entry, Layers, PeftMethod
from studio.formats.peft.settings import Config, kernel_of, own_value, plain, single, varying
from studio.formats.reading import ALPHA


class LyCORISForm(PeftMethod):
    """What LoHa and LoKr share: LyCORIS's own tensors and scale, ranks and alphas by layer."""

    def rank(self, entry: Entry) -> int:
        """The rank that PEFT must be told."""
        raise NotImplementedError

    def alpha(self, entry: Entry) -> float:
        """The alpha that gives the entry's scale with that rank."""
        return float(entry[ALPHA]) if ALPHA in entry else self.rank(entry)

    def settings(self, layers: Layers) -> dict[str, Any]:
        return {
            **varying("r", "rank_pattern", {path: self.rank(entry) for path, entry in layers.items()}),
            **varying("alpha", "alpha_pattern", {path: plain(self.alpha(entry)) for path, entry in layers.items()}),
        }

    def from_peft(self, path: str, tensors: Entry, config: Config) -> dict[str, Tensor]:
        entry = super().from_peft(path, tensors, config)
        alpha = own_value(path, "alpha", "alpha_pattern", config, self.rank(entry))
        return {**entry, ALPHA: torch.tensor(float(alpha))}


class LoHaForm(LyCORISForm):
    """LyCORIS's layout to the letter; the Tucker form for all kernels or for none."""

    peft_type = "LOHA"
    suffixes = {name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")}

    def rank(self, entry: Entry) -> int:
        return len(entry["hada_w1_b"])

    def settings(self, layers: Layers) -> dict[str, Any]:
        kernels = ["hada_t1" in entry for path, entry in layers.items() if kernel_of(path) > 1]
        return {**super().settings(layers), "use_effective_conv2d": single("use_effective_conv2d", kernels or [False])}


class LoKrForm(LyCORISForm):
    """LyCORIS's layout, with factors that PEFT sizes itself: from one factor, the rank and two switches.

    PEFT multiplies with alpha / r where both factors are full, LyCORIS does not: there, alpha is r, and what PEFT
    multiplies with is in W1 when it is read.
    """

    peft_type = "LOKR"
    suffixes = {
        name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    }

    def rank(self, entry: Entry) -> int:
        for low_rank in ("lokr_w2_b", "lokr_w1_b"):
            if low_rank in entry:
                return len(entry[low_rank])
        least = math.ceil(max(*entry["lokr_w1"].shape, *entry["lokr_w2"].shape[:2]) / 2)
        alpha = float(entry.get(ALPHA, 0))
        half = max(entry["lokr_w2"].shape[:2]) / 2
        return int(alpha) if alpha.is_integer() and alpha >= half else least

    def alpha(self, entry: Entry) -> float:
        return self.rank(entry) if {"lokr_w1", "lokr_w2"} <= entry.keys() else super().alpha(entry)

    def from_peft(self, path: str, tensors: Entry, config: Config) -> dict[str, Tensor]:
        entry = super().from_peft(path, tensors, config)
        rank = own_value(path, "r", "rank_pattern", config, 8)  # PEFT's default
        if {"lokr_w1", "lokr_w2"} <= entry.keys() and float(entry[ALPHA]) != rank:
            entry["lokr_w1"] = entry["lokr_w1"] * (float(entry[ALPHA]) / rank)
            entry[ALPHA] = torch.tensor(float(rank))
        return entry

    def settings(self, layers: Layers) -> dict[str, Any]:
        switches = {
            "decompose_both": any("lokr_w1_a" in entry for entry in layers.values()),
            "use_effective_conv2d": any("lokr_t2" in entry for entry in layers.values()),
        }
        sizes = {path: self._sizes(path, entry) for path, entry in layers.items()}
        for factor in (-1, *sorted({size for pairs in sizes.values() for size in pairs[0]})):
            if all(
                self._names(path, sizes[path], factor, self.rank(entry), **switches) == entry.keys() - {ALPHA}
                for path, entry in layers.items()
            ):
                return {**super().settings(layers), "decompose_factor": factor, **switches}
        raise ConfigError("a LoKr whose factors are not those of one decompose_factor")

    def _sizes(self, path: str, entry: Entry) -> tuple[tuple[int, int], tuple[int, int]]:
        """((a, c), (b, d)): how W1 (a, b) and W2 (c, d) divide outputs and inputs."""
        tucker = "lokr_t2" in entry
        a = entry["lokr_w1" if "lokr_w1" in entry else "lokr_w1_a"].shape[0]
        b = entry["lokr_w1" if "lokr_w1" in entry else "lokr_w1_b"].shape[1]
        if "lokr_w2" in entry:
            c, d = entry["lokr_w2"].shape[:2]
        else:
            c = entry["lokr_w2_a"].shape[1 if tucker else 0]
            d = entry["lokr_w2_b"].shape[1] // (1 if tucker else kernel_of(path))
        return (a, c), (b, d)

    def _names(
        self,
        path: str,
        sizes: tuple[tuple[int, int], tuple[int, int]],
        factor: int,
        rank: int,
        decompose_both: bool,
        use_effective_conv2d: bool,
    ) -> set[str]:
        """The tensors that PEFT makes for a layer of these sizes; none where `factor` divides it otherwise."""
        (a, c), (b, d) = sizes
        if _divided(a * c, factor) != (a, c) or _divided(b * d, factor) != (b, d):
            return set()
        names = {"lokr_w1_a", "lokr_w1_b"} if decompose_both and rank < max(a, b) / 2 else {"lokr_w1"}
        if rank >= max(c, d) / 2:
            return names | {"lokr_w2"}
        tucker = use_effective_conv2d and kernel_of(path) > 1
        return names | {"lokr_w2_a", "lokr_w2_b"} | ({"lokr_t2"} if tucker else set())


def _divided(size: int, factor: int) -> tuple[int, int]:
    """`factorization` as PEFT has it: a factor that divides is the first part, whether or not it is the smaller."""
    return (factor, size // factor) if factor > 0 and size % factor == 0 else factorization(size, factor)
