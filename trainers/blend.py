"""Fitting a learned blend: each adapter keeps its own effect on its own prompts (ZipLoRA, arXiv:2311.13600).

Every adapter first draws its prompts alone. Along the way the noisy latents, what it predicts there and what the base
does are kept; the coefficients then minimise

    mean_i |eps_blend - eps_i|^2 / |eps_i - eps_base|^2 + penalty * mean |m_i . m_j| / columns

over these moments. The paper's first term is not relative; so, adapters of any strength weigh alike, and at the start
it says how much of their effects the plain sum loses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from studio.algebra.learned import LearnedBlend
from studio.diffusion.samplers import make_scheduler
from studio.errors import ConfigError
from studio.families.base import DiffusionFamily, Models
from studio.formats.state import AdapterState
from studio.seeds import sample_generator

LR = 0.01  # the paper's, as is the penalty
SAMPLER_STEPS = 8


@dataclass(frozen=True)
class Moment:
    """A place on the way of one adapter's picture: latents (1, C, h, w) at a timestep (1,), what the adapter predicts
    there, and the squared norm of its effect."""

    prompt: str
    latents: Tensor
    timestep: Tensor
    wanted: Tensor
    effect: float


@dataclass(frozen=True)
class Learned:
    """The adapters with their coefficients. `before` and `after`: for each, the share of its effect that the blend
    loses over all moments, |eps_blend - eps_i| / |eps_i - eps_base|, with the plain sum and with the coefficients."""

    states: list[AdapterState]
    before: list[float]
    after: list[float]


def learn_blend(
    family: DiffusionFamily,
    models: Models,
    states: Sequence[AdapterState],
    prompts: Sequence[Sequence[str]],
    *,
    steps: int = 100,
    penalty: float = 0.01,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Learned:
    """Fits the coefficients of low-rank adapters (`prepared`) on a base; `prompts` holds those of each adapter.

    The models are afterwards what they were. Raises ConfigError unless every adapter has prompts and an effect there.
    """
    if len(prompts) != len(states) or not all(prompts):
        raise ConfigError(
            f"{len(states)} adapters and prompts for {len(prompts)}: give each adapter prompts of its own"
        )
    blend = LearnedBlend(family.prefixes(models), states)
    try:
        moments = [_moments(family, models, blend, place, own, seed) for place, own in enumerate(prompts)]
        before = _lost(family, models, blend, moments)
        _fit(family, models, blend, moments, steps, penalty, seed, progress)
        return Learned(blend.states(), before, _lost(family, models, blend, moments))
    finally:
        blend.detach()


@torch.no_grad()
def _moments(
    family: DiffusionFamily, models: Models, blend: LearnedBlend, place: int, prompts: Sequence[str], seed: int
) -> list[Moment]:
    """The moments of the adapter at `place`, drawing its prompts alone."""
    config, moments = models.parts["unet"].config, []
    for prompt in prompts:
        scheduler = make_scheduler("DDIM", models.scheduler)
        scheduler.set_timesteps(SAMPLER_STEPS)
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        latents = torch.randn(shape, generator=sample_generator(seed, place, prompt)).to(models.parts["unet"].device)
        for timestep in scheduler.timesteps:
            here = latents, timestep[None].to(latents.device)
            with blend.only(None):
                base = _predict(family, models, prompt, *here)
            with blend.only(place):
                wanted = _predict(family, models, prompt, *here)
            effect = float((wanted - base).square().sum())
            if not effect:
                raise ConfigError(f"adapter {place + 1} changes nothing on '{prompt}': there is nothing to keep")
            moments.append(Moment(prompt, *here, wanted, effect))
            latents = scheduler.step(wanted, timestep, latents).prev_sample
    return moments


def _predict(family: DiffusionFamily, models: Models, prompt: str, latents: Tensor, timestep: Tensor) -> Tensor:
    conditioning = family.encode_prompt(models, [prompt])
    dtype = conditioning.encoder_hidden_states.dtype
    return family.denoise(models, latents.to(dtype), timestep, conditioning).float()


def _loss(family: DiffusionFamily, models: Models, moment: Moment) -> Tensor:
    """|eps_blend - eps_i|^2 / |eps_i - eps_base|^2 at one moment."""
    prediction = _predict(family, models, moment.prompt, moment.latents, moment.timestep)
    return (prediction - moment.wanted).square().sum() / moment.effect


@torch.no_grad()
def _lost(
    family: DiffusionFamily, models: Models, blend: LearnedBlend, moments: Sequence[Sequence[Moment]]
) -> list[float]:
    """For each adapter, the root of the mean loss over its moments."""
    return [float(torch.stack([_loss(family, models, moment) for moment in own]).mean().sqrt()) for own in moments]


def _fit(
    family: DiffusionFamily,
    models: Models,
    blend: LearnedBlend,
    moments: Sequence[Sequence[Moment]],
    steps: int,
    penalty: float,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """AdamW without decay; each step sees one moment of every adapter."""
    parameters = [parameter for parameter in blend.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        for place, own in enumerate(moments):
            drawn = torch.randint(len(own), (), generator=sample_generator(seed, place, step, "moment"))
            (_loss(family, models, own[int(drawn)]) / len(moments)).backward()
        (penalty * blend.alignment()).backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, steps)
