"""Adapters beside a model: the contract, the methods, and how they are attached.

A new method is one file here and one import line below.
"""

from studio.adapters.adalora import AdaLoRA
from studio.adapters.adapter_set import AdapterSet, MergeReport
from studio.adapters.base import METHODS, Adapter, AdapterConfig
from studio.adapters.boft import BOFT
from studio.adapters.c3a import C3A
from studio.adapters.deltalora import DeltaLoRA
from studio.adapters.dora import DoRA
from studio.adapters.eva import initialise_from_activations
from studio.adapters.full import BiasTuning, Full, NormTuning
from studio.adapters.hira import HiRA
from studio.adapters.hotswap import HotSwapSlot
from studio.adapters.ia3 import IA3
from studio.adapters.inject import attach_adapters, inject
from studio.adapters.layers import LayerSpec, Target, WeightView, describe
from studio.adapters.loftq import initialise_from_originals
from studio.adapters.loha import LoHa
from studio.adapters.lokr import LoKr
from studio.adapters.lora import LoRA
from studio.adapters.miss import MiSS
from studio.adapters.mixed import mixed_batch
from studio.adapters.mora import MoRA
from studio.adapters.oft import OFT
from studio.adapters.oftv2 import OFTv2
from studio.adapters.prefix import PrefixTuning
from studio.adapters.prompt import PROMPT_METHODS, PromptConfig, PromptSet, attach_prompt, load_prompt
from studio.adapters.prompt_tuning import PromptTuning
from studio.adapters.ptuning import PTuning
from studio.adapters.qalora import QALoRA
from studio.adapters.randlora import RandLoRA
from studio.adapters.rank_schedule import RankSchedule
from studio.adapters.report import PlanReport, plan_report
from studio.adapters.road import RoAd
from studio.adapters.shira import SHiRA
from studio.adapters.stack import AdapterStack
from studio.adapters.surgery import ShrinkReport, grow, rebalance, shrink
from studio.adapters.targets import AdapterPlan, match_targets, named_layers, named_targets
from studio.adapters.tokens import TrainableTokens
from studio.adapters.tucker import Tucker
from studio.adapters.vera import VeRA

__all__ = [
    "BOFT",
    "C3A",
    "IA3",
    "METHODS",
    "OFT",
    "PROMPT_METHODS",
    "AdaLoRA",
    "Adapter",
    "AdapterConfig",
    "AdapterPlan",
    "AdapterSet",
    "AdapterStack",
    "BiasTuning",
    "DeltaLoRA",
    "DoRA",
    "Full",
    "HiRA",
    "HotSwapSlot",
    "LayerSpec",
    "LoHa",
    "LoKr",
    "LoRA",
    "MergeReport",
    "MiSS",
    "MoRA",
    "NormTuning",
    "OFTv2",
    "PTuning",
    "PlanReport",
    "PrefixTuning",
    "PromptConfig",
    "PromptSet",
    "PromptTuning",
    "QALoRA",
    "RandLoRA",
    "RankSchedule",
    "RoAd",
    "SHiRA",
    "ShrinkReport",
    "Target",
    "TrainableTokens",
    "Tucker",
    "VeRA",
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
    "mixed_batch",
    "named_layers",
    "named_targets",
    "plan_report",
    "rebalance",
    "shrink",
]
