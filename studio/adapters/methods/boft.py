"""BOFT: W' = R_m ... R_1 W, a butterfly of sparse rotations of the outputs (Liu et al. 2023, arXiv:2311.06243).

In stage i, R_i rotates blocks of b channels that lie 2^i b / 2 apart, so that p + 1 stages over 2^p
blocks mix every channel with every other. The blocks are Cayley transforms as in OFT. The form is
LyCORIS's; peft's BOFT rotates the inputs instead (on a CPU, by one stage: `oftv2` with the exact
inverse), so its files are not of this parametrisation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from studio.adapters.base import AdapterConfig
from studio.adapters.layers import LayerSpec
from studio.adapters.methods.oft import OFT, RotationOptions, turned
from studio.errors import ConfigError


class BOFT(OFT):
    """`oft_blocks` (p + 1, 2^p, b, b), and `rescale` as in OFT.

    `rank` is the largest b, as in LyCORIS: b is the largest even number up to it with out / b a power of two.
    """

    method = "boft"
    Options = RotationOptions
    needed = frozenset()  # its files look like OFT's, but for a dimension more

    @classmethod
    def blocks_shape(cls, spec: LayerSpec, config: AdapterConfig) -> tuple[int, ...]:
        sizes = [size for size in range(2, spec.out_features + 1, 2) if _power_of_two(spec.out_features / size)]
        size = max((size for size in sizes if size <= config.rank), default=None)
        if size is None:
            fix = f"choose a rank of {sizes[0]} or more" if sizes else "BOFT cannot rotate it: leave it out"
            raise ConfigError(
                f"no even number up to rank {config.rank} times a power of two makes {spec.out_features} outputs; {fix}"
            )
        number = spec.out_features // size
        return number.bit_length(), number, size, size

    @property
    def within_groups(self) -> bool:
        return self.spec.groups == 1

    def rotation(self, dtype: torch.dtype, strength: float) -> Callable[[Tensor], Tensor]:
        stages = self.turns().mT.to(dtype)

        def rotate(values: Tensor) -> Tensor:
            total = values
            for stage, turns in enumerate(stages):
                apart = 2**stage * turns.shape[-1] // 2
                pairs = total.unflatten(-1, (-1, 2, apart)).mT.flatten(-3)  # far channels beside each other
                total = total + turned(pairs, turns).unflatten(-1, (-1, apart, 2)).mT.flatten(-3)
            return strength * (total - values)

        return rotate


def _power_of_two(number: float) -> bool:
    return number.is_integer() and int(number).bit_count() == 1
