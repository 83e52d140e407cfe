"""Adapters beside a model: the contract, the methods, and how they are attached.

A new method is one file here and one import line below.
"""

from studio.adapters.adapter_set import AdapterSet, MergeReport
from studio.adapters.base import METHODS, Adapter, AdapterConfig
from studio.adapters.dora import DoRA
from studio.adapters.inject import attach_adapters, inject
from studio.adapters.layers import LayerSpec, Target, WeightView, describe
from studio.adapters.lora import LoRA
from studio.adapters.mixed import mixed_batch
from studio.adapters.prefix import PrefixTuning
from studio.adapters.prompt import PROMPT_METHODS, PromptConfig, PromptSet, attach_prompt, load_prompt
from studio.adapters.prompt_tuning import PromptTuning
from studio.adapters.ptuning import PTuning
from studio.adapters.targets import AdapterPlan, match_targets, named_layers, named_targets

__all__ = [
    "METHODS",
    "PROMPT_METHODS",
    "Adapter",
    "AdapterConfig",
    "AdapterPlan",
    "AdapterSet",
    "DoRA",
    "LayerSpec",
    "LoRA",
    "MergeReport",
    "PTuning",
    "PrefixTuning",
    "PromptConfig",
    "PromptSet",
    "PromptTuning",
    "Target",
    "WeightView",
    "attach_adapters",
    "attach_prompt",
    "describe",
    "inject",
    "load_prompt",
    "match_targets",
    "mixed_batch",
    "named_layers",
    "named_targets",
]
