"""Objectives against diffusers' schedulers and the formulas of the papers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from studio.diffusion.objective import Objective
from studio.errors import ConfigError
from studio.seeds import sample_generator

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIGS = [
    BETAS | {"prediction_type": kind, "rescale_betas_zero_snr": zero_snr, "_class_name": "PNDMScheduler"}
    for kind in ("epsilon", "v_prediction")
    for zero_snr in (False, True)
]


@pytest.mark.parametrize("config", CONFIGS)
def test_noise_and_target_equal_diffusers(config):
    objective, reference = Objective(config), DDPMScheduler.from_config(config)
    latents, noise = torch.randn(2, 5, 4, 3, 3, generator=sample_generator("objective"))
    timesteps = torch.tensor([0, 10, 500, 998, 999])
    noisy = reference.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(objective.add_noise(latents, noise, timesteps), noisy)
    velocity = reference.get_velocity(latents, noise, timesteps)
    target = noise if config["prediction_type"] == "epsilon" else velocity
    torch.testing.assert_close(objective.target(latents, noise, timesteps), target)


@pytest.mark.parametrize("config", CONFIGS)
def test_min_snr_weight_is_the_papers(config):
    objective = Objective(config)
    timesteps = torch.arange(0, 999)
    alphas = DDPMScheduler.from_config(config).alphas_cumprod[:999]
    snr = alphas / (1 - alphas)
    divisor = snr if config["prediction_type"] == "epsilon" else snr + 1
    torch.testing.assert_close(objective.weight(timesteps, 5.0), snr.clamp(max=5.0) / divisor)
    assert objective.weight(timesteps, None).eq(1).all()


def test_weight_is_finite_where_the_snr_is_zero():
    for config in CONFIGS:
        weight = Objective(config).weight(torch.tensor([999]), 5.0)
        assert 0 <= weight <= 1


def test_timesteps_belong_to_their_samples():
    objective = Objective(BETAS)

    def draw(*samples: str) -> list[int]:
        return objective.sample_timesteps([sample_generator(1, sample, 7) for sample in samples]).tolist()

    assert draw("a", "b", "c") == draw("a") + draw("b") + draw("c")
    many = objective.sample_timesteps([sample_generator(1, place) for place in range(4000)])
    assert many.min() >= 0 and many.max() <= 999 and abs(many.float().mean() - 499.5) < 20


def test_unknown_prediction_is_refused():
    with pytest.raises(ConfigError, match="'sample'"):
        Objective(BETAS | {"prediction_type": "sample"})
