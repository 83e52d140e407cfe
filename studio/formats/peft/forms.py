"""PEFT's forms of one layer's tensors; each with what its configuration must say of all layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from studio.errors import ConfigError
from studio.formats.peft.settings import Config, is_embedding, kernel_of, own_value, plain, single, varying
from studio.formats.reading import ALPHA, DOWN, MAGNITUDE, UP

Entry = Mapping[str, Tensor]
Layers = Mapping[str, Entry]  # module path below the component -> suffix -> tensor


class PeftMethod:
    """One of PEFT's methods: what it names our tensors, and what its configuration says besides them."""

    peft_type: ClassVar[str]
    suffixes: ClassVar[Mapping[str, str]]
    """PEFT's name of a tensor -> ours."""
    shared_keys: ClassVar[frozenset[str]] = frozenset()
    """Of the tensors that all layers share, the whole keys; layers may hold copies of them under the last name."""

    def settings(self, layers: Layers) -> dict[str, Any]:
        """The configuration's fields; raises ConfigError, in words that follow "cannot hold", where none fits."""
        return {}

    def to_peft(self, path: str, entry: Entry) -> dict[str, Tensor]:
        """PEFT's tensors of one layer."""
        return {theirs: entry[ours] for theirs, ours in self.suffixes.items() if ours in entry}

    def from_peft(self, path: str, tensors: Entry, config: Config) -> dict[str, Tensor]:
        """The inverse of `to_peft`, with what the configuration knows."""
        return {self.suffixes[theirs]: tensor for theirs, tensor in tensors.items()}

    def shared(self, layers: Layers) -> dict[str, Tensor]:
        """Tensors that all layers share, by their whole key."""
        return {}

    def with_shared(self, found: Entry, config: Config) -> Config:
        """The configuration with what `from_peft` needs to know of a file's shared tensors."""
        return config


class LowRankForm(PeftMethod):
    """LoRA and DoRA. An embedding's factors have names of their own."""

    peft_type = "LORA"
    suffixes = {
        "lora_A.weight": DOWN,
        "lora_B.weight": UP,
        "lora_magnitude_vector": MAGNITUDE,
        "lora_embedding_A": DOWN,
        "lora_embedding_B": UP,
    }

    def settings(self, layers: Layers) -> dict[str, Any]:
        for path, entry in layers.items():
            if MAGNITUDE in entry and is_embedding(path):
                raise ConfigError(f"a DoRA of an embedding, {path}")
            if MAGNITUDE in entry and entry[MAGNITUDE].shape[0] != entry[UP].shape[0]:
                raise ConfigError(f"a DoRA with a magnitude for each input channel, {path}")
        if len({MAGNITUDE in entry for entry in layers.values()}) > 1:
            raise ConfigError("'lora' and 'dora' in one component")
        return {
            **varying("r", "rank_pattern", {path: entry[DOWN].shape[0] for path, entry in layers.items()}),
            **varying("lora_alpha", "alpha_pattern", {path: plain(float(one[ALPHA])) for path, one in layers.items()}),
            "use_dora": any(MAGNITUDE in entry for entry in layers.values()),
        }

    def to_peft(self, path: str, entry: Entry) -> dict[str, Tensor]:
        if is_embedding(path):
            return {"lora_embedding_A": entry[DOWN], "lora_embedding_B": entry[UP]}
        tensors = {"lora_A.weight": entry[DOWN], "lora_B.weight": entry[UP]}
        if MAGNITUDE in entry:
            tensors["lora_magnitude_vector"] = magnitude_to_peft(entry[MAGNITUDE])
        return tensors

    def from_peft(self, path: str, tensors: Entry, config: Config) -> dict[str, Tensor]:
        start = str(config.get("init_lora_weights", True))
        if config.get("use_qalora") or start.startswith(_MOVED_BASES):
            raise ConfigError(f"a LoRA (init_lora_weights: {start}) for a base that peft has changed: convert it there")
        entry = super().from_peft(path, tensors, config)
        if MAGNITUDE in entry:
            entry[MAGNITUDE] = magnitude_from_peft(entry[MAGNITUDE])
        return {**entry, ALPHA: alpha_of(path, entry[DOWN].shape[0], config)} if DOWN in entry else entry


