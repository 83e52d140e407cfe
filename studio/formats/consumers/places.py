"""The layers of a base by the names that tools have for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from studio.adapters import LayerSpec, Target, named_targets
from studio.families.base import ModelFamily, Models
from studio.families.keys import LDMNames, flatten
from studio.formats import kohya
from studio.formats.original import original_name


@dataclass(frozen=True)
class Place:
    """Where a tool's name leads: the layer with this full name, and its geometry.

    `original` names the family where both are those of its original code, whose layer may be several of diffusers'
    at once.
    """

    layer: str
    spec: LayerSpec
    original: str = ""


Places = Mapping[str, Place]  # a tool's name of a module -> the place


class Base:
    """The layers of a base: in diffusers' naming, by component, and in the original code's naming."""

    def __init__(self, family: ModelFamily, models: Models) -> None:
        self.family = family.name
        self.targets: dict[str, Target] = named_targets(family.prefixes(models))
        self.components: dict[str, dict[str, Place]] = {component: {} for component in family.components}
        for name, target in self.targets.items():
            component, _, path = name.partition(".")
            self.components[component][path] = Place(name, target.spec)
        self._models = models

    @property
    def has_unet(self) -> bool:
        """Whether what denoises is a U-Net, in LDM's naming; the others are diffusion transformers."""
        return "unet" in self.components

    @cached_property
    def denoiser(self) -> dict[str, Place]:
        """The layers of the U-Net or transformer, by diffusers' path."""
        return self.components["unet" if self.has_unet else "transformer"]

    @cached_property
    def original(self) -> dict[str, Place]:
        """The layers of the U-Net or transformer, by the original code's path."""
        if self.has_unet:
            ldm = LDMNames(self._models.parts["unet"].config)
            return {name: place for path, place in self.denoiser.items() if (name := ldm.to_ldm(path)) is not None}
        together: dict[str, list[LayerSpec]] = {}
        for place in self.denoiser.values():
            if (named := original_name(place.layer, self.family)) is not None:
                together.setdefault(named[1], []).append(place.spec)
        return {name: Place(f"transformer.{name}", _fused(specs), self.family) for name, specs in together.items()}

    @property
    def open_clip(self) -> str | None:
        """The text encoder that the original code has from OpenCLIP, where it has one: not Stable Diffusion 1's."""
        if self.family == "sd":
            return "text_encoder" if self._models.parts["unet"].config.use_linear_projection else None
        return "text_encoder_2" if self.family == "sdxl" else None

    @cached_property
    def encoders(self) -> dict[str, dict[str, Place]]:
        """The layers of the text encoders that tools have names for: no embeddings, no norms, no projection."""
        inner = re.compile(r".*\.(layers|block)\.\d+\..*")
        return {
            component: {path: one for path, one in layers.items() if inner.match(path) and one.spec.kind == "linear"}
            for component, layers in self.components.items()
            if component.startswith("text_encoder")
        }

    @cached_property
    def kohya_encoders(self) -> dict[str, Place]:
        """The layers of the text encoders by sd-scripts' names."""
        prefixes = kohya.PREFIXES[self.family]
        found = [flat(prefixes[component], layers) for component, layers in self.encoders.items()]
        return {name: place for places in found for name, place in places.items()}


def _fused(specs: Sequence[LayerSpec]) -> LayerSpec:
    """The geometry of one layer with the outputs of all."""
    first = specs[0]
    return replace(first, weight_shape=(sum(spec.out_features for spec in specs), *first.weight_shape[1:]))


def without_text_model(layers: Places) -> dict[str, Place]:
    """CLIP's paths as transformers 5 has them."""
    return {path.removeprefix("text_model."): place for path, place in layers.items()}


def flat(prefix: str, places: Places) -> dict[str, Place]:
    """`places` by their flattened names, after a prefix."""
    return {prefix + flatten(path): place for path, place in places.items()}


def dotted(prefix: str, places: Places) -> dict[str, Place]:
    """`places` by their paths, after a prefix."""
    return {prefix + path: place for path, place in places.items()}
