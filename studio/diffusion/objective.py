"""What a denoiser is trained to predict, and how its losses are weighted.

x_t = alpha_t x_0 + sigma_t noise, with alpha_t^2 = alphas_cumprod[t] and sigma_t^2 = 1 - alpha_t^2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from studio.errors import ConfigError


@dataclass(frozen=True)
class Prediction:
    """One kind of prediction: `target(x_0, noise, alpha, sigma)`, and the min-SNR weight of its
    loss, `weight(snr, gamma)` (Hang et al. 2023, arXiv:2303.09556)."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    weight: Callable[[Tensor, float], Tensor]


PREDICTIONS = {
    # min(snr, gamma) / snr, written so that it is 1 where snr is 0
    "epsilon": Prediction(
        target=lambda latents, noise, alpha, sigma: noise,
        weight=lambda snr, gamma: (gamma / snr).clamp(max=1),
    ),
    # v = alpha noise - sigma x_0 (Salimans and Ho 2022, arXiv:2202.00512)
    "v_prediction": Prediction(
        target=lambda latents, noise, alpha, sigma: alpha * noise - sigma * latents,
        weight=lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1),
    ),
}


class Objective:
    """Noise levels, noisy latents, targets and loss weights of one base.

    `scheduler_config` is the base's diffusers scheduler config: its betas, `prediction_type` and
    `rescale_betas_zero_snr` count. Raises ConfigError for a prediction type it does not know.
    """

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        from diffusers import DDPMScheduler

        kind = scheduler_config.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS:
            raise ConfigError(f"the base predicts '{kind}'; only {' and '.join(PREDICTIONS)} can be trained")
        self.prediction = PREDICTIONS[kind]
        self.alphas_cumprod: Tensor = DDPMScheduler.from_config(dict(scheduler_config)).alphas_cumprod

    def sample_timesteps(self, generators: Sequence[torch.Generator]) -> Tensor:
        """(B,) integers, uniform in [0, number of training timesteps): one draw from each sample's generator."""
        count = len(self.alphas_cumprod)
        return torch.cat([torch.randint(count, (1,), generator=generator) for generator in generators])

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents at `timesteps` (B,), shape of `latents` (B, ...)."""
        alpha, sigma = self._levels(timesteps, latents)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict at `timesteps` (B,), shape of `latents` (B, ...)."""
        return self.prediction.target(latents, noise, *self._levels(timesteps, latents))

    def weight(self, timesteps: Tensor, min_snr_gamma: float | None) -> Tensor:
        """Loss weights (B,) in [0, 1] by min-SNR; ones where `min_snr_gamma` (5 in the paper) is None."""
        if min_snr_gamma is None:
            return torch.ones(timesteps.shape, device=timesteps.device)
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return self.prediction.weight(alphas / (1 - alphas), min_snr_gamma)

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, each (B, 1, ...), in the dtype and on the device of `like`."""
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps]
        alphas = alphas.reshape(-1, *(1,) * (like.dim() - 1))
        return alphas.sqrt().to(like), (1 - alphas).sqrt().to(like)
