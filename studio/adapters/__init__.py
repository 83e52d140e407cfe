"""Adapters beside a model: the contract, the methods, and how they are attached.

A new method is one file here and one import line below.
"""

from studio.adapters.base import METHODS, Adapter, AdapterConfig, LayerSpec, WeightView, describe
from studio.adapters.inject import AdapterPlan, AdapterSet, attach_adapters, inject, match_targets
from studio.adapters.lora import LoRA

__all__ = [
    "METHODS",
    "Adapter",
    "AdapterConfig",
    "AdapterPlan",
    "AdapterSet",
    "LayerSpec",
    "LoRA",
    "WeightView",
    "attach_adapters",
    "describe",
    "inject",
    "match_targets",
]
