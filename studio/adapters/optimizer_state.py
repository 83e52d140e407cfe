"""Changing a parameter's shape during training without losing what its optimizer knows about it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from studio.errors import ConfigError

FIRST_MOMENTS = frozenset({"exp_avg", "grad_avg", "momentum_buffer"})
"""What torch's optimizers call their sums of gradients."""
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
"""What they call their sums of squared gradients."""


def replace_parameter(
    parameter: nn.Parameter,
    data: Tensor,
    optimizer: Optimizer | None,
    moments: Callable[[Tensor], Tensor],
    squares: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Gives `parameter` new `data`, of any shape, and clears its gradient.

    The Parameter object and its place in the optimizer stay. Every tensor of the parameter's former shape in
    its optimizer state (Adam's exp_avg and exp_avg_sq) is replaced by `moments` of it, or second moments by
    `squares` where that is given; numbers stay. Raises ConfigError as `check_replaceable` does.
    """
    check_replaceable(parameter, optimizer)
    former = parameter.shape
    # autograd keeps the former shape while a loss computed from it is alive; a change of dtype makes it forget
    parameter.data = data.new_empty(0, dtype=torch.float16 if data.dtype != torch.float16 else torch.float32)
    parameter.data = data
    torch.autograd.graph.increment_version(parameter)  # what is remembered of its values is out of date
    parameter.grad = None
    state = state_of(parameter, optimizer)
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == former:
            state[name] = (squares if squares and name in SECOND_MOMENTS else moments)(value)


def check_replaceable(parameter: nn.Parameter, optimizer: Optimizer | None) -> None:
    """Raises ConfigError where a change of shape would go wrong.

    An optimizer may keep more than moments of the parameter's shape (8-bit, factored), and a wrapper for
    several processes goes on reducing gradients of the former shape.
    """
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise ConfigError("ranks cannot change while several processes train: use one, or a method of fixed rank")
    for name, value in state_of(parameter, optimizer).items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        if value.shape != parameter.shape or not value.is_floating_point():
            raise ConfigError(
                f"{type(optimizer).__name__} keeps '{name}' {tuple(value.shape)} ({value.dtype}) for a parameter of "
                f"{tuple(parameter.shape)}, which cannot follow a change of rank: use adamw, or a method of fixed rank"
            )


def state_of(parameter: Tensor, optimizer: Optimizer | None) -> dict[str, object]:
    """What the optimizer keeps of a parameter; empty without one."""
    return {} if optimizer is None else optimizer.state.get(parameter, {})