_MOVED_BASES = ("pissa", "olora", "corda", "lora_ga", "loftq")  # their product starts as a part of the base


def magnitude_to_peft(scale: Tensor) -> Tensor:
    """A `dora_scale` (out, 1) as PEFT's (out,), and that of a convolution (out, 1, ...) as (1, out, 1, ...)."""
    return scale.flatten() if scale.ndim == 2 else scale.transpose(0, 1)


def magnitude_from_peft(vector: Tensor) -> Tensor:
    """The inverse of `magnitude_to_peft`."""
    return vector[:, None] if vector.ndim == 1 else vector.transpose(0, 1)


def alpha_of(path: str, rank: int, config: Config) -> Tensor:
    """A layer's alpha under a `LoraConfig`; with rsLoRA, the alpha that gives its scale as alpha / rank."""
    alpha = own_value(path, "lora_alpha", "alpha_pattern", config, rank)
    return torch.tensor(float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1))


_WITHOUT_BIAS = re.compile(
    r".+\.attentions\.\d+\.transformer_blocks\.\d+\.attn[12]\.to_[qkv]|encoder\.block\..+|text_projection"
)


class IA3Form(PeftMethod):
    """PEFT's gate is 1 + ours, here in float64, in which the sum loses nothing, and acts on the output's bias too."""

    peft_type = "IA3"
    suffixes = {"ia3_l": "weight"}

    def settings(self, layers: Layers) -> dict[str, Any]:
        for path, entry in layers.items():
            if is_embedding(path):
                raise ConfigError(f"an IA3 of an embedding, {path}")
            if not entry["on_input"] and "on_bias" not in entry and not _WITHOUT_BIAS.fullmatch(path):
                raise ConfigError(f"an IA3 that gates outputs without their bias, {path}")
        gates = [re.escape(path) for path, entry in layers.items() if entry["on_input"]]
        return {"feedforward_modules": "|".join(gates) if gates else []}  # PEFT's lists match any end of a path

    def to_peft(self, path: str, entry: Entry) -> dict[str, Tensor]:
        gate = 1 + entry["weight"].double()
        if gate.ndim < 3:
            gate = gate.reshape((1, -1) if entry["on_input"] else (-1, 1))
        return {"ia3_l": gate}

    def from_peft(self, path: str, tensors: Entry, config: Config) -> dict[str, Tensor]:
        gate, inputs = (tensors["ia3_l"].double() - 1).float(), config.get("feedforward_modules") or []
        on_input = bool(re.fullmatch(inputs, path)) if isinstance(inputs, str) else path.endswith(tuple(inputs))
        entry = {"weight": gate.flatten() if gate.ndim < 3 else gate, "on_input": torch.tensor(int(on_input))}
        has_bias = not on_input and not _WITHOUT_BIAS.fullmatch(path)
        return {**entry, "on_bias": torch.tensor(1)} if has_bias else entry


