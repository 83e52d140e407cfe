"""Samplers by the names that A1111 gave them, each a diffusers scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from studio.errors import ConfigError, nearest

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_KARRAS = {"use_karras_sigmas": True}
_SDE = {"algorithm_type": "sde-dpmsolver++"}

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler Karras": ("EulerDiscreteScheduler", _KARRAS),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 Karras": ("KDPM2DiscreteScheduler", _KARRAS),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM2 a Karras": ("KDPM2AncestralDiscreteScheduler", _KARRAS),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", _KARRAS),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", _SDE),
    "DPM++ 2M SDE Karras": ("DPMSolverMultistepScheduler", _SDE | _KARRAS),
    "DPM++ 3M SDE": ("DPMSolverMultistepScheduler", _SDE | {"solver_order": 3}),
    "DPM++ 3M SDE Karras": ("DPMSolverMultistepScheduler", _SDE | _KARRAS | {"solver_order": 3}),
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "LCM": ("LCMScheduler", {}),
}
"""Sampler name -> (diffusers class, settings that differ from the base's scheduler config)."""


def check_sampler(name: str) -> None:
    """Raises ConfigError, naming the nearest samplers, for a name that is not in `SAMPLERS`."""
    if name not in SAMPLERS:
        suggestion = nearest(name, SAMPLERS) or f" Known: {', '.join(SAMPLERS)}."
        raise ConfigError(f"unknown sampler '{name}'.{suggestion}")


def make_scheduler(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """A fresh diffusers scheduler for sampler `name` on a base with scheduler config `config`.

    Raises ConfigError for an unknown name.
    """
    import diffusers

    check_sampler(name)
    class_name, settings = SAMPLERS[name]
    if config.get("rescale_betas_zero_snr"):
        # such a base must start at the last timestep, where nothing of the picture is left (arXiv:2305.08891)
        settings = settings | {"timestep_spacing": "trailing"}
    return getattr(diffusers, class_name).from_config({**config, **settings})
