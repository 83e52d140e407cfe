"""How LoRA's factors start: at random, from the base's own weight, from activations, from what quantising lost."""

from studio.adapters.inits.eva import initialise_from_activations
from studio.adapters.inits.loftq import initialise_from_originals

__all__ = [
    "initialise_from_activations",
    "initialise_from_originals",
]