class OFTv2Form(PeftMethod):
    """Blocks of one size, or of one number; PEFT turns the whole patch of a kernel larger than 1x1, we the channels."""

    peft_type = "OFT"
    suffixes = {"oft_R.weight": "oft_R.weight", "oft_embedding_R.weight": "oft_R.weight"}

    def settings(self, layers: Layers) -> dict[str, Any]:
        if kernels := [path for path in layers if kernel_of(path) > 1]:
            raise ConfigError(f"an OFTv2 of a kernel larger than 1x1, {kernels[0]}")
        terms = single("num_cayley_neumann_terms", [int(one.get("neumann_terms", 5)) for one in layers.values()])
        numbers, columns = zip(*(entry["oft_R.weight"].shape for entry in layers.values()), strict=True)
        blocks = {"r": 0, "oft_block_size": (1 + math.isqrt(1 + 8 * columns[0])) // 2}
        if len(set(columns)) > 1:
            blocks = {"r": single("r", numbers), "oft_block_size": 0}
        return {
            **blocks,
            "block_share": set(numbers) == {1} and blocks["r"] == 0,
            "use_cayley_neumann": terms > 0,
            "num_cayley_neumann_terms": terms or 5,
            "peft_version": "0.18.0",  # the first one with this parametrisation
        }

    def to_peft(self, path: str, entry: Entry) -> dict[str, Tensor]:
        return {"oft_embedding_R.weight" if is_embedding(path) else "oft_R.weight": entry["oft_R.weight"]}

    def from_peft(self, path: str, tensors: Entry, config: Config) -> dict[str, Tensor]:
        if config.get("coft"):
            raise ConfigError("OFT with the constraint coft, which peft applies in each call")
        terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else 0
        return {**super().from_peft(path, tensors, config), "neumann_terms": torch.tensor(terms)}


class HiRAForm(PeftMethod):
    """One rank for all layers, since peft 0.21 reads a rank_pattern and does not use it; no scale."""

    peft_type = "HIRA"
    suffixes = {"hira_A": "hira_A", "hira_B": "hira_B"}

    def settings(self, layers: Layers) -> dict[str, Any]:
        return {"r": single("r", [len(entry["hira_A"]) for entry in layers.values()])}

    def to_peft(self, path: str, entry: Entry) -> dict[str, Tensor]:
        return {"hira_A": entry["hira_A"], "hira_B": entry["hira_B"] * _scale(entry, len(entry["hira_A"]))}

    def from_peft(self, path: str, tensors: Entry, config: Config) -> dict[str, Tensor]:
        return {**tensors, ALPHA: torch.tensor(float(len(tensors["hira_A"])))}


class MiSSForm(PeftMethod):
    """One rank for all layers; no scale."""

    peft_type = "MISS"
    suffixes = {"miss_block": "miss_block"}

    def settings(self, layers: Layers) -> dict[str, Any]:
        return {"r": single("r", [len(entry["miss_block"]) for entry in layers.values()])}

    def to_peft(self, path: str, entry: Entry) -> dict[str, Tensor]:
        return {"miss_block": entry["miss_block"] * _scale(entry, len(entry["miss_block"]))}

    def from_peft(self, path: str, tensors: Entry, config: Config) -> dict[str, Tensor]:
        if config.get("init_weights") in ("bat", "mini"):
            raise ConfigError(f"MiSS of the kind '{config['init_weights']}'")
        return {**tensors, ALPHA: torch.tensor(float(len(tensors["miss_block"])))}


class C3AForm(PeftMethod):
    """Block sizes by layer."""

    peft_type = "C3A"
    suffixes = {"c3a_kernel": "c3a_kernel"}

    def settings(self, layers: Layers) -> dict[str, Any]:
        sizes = {path: entry["c3a_kernel"].shape[-1] for path, entry in layers.items()}
        return varying("block_size", "block_size_pattern", sizes)


class TokensForm(PeftMethod):
    """The same tokens in all tables."""

    peft_type = "TRAINABLE_TOKENS"
    suffixes = {"trainable_tokens_delta": "token_rows"}

    def settings(self, layers: Layers) -> dict[str, Any]:
        tokens = single("token_indices", [tuple(entry["token_ids"].tolist()) for entry in layers.values()])
        return {"token_indices": list(tokens)}

    def from_peft(self, path: str, tensors: Entry, config: Config) -> dict[str, Tensor]:
        return {**super().from_peft(path, tensors, config), "token_ids": torch.tensor(config["token_indices"])}


def _scale(entry: Entry, rank: int) -> float:
    """alpha / rank."""
    return float(entry[ALPHA]) / rank if ALPHA in entry else 1.0
