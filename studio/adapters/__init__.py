"""Adapters beside a model: the contract (`base`), the methods, and how they act on layers.

A new method is one file in `methods/` and one import line in its `__init__`.
"""

from studio.adapters import methods
from studio.adapters.adapter_set import AdapterSet, MergeReport
from studio.adapters.base import METHODS, Adapter, AdapterConfig
from studio.adapters.hotswap import HotSwapSlot
from studio.adapters.inits import (
    initialise_from_activations,
    initialise_from_originals,
)
from studio.adapters.inject import attach_adapters, inject
from studio.adapters.layers import LayerSpec, Target, WeightView, describe
from studio.adapters.mixed import mixed_batch
from studio.adapters.prompts import (
    PROMPT_METHODS,
    PrefixTuning,
    PromptConfig,
    PromptSet,
    PromptTuning,
    PTuning,
    attach_prompt,
    load_prompt,
)
from studio.adapters.rank_schedule import RankSchedule
from studio.adapters.report import PlanReport, plan_report
from studio.adapters.stack import AdapterStack
from studio.adapters.surgery import ShrinkReport, grow, rebalance, shrink
from studio.adapters.targets import AdapterPlan, match_targets, named_layers, named_targets

__all__ = [
    "METHODS",
    "PROMPT_METHODS",
    "Adapter",
    "AdapterConfig",
    "AdapterPlan",
    "AdapterSet",
    "AdapterStack",
    "HotSwapSlot",
    "LayerSpec",
    "MergeReport",
    "PTuning",
    "PlanReport",
    "PrefixTuning",
    "PromptConfig",
    "PromptSet",
    "PromptTuning",
    "RankSchedule",
    "ShrinkReport",
    "Target",
    "WeightView",
    "attach_adapters",
    "attach_prompt",
    "describe",
    "grow",
    "initialise_from_activations",
    "initialise_from_originals",
    "inject",
    "load_prompt",
    "match_targets",
    "methods",
    "mixed_batch",
    "named_layers",
    "named_targets",
    "plan_report",
    "rebalance",
    "shrink",
]
