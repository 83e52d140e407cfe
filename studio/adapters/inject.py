"""Choosing target layers, attaching adapters to them, and the `AdapterSet` that owns the adapters.

The model is never rebuilt: each target layer gets one forward hook, a callable object that holds
its adapter. Taking the hooks off leaves every tensor, class and key as it was.
"""

from __future__ import annotations

import fnmatch
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from studio.adapters.base import (
    METHODS,
    Adapter,
    AdapterConfig,
    DropoutMasks,
    LayerSpec,
    SampleKeys,
    WeightView,
    describe,
)
from studio.errors import ConfigError, nearest
from studio.seeds import sample_generator, seed_of

Roles = Mapping[str, tuple[str, ...]]
"""Role name ("attention") -> regular expressions over full layer names, matched whole."""


@dataclass(frozen=True)
class AdapterPlan:
    """Which layers get which adapter.

    `targets` and `exclude` hold role names of the family ("attention"), globs over full layer
    names ("unet.mid_block.*.to_q"; without a wildcard, the end of a name: "to_q"), or regular
    expressions after "re:". `overrides` maps such a pattern to fields of `AdapterConfig` that
    differ there; a later entry wins.
    """

    targets: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    config: AdapterConfig = field(default_factory=AdapterConfig)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def named_layers(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Full name -> layer, for every layer an adapter can sit on; `modules` maps a name prefix to a model."""
    return {
        f"{prefix}.{path}": layer
        for prefix, module in modules.items()
        for path, layer in module.named_modules()
        if path and describe(layer) is not None
    }


def _select(pattern: str, names: Iterable[str], roles: Roles) -> set[str]:
    """The names that one pattern means; raises ConfigError with near misses when there are none."""
    names = list(names)
    if pattern in roles:
        expressions = [re.compile(expression) for expression in roles[pattern]]
        found = {name for name in names if any(expression.fullmatch(name) for expression in expressions)}
    elif pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as problem:
            raise ConfigError(f"target '{pattern}' is not a regular expression: {problem}") from problem
        found = {name for name in names if expression.fullmatch(name)}
    elif any(sign in pattern for sign in "*?["):
        found = set(fnmatch.filter(names, pattern))
    else:
        found = {name for name in names if name == pattern or name.endswith("." + pattern)}
    if not found:
        ends = {".".join(name.split(".")[-depth:]) for name in names for depth in (1, 2)}
        known = ", ".join(sorted(roles)) or "none"
        raise ConfigError(
            f"target '{pattern}' matches none of the {len(names)} layers."
            f"{nearest(pattern, [*roles, *ends])} Roles of this family: {known}."
        )
    return found


def match_targets(
    modules: Mapping[str, nn.Module], plan: AdapterPlan, roles: Roles
) -> dict[str, tuple[nn.Module, AdapterConfig]]:
    """Full layer name -> (layer, its settings), in the order of the model.

    Raises ConfigError for a target, exclusion or override that matches nothing.
    """
    layers = named_layers(modules)
    chosen: set[str] = set()
    for pattern in plan.targets:
        chosen |= _select(pattern, layers, roles)
    for pattern in plan.exclude:
        chosen -= _among(chosen, pattern, layers, roles, "exclusion")
    configs = dict.fromkeys(chosen, plan.config)
    for pattern, changes in plan.overrides.items():
        unknown = set(changes) - set(AdapterConfig.__dataclass_fields__)
        if unknown:
            key = sorted(unknown)[0]
            raise ConfigError(
                f"override '{pattern}' has an unknown setting '{key}'."
                f"{nearest(key, AdapterConfig.__dataclass_fields__)}"
            )
        for name in _among(chosen, pattern, layers, roles, "override"):
            configs[name] = replace(configs[name], **changes)
    if not chosen:
        raise ConfigError("no layer is left to adapt: the exclusions remove every target")
    return {name: (layer, configs[name]) for name, layer in layers.items() if name in chosen}


def _among(chosen: set[str], pattern: str, layers: Iterable[str], roles: Roles, what: str) -> set[str]:
    """The chosen layers that a pattern means; raises ConfigError where there are none."""
    found = _select(pattern, layers, roles) & chosen
    if not found:
        raise ConfigError(f"the {what} '{pattern}' touches none of the {len(chosen)} layers that the targets choose")
    return found


class Attachment:
    """The forward hook of one layer. A plain object, so that a deep copy of the model copies it too."""

    def __init__(self, adapter: Adapter, weight: WeightView) -> None:
        self.adapter = adapter
        self.weight = weight
        self.enabled = True
        self.calls = 0

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        self.calls += 1
        if not self.enabled or self.adapter.strength == 0:
            return output
        x = args[0] if args else kwargs["input"]
        return self.adapter(x, output, self.weight)


_MERGED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Layers whose weight carries an adapter: a second merge would make the first one's saved weight wrong."""


class AdapterSet(nn.Module):
    """One adapter over many layers: its parameters, and the hooks that make it act.

    `names` are full layer names ("unet.mid_block.attentions.0.proj_in"), the keys of a state.
    """

    def __init__(self, layers: Mapping[str, nn.Module], adapters: Mapping[str, Adapter]) -> None:
        super().__init__()
        self.layers = dict(layers)
        for layer in self.layers.values():
            _refuse_compiled(layer)
        self.names = list(adapters)
        self.adapters = nn.ModuleList(adapters.values())
        self.keys = SampleKeys()
        for name, adapter in self.items():
            adapter.dropout_masks = DropoutMasks(self.keys, seed_of("dropout", name))
        self._attachments: dict[str, Attachment] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._base_weights: dict[str, Tensor] = {}

    def items(self) -> Iterator[tuple[str, Adapter]]:
        """(full layer name, adapter) for every target."""
        return zip(self.names, self.adapters, strict=True)  # type: ignore[arg-type]

    # -- acting on the model ------------------------------------------------------------------

    def attach(self) -> AdapterSet:
        """Makes the adapters act on their layers. Returns itself."""
        if self._hooks:
            raise RuntimeError("the adapters are attached already")
        for name, adapter in self.items():
            layer = self.layers[name]
            hook = Attachment(adapter, WeightView(layer, adapter.spec))
            self._attachments[name] = hook
            self._hooks.append(layer.register_forward_hook(hook, with_kwargs=True))
        return self

    def detach(self) -> None:
        """Takes the hooks off; the model is again what it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._attachments.clear()

    @torch.no_grad()
    def merge(self) -> None:
        """Adds strength * dW to every base weight; `unmerge` puts the saved weights back bit for bit.

        Raises RuntimeError when merged already. The hooks pause while the weights carry the adapter.
        """
        taken = [name for name, layer in self.layers.items() if layer in _MERGED]
        if taken:
            raise RuntimeError(f"an adapter is merged into {taken[0]} already: unmerge it first")
        for name, adapter in self.items():
            layer = self.layers[name]
            delta = adapter.strength * adapter.delta_weight(WeightView(layer, adapter.spec)).float()
            self._base_weights[name] = layer.weight.detach().clone()
            layer.weight.copy_(layer.weight.float() + delta)
            _MERGED.add(layer)
        self._enable(False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the base weights that `merge` saved, bit for bit."""
        for name, weight in self._base_weights.items():
            self.layers[name].weight.copy_(weight)
            _MERGED.discard(self.layers[name])
        self._base_weights.clear()
        self._enable(True)

    def _enable(self, enabled: bool) -> None:
        for attachment in self._attachments.values():
            attachment.enabled = enabled

    def set_strength(self, strength: float) -> None:
        """Multiplies the adapter's effect: 0 switches it off, 1 is as trained, negative inverts."""
        for _, adapter in self.items():
            adapter.strength = strength

    def set_keys(self, keys: Iterable[int]) -> None:
        """The sample keys of the next forward pass, one for each sample, for dropout."""
        self.keys.values = tuple(keys)

    def check_used(self, run: Callable[[], Any]) -> None:
        """Calls `run` (one forward pass) and raises ConfigError naming adapters that never acted.

        A layer whose weight is used without calling it (a fused projection,
        `nn.MultiheadAttention.out_proj`) would train nothing, and say nothing.
        """
        before = {name: attachment.calls for name, attachment in self._attachments.items()}
        with torch.no_grad():
            run()
        unused = [name for name, attachment in self._attachments.items() if attachment.calls == before[name]]
        if unused:
            raise ConfigError(
                f"{len(unused)} adapted layers take no part in a forward pass, so their adapters would not "
                f"train: {', '.join(unused[:5])}. Exclude them, or unfuse the projections of this model."
            )

    # -- training -----------------------------------------------------------------------------

    def penalty(self) -> Tensor | None:
        """The sum of the methods' own loss terms, or None where no adapter has one."""
        terms = [term for _, adapter in self.items() if (term := adapter.penalty()) is not None]
        return torch.stack(terms).sum() if terms else None

    def after_step(self, step: int) -> None:
        """To be called after each optimizer step."""
        for _, adapter in self.items():
            adapter.after_step(step)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups, one for each learning rate among the targets; `lr` where none is set.

        Each has a `name` for the metrics: "lr" for `lr` itself, "lr(1e-05)" for another.
        """
        groups: dict[float, list[nn.Parameter]] = {}
        for _, adapter in self.items():
            rate = lr if adapter.config.lr is None else adapter.config.lr
            groups.setdefault(rate, []).extend(adapter.parameters())
        return [
            {"params": parameters, "lr": rate, "name": "lr" if rate == lr else f"lr({rate:g})"}
            for rate, parameters in groups.items()
        ]

    # -- files --------------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Full layer name -> on-disk suffix -> a copy of the tensor, on the CPU."""
        return {
            name: {suffix: tensor.detach().cpu().clone() for suffix, tensor in adapter.export().items()}
            for name, adapter in self.items()
        }


def _refuse_compiled(layer: nn.Module) -> None:
    """A layer that torch.compile has traced would ignore our hook without a word."""
    if getattr(layer, "_compiled_call_impl", None) is not None:
        raise ConfigError("the model is compiled already, and would ignore adapters: attach them, then compile")


def _adapter(name: str, layer: nn.Module, config: AdapterConfig, seed: int) -> Adapter:
    spec = describe(layer)
    assert spec is not None, name
    adapter = METHODS[config.method](spec, config)
    if layer.weight.device.type == "meta":  # names and shapes of a model, without memory
        return adapter.to("meta")
    adapter.reset(sample_generator(seed, name))
    return adapter.to(layer.weight.device)


def inject(modules: Mapping[str, nn.Module], plan: AdapterPlan, roles: Roles, seed: int = 0) -> AdapterSet:
    """New adapters on every layer that `plan` chooses, attached, in fp32, with dW = 0.

    `modules` maps the prefix of full names to a model ("unet" -> the U-Net); `seed` fixes the
    initialisation layer by layer, whatever else is adapted. Freezing the base is the caller's.
    """
    targets = match_targets(modules, plan, roles)
    layers = {name: layer for name, (layer, _) in targets.items()}
    adapters = {name: _adapter(name, layer, config, seed) for name, (layer, config) in targets.items()}
    return AdapterSet(layers, adapters).attach()


def attach_adapters(
    modules: Mapping[str, nn.Module], method: str, tensors: Mapping[str, Mapping[str, Tensor]], strength: float = 1.0
) -> AdapterSet:
    """The adapter of a file on a model: `tensors` as in `AdapterSet.state`.

    Raises ConfigError listing the first five layers that this model does not have.
    """
    layers = named_layers(modules)
    missing = [name for name in tensors if name not in layers]
    if missing:
        raise ConfigError(
            f"{len(missing)} of the file's {len(tensors)} layers are not in this model: "
            f"{', '.join(missing[:5])}. The file is for another base."
        )
    specs: dict[str, LayerSpec] = {name: describe(layers[name]) for name in tensors}  # type: ignore[misc]
    adapters: dict[str, Adapter] = {}
    for name, entry in tensors.items():
        try:
            adapters[name] = METHODS[method].from_export(specs[name], dict(entry)).to(layers[name].weight.device)
        except ConfigError as problem:
            raise ConfigError(f"{name}: {problem}") from problem
    adapter_set = AdapterSet({name: layers[name] for name in tensors}, adapters).attach()
    adapter_set.set_strength(strength)
    adapter_set.eval()
    return adapter_set
