"""New and loaded adapters on the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from studio.adapters.adapter_set import AdapterSet
from studio.adapters.base import METHODS, Adapter, AdapterConfig, method_of
from studio.adapters.layers import Target, WeightView
from studio.adapters.quantized import allow_gradients
from studio.adapters.targets import AdapterPlan, Roles, match_targets, named_targets
from studio.errors import ConfigError
from studio.seeds import sample_generator


def _adapter(target: Target, config: AdapterConfig, seed: int) -> Adapter:
    try:
        allow_gradients(target.layer)
        adapter = METHODS[config.method](target.spec, config)
    except ConfigError as problem:
        raise ConfigError(f"{target.name}: {problem}") from problem
    device = target.device
    if device.type != "meta":  # there: names and shapes of a model, without memory
        adapter.reset(sample_generator(seed, target.name), WeightView(target))
    return adapter if device.type == "cpu" else adapter.to(device)


def inject(modules: Mapping[str, nn.Module], plan: AdapterPlan, roles: Roles, seed: int = 0) -> AdapterSet:
    """New adapters on every layer that `plan` chooses, attached, in fp32, with dW = 0.

    `modules` maps the prefix of full names to a model ("unet" -> the U-Net); `seed` fixes the
    initialisation layer by layer, whatever else is adapted. The base does not train: freezing it is the
    caller's, and methods take its weight as a constant.
    """
    chosen = match_targets(modules, plan, roles)
    adapters = {name: _adapter(target, config, seed) for name, (target, config) in chosen.items()}
    return AdapterSet({name: target for name, (target, _) in chosen.items()}, adapters, seed).attach()


def attach_adapters(
    modules: Mapping[str, nn.Module], tensors: Mapping[str, Mapping[str, Tensor]], strength: float = 1.0
) -> AdapterSet:
    """The adapter of a file on a model: `tensors` as in `AdapterSet.state`; each layer's method shows in its suffixes.

    Raises ConfigError listing the first five layers that this model does not have.
    """
    targets = named_targets(modules)
    missing = [name for name in tensors if name not in targets]
    if missing:
        raise ConfigError(
            f"{len(missing)} of the file's {len(tensors)} layers are not in this model: "
            f"{', '.join(missing[:5])}. The file is for another base."
        )
    adapters = {name: adapter_of_entry(targets[name], entry) for name, entry in tensors.items()}
    adapter_set = AdapterSet({name: targets[name] for name in tensors}, adapters).attach()
    adapter_set.set_strength(strength)
    adapter_set.eval()
    return adapter_set


def adapter_of_entry(target: Target, entry: Mapping[str, Tensor]) -> Adapter:
    """The adapter of one layer's entry in a file. Raises ConfigError where none is written so, or it does not fit."""
    method = method_of(frozenset(entry))
    if method is None:
        raise ConfigError(f"{target.name}: no method has the entries {', '.join(sorted(entry))}")
    try:
        return method.from_export(target.spec, dict(entry)).to(target.device)
    except ConfigError as problem:
        raise ConfigError(f"{target.name}: {problem}") from problem
