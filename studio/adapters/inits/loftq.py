"""LoftQ: low-rank factors that make up for the error of quantisation (Li et al. 2023, arXiv:2310.08659).

Algorithm 1: starting from up @ down = 0, repeat Q = quantize(W - up @ down) and then
up @ down = SVD_rank(W - Q), so that Q + up @ down comes close to W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from studio.adapters.adapter_set import AdapterSet
from studio.adapters.inits.initial import find_init
from studio.adapters.layers import WeightView
from studio.adapters.methods.lora import LoRA
from studio.adapters.quantized import is_quantized
from studio.errors import ConfigError


@torch.no_grad()
def loftq(
    weight: Tensor, quantize: Callable[[Tensor], Tensor], rank: int, iterations: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(down (rank, in), up (out, rank), quantised weight (out, in)), all fp32, for `weight` (out, in).

    `quantize` rounds a weight to the values of its format (`quantized.round_trip`); `weight` is the original,
    from before any quantisation. `up @ down` is the whole correction: divide it by the adapter's scale.
    The paper uses 1 to 5 iterations. Raises ConfigError for a rank or a number of iterations out of range.
    """
    if iterations < 1:
        raise ConfigError(f"LoftQ's iterations are {iterations}; there must be 1 or more")
    if not 1 <= rank <= min(weight.shape):
        raise ConfigError(f"rank is {rank}; LoftQ on a {tuple(weight.shape)} weight needs 1..{min(weight.shape)}")
    weight = weight.float()
    correction = torch.zeros_like(weight)
    for _ in range(iterations):
        quantized = quantize(weight - correction).float()
        left, values, right = torch.linalg.svd(weight - quantized, full_matrices=False)
        root = values[:rank].sqrt()  # (rank,)
        up, down = left[:, :rank] * root, root[:, None] * right[:rank]
        correction = up @ down
    return down, up, quantized


@torch.no_grad()
def initialise_from_originals(adapters: AdapterSet, originals: Mapping[str, Tensor]) -> None:
    """Starts the LoRAs on quantised layers so that base and adapter together come closest to the originals.

    `originals` maps full layer names to the weights (out, in) from before the quantisation. The base Q stays
    as it is, so this is one iteration: scale * up @ down = SVD_rank(W - Q). peft's `replace_lora_weights_loftq`
    leaves the scale out, and is closest at scale 1 alone. dW is not zero at first: the function is
    nearer to the original model's than the quantised one is. Layers that are not quantised keep their start.
    Raises ConfigError for a layer without an original, one of another shape, or where there is nothing to start.
    """
    chosen = {name: one for name, one in adapters.items() if type(one) is LoRA}
    chosen = {name: one for name, one in chosen.items() if is_quantized(adapters.targets[name].layer)}
    if not chosen:
        raise ConfigError("LoftQ starts LoRAs (method 'lora') on quantised layers, and the set has none")
    for name, adapter in chosen.items():
        if name not in originals or originals[name].shape != adapter.spec.weight_shape:
            raise ConfigError(f"{name}: LoftQ needs the original weight, {adapter.spec.weight_shape}")
        if find_init(adapter.options.init).anchored:
            raise ConfigError(f"{name}: init '{adapter.options.init}' and LoftQ exclude each other: leave init out")
    for name, adapter in chosen.items():
        quantized = WeightView(adapters.targets[name]).dense()
        original = originals[name].to(quantized.device)
        down, up, _ = loftq(original, lambda _, kept=quantized: kept, adapter.config.rank)  # type: ignore[misc]
        root = adapter.scale**0.5
        adapter.lora_down.copy_(down / root)
        adapter.lora_up.copy_(up / root)
