"""How adapters act on one target: the hooks of a layer, and the adapters of all sets that share them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from studio.adapters.base import Adapter
from studio.adapters.layers import Target, WeightView, autocasts, kept, wide
from studio.adapters.mixed import mixed_output, mixed_rows
from studio.adapters.quantized import is_quantized
from studio.adapters.through import Enter, Passage, leave, may_pass
from studio.errors import ConfigError

Recorder = Callable[["Attachment", Tensor | None], None]


class Attachment:
    """The adapters of one target. A plain object, so that a deep copy of the model copies it too.

    Two ways to act, one rule. A layer that is called with an input gets a hook that adds to its output
    (and one that changes its input, where an adapter works there): valid for any base, quantised or
    offloaded. A parameter that its module uses itself (norms, fused and expert weights) is replaced by
    the effective one during each call of the module. Merging replaces it for good, and costs nothing
    afterwards.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.weight = WeightView(target)
        self.adapters: list[Adapter] = []
        self.recorder: Recorder | None = None  # told of each call, for `AdapterSet.check_used`
        self.input: Tensor | None = None  # of the call under way, where adapters changed it
        self.passage: Passage | None = None  # the call under way, where it goes through the weight
        self._hooked = (False, False)  # at all, and on the input
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def add(self, adapter: Adapter) -> None:
        """Lets `adapter` act, after those that are here."""
        self.adapters.append(adapter)
        self._hook()

    def remove(self, adapter: Adapter) -> None:
        """Takes `adapter` away; the layer is as it was once none is left."""
        self.adapters = [one for one in self.adapters if one is not adapter]
        if adapter.gate.merged:
            self.merge()
        self._hook()

    def active(self) -> list[Adapter]:
        """The adapters that act in a call."""
        return [one for one in self.adapters if one.gate.open and one.factor]

    # -- merging ------------------------------------------------------------------------------

    def merge(self) -> float:
        """Writes the adapters whose gate says so into the layer, from the layer's own weight.

        Without any, the layer gets its very own tensors back. Returns the share of the change that the
        layer's precision lost: |stored - exact| / |exact - base| (Frobenius norms), 0 without a change.
        """
        self.weight.restore()
        merged = [one for one in self.adapters if one.gate.merged and one.gate.enabled and one.strength]
        lost = 0.0
        if merged:
            with kept(self.target.device):
                lost = self._write(merged)
        self._hook()
        return lost

    def _write(self, merged: Sequence[Adapter]) -> float:
        weight, bias = effective(merged, self.weight)
        terms = [(term, one.strength) for one in merged if (term := one.terms(self.weight)) is not None]
        if len(terms) == len(merged):
            self.weight.add(terms)
        else:
            self.weight.put(self.weight.in_format(weight, bias))
        change = (weight - wide(self.weight.dense())).norm()
        return float((weight - wide(self.weight.stored())).norm() / change) if change else 0.0

    # -- hooks --------------------------------------------------------------------------------

    def _hook(self) -> None:
        """Puts on the hooks that are needed now: none where everything is merged.

        What torch.compile has traced never looks at hooks again. So they stay on when something is merged after
        that (the gate, which they ask, is looked at), and where they change, everything is traced anew.
        """
        outside = self.adapters if is_traced() else [one for one in self.adapters if not one.gate.merged]
        needed = bool(outside), self.target.spec.called and any(one.on_input for one in outside)
        if needed == self._hooked:
            return
        self._hooked = needed
        for handle in self._handles:
            handle.remove()
        self._handles = self._hooks(*needed)
        forget_traces()

    def _hooks(self, any_outside: bool, on_input: bool) -> list[torch.utils.hooks.RemovableHandle]:
        layer = self.target.user or self.target.layer
        if not any_outside:
            return []
        if not self.target.spec.called:
            before = layer.register_forward_pre_hook(Substitute(self))
            return [before, layer.register_forward_hook(Restore(self), always_call=True)]
        handles = [layer.register_forward_pre_hook(ChangeInput(self), with_kwargs=True)] if on_input else []
        passes = may_pass(self.target) and not on_input
        if passes:
            handles.append(layer.register_forward_pre_hook(Enter(self)))
        return [*handles, layer.register_forward_hook(self, with_kwargs=True, always_call=passes)]

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor | None
    ) -> Tensor | None:
        """The forward hook of a called layer."""
        if self.passage is not None:
            passage, self.passage = self.passage, None
            return leave(layer, passage, output)
        if output is None:
            return None  # the call failed
        x, self.input = self.input, None
        base = None if x is not None or self.weight.saved else output  # is it the layer's own output?
        changed = x is not None
        if x is None:
            x = args[0] if args else next(iter(kwargs.values()))
        if self.recorder is not None:
            self.recorder(self, x)
        acting = [one for one in self.active() if not (changed and one.on_input)]
        device = output.device
        if acting and autocasts(device) and output.dtype != torch.get_autocast_dtype(device.type):
            with torch.autocast(device.type, enabled=False):  # a layer that does not follow it (a 4-bit one): nor do we
                return self._act(acting, x, output, base)
        return self._act(acting, x, output, base)

    def _act(self, acting: Sequence[Adapter], x: Tensor, output: Tensor, base: Tensor | None) -> Tensor:
        if any(one.gate.rows is not None for one in acting):
            return mixed_output(acting, x, output, base, self.weight)
        # an adapter may write into y, which is another's base, or what somebody else has of the layer
        y = output.clone() if acting and (len(acting) > 1 or self._is_seen()) else output
        if len(acting) == 1 and base is not None:
            base = y  # a lone adapter takes the same path, copied or not
        for adapter in acting:
            y = adapter(x, y, base, self.weight)
        return y

    def _is_seen(self) -> bool:
        """Whether others may keep the layer's output: another hook, or the layer itself for its backward pass."""
        layer = self.target.layer
        own = isinstance(layer, nn.Linear) and type(layer).forward is not nn.Linear.forward
        return len(layer._forward_hooks) > 1 or (own and not is_quantized(layer))


