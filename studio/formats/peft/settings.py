"""How PEFT says what differs between layers: values with patterns, and what a path tells of its layer."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from studio.errors import ConfigError

Config = Mapping[str, Any]  # of `adapter_config.json`

_EMBEDDING = re.compile(r"(.+\.)?(embeddings\.\w+|embed_tokens|relative_attention_bias|shared)")
_KERNELS = {  # how many weights a kernel larger than 1x1 has
    **dict.fromkeys(("conv", "conv1", "conv2", "conv_in", "conv_out"), 9),
    "pos_embed.proj": 4,
}
_PATTERN = re.compile(r"\^?[\w.\\*|]+\$?")


def is_embedding(path: str) -> bool:
    """Whether the layer is a table of vectors, whose tensors PEFT names otherwise."""
    return _EMBEDDING.fullmatch(path) is not None


def kernel_of(path: str) -> int:
    """How many weights the layer's kernel has: 1 without one."""
    return _KERNELS.get(path, _KERNELS.get(path.rpartition(".")[2], 1))


def plain(value: float) -> int | float:
    """The number as an integer where it is one, as people write alphas."""
    return int(value) if float(value).is_integer() else float(value)


def varying(name: str, pattern: str, values: Mapping[str, float]) -> dict[str, Any]:
    """A setting that has its most frequent value, and a `pattern` of the others by path.

    PEFT's patterns match the end of a path: one that is also the end of another layer's is anchored.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    endings = {path[place + 1 :] for path in values for place, sign in enumerate(path) if sign == "."}
    others = {f"^{path}" if path in endings else path: own for path, own in values.items() if own != common}
    return {name: common, pattern: others}


def own_value(path: str, name: str, pattern: str, config: Config, default: float) -> float:
    """The inverse of `varying` for one path, by PEFT's rule. Raises ConfigError for an endless pattern."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise ConfigError(f"the {pattern} is {patterns!r}, not values by layer")
    for key, own in patterns.items():
        if not _PATTERN.fullmatch(key) or key.count("*") > 2:
            raise ConfigError(f"the {pattern} '{key}' is none that could be read: give paths, or paths with '.*'")
        if re.match(rf"(.*\.)?({key})$", path):
            return _number(own, pattern)
    return _number(config.get(name, default), name)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"its {name} says {value!r}, which is no number")
    return value


def single(name: str, values: Iterable[Any]) -> Any:
    """A setting that PEFT has once for all layers of a component; ConfigError where they differ."""
    found = list(dict.fromkeys(values))
    if len(found) > 1:
        few = ", ".join(map(str, found[:3]))
        raise ConfigError(f"layers of one component that differ in {name}, as peft has it ({few})")
    return found[0]
