"""Training through the weight: a lone low-rank adapter acts inside its layer's own product.

A pre-hook gives the layer V = gain * (W + scale * up @ down) for the length of its call, so that the call itself
yields the adapted output, and no pass over it follows. V costs rank * in * out operations, and tokens * rank * out
are saved. It is never kept: with G the gradient of the output times gain, that of the input is
G W + scale (G up) down, those of the factors are scale G^T (x down^T) and scale (G up)^T x.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from studio.adapters.layers import LayerSpec, Target, autocasts
from studio.adapters.lowrank import LowRank

if TYPE_CHECKING:
    from studio.adapters.attachment import Attachment


class Passage(NamedTuple):
    """A call under way with V. `gain` (out,) is what the rows of V were multiplied with to have the lengths
    `magnitude`, which trains; both are None where they were not."""

    x: Tensor
    up: Tensor
    down: Tensor
    scale: float
    magnitude: Tensor | None
    gain: Tensor | None


def may_pass(target: Target) -> bool:
    """Whether the layer may be called with another weight: an nn.Linear or a 1x1 nn.Conv2d as torch has them, dense,
    in fp32 or wider."""
    layer, weight = target.layer, target.layer._parameters.get("weight")
    forward = getattr(type(layer), "forward", None)
    plain = forward is nn.Linear.forward or (forward is nn.Conv2d.forward and _is_pointwise(target.spec))
    own = plain and "forward" not in layer.__dict__
    return own and target.spec.called and type(weight) is nn.Parameter and weight.dtype in _WIDE


def _is_pointwise(spec: LayerSpec) -> bool:
    """Whether a convolution is one matrix on the channels of each pixel."""
    ones = spec.weight_shape[2:] == spec.options["stride"] == (1, 1)
    return ones and spec.groups == 1 and spec.options["padding"] in ((0, 0), "valid", "same")


_WIDE = (torch.float32, torch.float64)


class Enter:
    """The pre-hook: where one adapter acts alone, the layer computes with V, and unrecorded."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) != 1 or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        adapter = _lone(self.attachment, args[0])
        if adapter is None:
            return
        up, down, scale = adapter.product(self.attachment.weight)
        scale *= adapter.strength
        weight, gain = layer._parameters["weight"], None
        with torch.no_grad():
            changed = torch.addmm(weight.flatten(1), up, down, alpha=scale, out=_room(weight))  # (out, in)
            if adapter.magnitude is not None:
                gain = adapter.magnitude.flatten() / torch.linalg.vector_norm(changed, dim=1)
                changed.mul_(gain[:, None])
        self.attachment.passage = Passage(args[0], up, down, scale, adapter.magnitude, gain)
        # an entry of __dict__ is found before the registered parameter, which stays what it is
        layer.__dict__["weight"] = changed.view(weight.shape)
        torch.set_grad_enabled(False)


def leave(layer: nn.Module, passage: Passage, output: Tensor | None) -> Tensor | None:
    """The call's output with its gradients, None of a call that failed; the layer is again as it was."""
    del layer.__dict__["weight"]
    torch.set_grad_enabled(True)
    return None if output is None else _Through.apply(output, *passage, layer.weight, layer.bias)


def _lone(attachment: Attachment, x: Tensor) -> LowRank | None:
    """The adapter that acts alone on the layer, where it can do so through the weight."""
    acting = attachment.active()
    if len(acting) != 1 or not isinstance(acting[0], LowRank):
        return None
    adapter, layer = acting[0], attachment.target.layer
    if not adapter.passes(x.numel() // adapter.spec.in_features):
        return None
    hooked = len(layer._forward_hooks) > 1 or len(layer._forward_pre_hooks) > 1 or adapter._forward_pre_hooks
    if hooked or attachment.weight.saved or attachment.recorder is not None or autocasts(x.device):
        return None
    if adapter.gate.rows is not None or adapter.drops or (adapter.spec.dims and x.ndim != adapter.spec.dims + 2):
        return None
    own = layer._parameters
    if any(tensor is not None and tensor.requires_grad for tensor in own.values()):  # it has gradients of its own
        return None
    if not x.dtype == own["weight"].dtype == next(adapter.parameters()).dtype:  # type: ignore[union-attr]
        return None
    return adapter


_rooms = threading.local()


def _room(weight: Tensor) -> Tensor | None:
    """Memory for one V, on the CPU the same for all layers: its allocator gives fresh pages, whose first touch
    takes as long as the product. It is free again when the call ends."""
    if weight.device.type != "cpu":
        return None
    room = _rooms.__dict__.get(weight.dtype)
    if room is None or room.numel() < weight.numel():
        room = _rooms.__dict__[weight.dtype] = torch.empty(weight.numel(), dtype=weight.dtype)
    return room[: weight.numel()].view(weight.shape[:2])


class _Through(torch.autograd.Function):
    """The output of a call with V, whose gradients come from W and the factors. Without magnitudes, these have
    gradients of their own."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        up: Tensor,
        down: Tensor,
        scale: float,
        magnitude: Tensor | None,
        gain: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, up, down, magnitude, gain, weight, *(() if gain is None else (output, bias)))
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, magnitude, gain, weight, *rest = ctx.saved_tensors
        rows, of_magnitude, of_x = _by_token(gradient, weight), None, None  # (tokens, out)
        if gain is not None:
            output, bias = rest
            rows, of_magnitude = _through_gain(rows, magnitude, gain, _by_token(output, weight), bias)
        flat, core = _by_token(x, weight), (rows @ up).mul_(ctx.scale)  # (tokens, in), (tokens, rank)
        of_up = (flat @ down.T).T @ rows  # (rank, out): laid out as the parameter is
        if ctx.needs_input_grad[1]:
            of_x = (rows @ weight.flatten(1)).addmm_(core, down)  # (tokens, in)
            pixels = (x.shape[0], *x.shape[2:], x.shape[1])
            of_x = of_x.view(x.shape) if weight.ndim == 2 else of_x.view(pixels).movedim(-1, 1)
        return None, of_x, of_up.mul_(ctx.scale).T, core.T @ flat, None, of_magnitude, None, None, None


def _by_token(tensor: Tensor, weight: Tensor) -> Tensor:
    """(..., features) of a Linear, or (B, channels, height, width) of a convolution, as (tokens, features)."""
    return (tensor if weight.ndim == 2 else tensor.movedim(1, -1)).flatten(0, -2)


def _through_gain(
    rows: Tensor, magnitude: Tensor, gain: Tensor, output: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(gradient before the gain, gradient of the magnitudes): the output less its bias is proportional to these."""
    product = rows * output
    total = product.sum(0)
    if bias is not None:
        total -= bias * rows.sum(0)
    total /= magnitude.flatten() + torch.finfo(gain.dtype).tiny  # of exactly zero, it has lost its direction
    return torch.mul(rows, gain, out=product), total.view(magnitude.shape)