def is_traced() -> bool:
    """Whether torch.compile has compiled something in this process that is still in use."""
    frames = sys.modules.get("torch._dynamo.convert_frame")  # absent, and not worth importing, without a compile
    return frames is not None and bool(frames.output_codes.seen)


def forget_traces() -> None:
    """To be called where hooks changed: what torch.compile has traced would ignore them without a word."""
    if is_traced():
        torch._dynamo.reset()


class ChangeInput:
    """The pre-hook of a layer with adapters that transform its input."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        self.attachment.input = None  # of a call that failed
        acting = [one for one in self.attachment.active() if one.on_input]
        if not acting or self.attachment.weight.saved:
            return None  # a merged layer no longer has its own weight: `forward` adds to the output instead
        name = next(iter(kwargs), "")
        x = args[0] if args else kwargs[name]
        changed = x
        for adapter in acting:
            delta = adapter.strength * adapter.input_delta(adapter.dropped(x))
            changed = changed + (delta if adapter.gate.rows is None else delta * mixed_rows(adapter.gate.rows, x))
        self.attachment.input = x
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, name: changed})


class Substitute:
    """The pre-hook of a module that uses its parameter itself: it sees the effective one."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(self, user: nn.Module, args: tuple[Any, ...]) -> None:
        if self.attachment.recorder is not None:
            self.attachment.recorder(self.attachment, None)
        acting = self.attachment.active()
        if not acting:
            return
        if self.attachment.weight.saved:  # what is merged acts too: the sum starts at the layer's own weight
            acting = [one for one in self.attachment.adapters if one.gate.enabled and one.strength]
        if any(one.gate.rows is not None for one in acting):
            raise ConfigError(
                f"{self.attachment.target.name} is one weight for the whole batch: an adapter on it cannot act on "
                "some samples only. Leave it out of adapters for mixed batches."
            )
        weight, bias = effective(acting, self.attachment.weight)
        stored, place = self.attachment.weight.as_stored(weight), self.attachment.target.layer.__dict__
        # an entry of __dict__ is found before the registered parameter, which stays what it is
        place[self.attachment.target.parameter] = stored
        if bias is not None:
            place["bias"] = bias.to(stored.dtype)


class Restore:
    """The forward hook that takes a substitute away again, whatever happened in the call."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(self, user: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        place = self.attachment.target.layer.__dict__
        place.pop(self.attachment.target.parameter, None)
        place.pop("bias", None)


def effective(adapters: Sequence[Adapter], weight: WeightView) -> tuple[Tensor, Tensor | None]:
    """The layer's own weight and bias with `adapters` in them, in fp32 or wider; no bias where none changes it."""
    total, bias = wide(weight.dense()), None
    for adapter in adapters:
        total = total + adapter.strength * wide(adapter.delta_weight(weight))
        change = adapter.delta_bias(weight)
        if change is not None:
            own = weight.bias if bias is None else bias
            bias = adapter.strength * wide(change) + (0 if own is None else wide(own))
    return total, bias
