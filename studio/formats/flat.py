"""What formats share whose keys are a flattened layer name, a dot, and a method's own suffix.

Every method can be held so: `lycoris_mid_block_attentions_0_proj_in.lora_down.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from studio.formats.embeddings import bundled, split_bundle, with_bundle
from studio.formats.reading import Placed, adapter_state, known_suffixes, unknown_keys
from studio.formats.state import AdapterState


def encode(state: AdapterState, module_name: Callable[[str, str], str | None]) -> dict[str, Tensor]:
    """File key -> tensor; `module_name` has one for each layer, from its full name and the family."""
    layers = {
        f"{module_name(name, state.family)}.{suffix}": tensor
        for name, entry in state.tensors.items()
        for suffix, tensor in entry.items()
    }
    return layers | bundled(state)


def decode(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    source: str,
    layer_name: Callable[[str], str | None],
    family: str | None = None,
) -> AdapterState:
    """The inverse of `encode`; `family` where the keys tell it. Raises ConfigError for unknown keys."""
    layers, vectors = split_bundle(tensors)
    suffixes = known_suffixes()
    named, unknown = Placed(), []
    for key, tensor in layers.items():
        module, _, suffix = key.partition(".")
        name = layer_name(module)
        if name is None or suffix not in suffixes:
            unknown.append(key)
        else:
            named[name, suffix] = tensor
    if unknown:
        raise unknown_keys(unknown, len(tensors), source)
    return with_bundle(adapter_state(named, metadata, source, family), vectors)
