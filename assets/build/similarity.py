"""Which real picture is a generated one nearest to? Pixel distance on blurred pictures."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLUR = 2.0  # standard deviation, pixels


def blurred(pixels: np.ndarray, sigma: float = BLUR) -> Tensor:
    """(N, 64, 64, 3) uint8 -> (N, 3, 64, 64) in [0, 1], Gaussian-blurred over a white surround."""
    radius = int(3 * sigma)
    x = torch.arange(-radius, radius + 1).float()
    kernel = torch.exp(-x.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1).repeat(3, 1, 1)  # (3, 1, k)
    images = 1 - torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255  # white is 0, as is the padding
    images = F.conv2d(images, kernel.unsqueeze(2), padding=(0, radius), groups=3)
    images = F.conv2d(images, kernel.unsqueeze(3), padding=(radius, 0), groups=3)
    return 1 - images


def nearest(generated: Tensor, real: Tensor) -> Tensor:
    """Index into `real` (M, ...) of the nearest picture to each of `generated` (N, ...). Shape (N,)."""
    return torch.cdist(generated.flatten(1), real.flatten(1)).argmin(dim=1)
