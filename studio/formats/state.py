"""The hub type of every adapter file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from studio.adapters.base import method_of


@dataclass(frozen=True)
class AdapterState:
    """An adapter apart from any model or file.

    `tensors["unet.down_blocks.0.attentions.0.proj_in"]["lora_down.weight"]`: full layer name in the
    canonical naming (diffusers' module paths below the component's name; text encoders always with
    `text_model.`, whatever the transformers version) -> on-disk suffix (kohya's and LyCORIS's) ->
    tensor. A layer's suffixes tell its method; layers of several methods may stand side by side. Where
    there is a `lora_down.weight`, `alpha` is always present: the effective scale is alpha / rank.
    `metadata` holds safetensors strings (`ss_*`, `modelspec.*`, ours).

    `embeddings["ink-style"]["text_encoder"]` (vectors, width): what textual inversion (arXiv:2208.01618) trained,
    token -> component -> the rows that stand in the prompt's place of the token, one or more. A file may hold
    embeddings alone, layers alone, or both.
    """

    family: str
    tensors: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    embeddings: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict, kw_only=True)

    @property
    def methods(self) -> dict[str, int]:
        """Method -> number of its layers, the most frequent first. Raises KeyError for suffixes of none."""
        counts: Counter[str] = Counter()
        for entry in self.tensors.values():
            method = method_of(frozenset(entry))
            if method is None:
                raise KeyError(f"no method has the entries {', '.join(sorted(entry))}")
            counts[method.named(entry)] += 1
        return dict(counts.most_common())
