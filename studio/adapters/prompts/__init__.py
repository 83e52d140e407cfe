"""Methods of a whole text model, which have no dW: virtual tokens before its input or in its cache."""

from studio.adapters.prompts.prefix import PrefixTuning
from studio.adapters.prompts.prompt import PROMPT_METHODS, PromptConfig, PromptSet, attach_prompt, load_prompt
from studio.adapters.prompts.prompt_tuning import PromptTuning
from studio.adapters.prompts.ptuning import PTuning

__all__ = [
    "PROMPT_METHODS",
    "PTuning",
    "PrefixTuning",
    "PromptConfig",
    "PromptSet",
    "PromptTuning",
    "attach_prompt",
    "load_prompt",
]
