"""`AdapterSet`: one adapter over many layers, and everything that is done with it as a whole."""

from __future__ import annotations

import copy
import fnmatch
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from studio.adapters.attachment import Attachment
from studio.adapters.base import METHODS, Adapter, Gate
from studio.adapters.dropout import DropoutMasks, SampleKeys
from studio.adapters.layers import Target, version
from studio.adapters.lowrank import SharedReads, may_share
from studio.errors import ConfigError
from studio.seeds import seed_of

_PLACE = "_studio_attachments"  # on a layer: parameter name -> Attachment, shared by all sets


@dataclass(frozen=True)
class MergeReport:
    """What merging lost in the base's precision: layer -> |stored - exact| / |exact - base|, largest first.

    `untied`: layer -> the others that held the very same tensor, and still hold the old one: a model that is
    saved with them as one (`tie_word_embeddings`) would lose the merge.
    """

    lost: Mapping[str, float]
    untied: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        worst = list(self.lost.items())[:3]
        named = ", ".join(f"{name} {share:.2%}" for name, share in worst)
        mean = sum(self.lost.values()) / max(len(self.lost), 1)
        text = f"merged into {len(self.lost)} layers; the precision of the base lost {mean:.2%} of the change ({named})"
        return "; ".join([text, *(f"{name} is untied from {', '.join(rest)}" for name, rest in self.untied.items())])


class AdapterSet(nn.Module):
    """One adapter over many layers: its parameters, and how it acts on the model.

    `names` are full layer names ("unet.mid_block.attentions.0.proj_in"), the keys of a state. Several
    sets may sit on one model: their effects add.
    """

    def __init__(self, targets: Mapping[str, Target], adapters: Mapping[str, Adapter], seed: int = 0) -> None:
        super().__init__()
        self.targets = dict(targets)
        self.seed = seed
        self.names = list(adapters)
        self.adapters = nn.ModuleList(adapters.values())
        self.gate = Gate()
        self.keys = SampleKeys()
        for name, adapter in self.items():
            adapter.gate = self.gate
            adapter.dropout_masks = self._masks(name)
        self.shared = nn.ModuleDict()
        for method, members in self._by_method().items():
            common = METHODS[method].share(members, seed)
            if common is not None:
                self.shared[method] = common
        self.attached = False  # whether the adapters are on their layers

    def items(self) -> Iterator[tuple[str, Adapter]]:
        """(full layer name, adapter) for every target."""
        return zip(self.names, self.adapters, strict=True)  # type: ignore[arg-type]

    def _masks(self, name: str) -> DropoutMasks:
        return DropoutMasks(self.keys, seed_of("dropout", name))

    def _by_method(self) -> dict[str, list[Adapter]]:
        methods: dict[str, list[Adapter]] = defaultdict(list)
        for adapter in self.adapters:
            methods[adapter.method].append(adapter)  # type: ignore[index, arg-type]
        return methods

    def clone(self) -> Self:
        """A set with copies of everything that is the adapter's own, on the very layers of this one; not attached."""
        modules = [module for target in self.targets.values() for module in (target.layer, target.user)]
        twin = copy.deepcopy(self, {id(module): module for module in modules})  # a memo: the base is no copy
        twin.attached, twin.gate.merged, twin.gate.rows = False, False, None
        return twin

    # -- acting on the model ------------------------------------------------------------------

    def attach(self) -> Self:
        """Makes the adapters act on their layers. Returns itself."""
        if self.attached:
            raise RuntimeError("the adapters are attached already")
        for name, adapter in self.items():
            _attachment(self.targets[name]).add(adapter)
        self.attached = True
        return self

    def detach(self) -> None:
        """Takes the adapters off; without others, the model is again what it was, bit for bit."""
        if not self.attached:
            return
        for name, adapter in self.items():
            target = self.targets[name]
            attachment = _attachment(target)
            attachment.remove(adapter)
            if not attachment.adapters:
                _forget(target)
        self.attached = False
        self.gate.merged = False

    def merge(self) -> MergeReport:
        """Puts strength * dW into the base weights: the forward pass then costs what the base's costs.

        `unmerge`, or detaching, gives the layers their very own tensors back. Sets may be merged and
        unmerged in any order. Raises RuntimeError when not attached, merged already, or in a mixed batch, and
        ConfigError for a layer that cannot hold another weight; all layers are then as before.
        """
        if not self.attached or self.gate.merged:
            raise RuntimeError("the adapters are merged already" if self.attached else "attach the adapters first")
        if self.gate.rows is not None:
            raise RuntimeError("the adapters act on some samples of a mixed batch; merged, they would act on all")
        self.gate.merged = True
        try:
            lost = self._write()
        except ConfigError:
            self.unmerge()
            raise
        untied = {name: target.tied for name, target in self.targets.items() if target.tied}
        return MergeReport(dict(sorted(lost.items(), key=lambda item: -item[1])), untied)

    def unmerge(self) -> None:
        """Undoes `merge`, bit for bit; nothing where nothing is merged."""
        if not self.gate.merged:
            return
        self.gate.merged = False
        self._write()

    def _write(self) -> dict[str, float]:
        """Brings the layers in line with the gate and the strengths: layer -> what its precision lost."""
        return {name: _attachment(self.targets[name]).merge() for name in self.names}

    @contextmanager
    def merged(self) -> Iterator[MergeReport]:
        """`merge` for the length of a `with` block: for sampling and evaluating while training."""
        report = self.merge()
        try:
            yield report
        finally:
            self.unmerge()

    @property
    def enabled(self) -> bool:
        """Whether the set acts; setting it takes the same time for any number of layers, unless it is merged."""
        return self.gate.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self.gate.enabled = enabled
        if self.gate.merged:
            self._write()

    def set_strength(self, strength: float, blocks: Mapping[str, float] | None = None) -> None:
        """Multiplies the adapter's effect: 0 switches it off, 1 is as trained, negative inverts.

        `blocks` maps patterns over full layer names (globs) to further factors; a later entry wins, and
        layers that none names have 1. Without `blocks`, layers keep the factors that they have. Raises
        ConfigError for a pattern that matches no layer; all strengths are then as before.
        """
        if blocks is not None:
            factors = dict.fromkeys(self.names, 1.0)
            for pattern, factor in blocks.items():
                found = fnmatch.filter(self.names, pattern)
                if not found:
                    raise ConfigError(f"the strength pattern '{pattern}' matches none of the {len(self.names)} layers")
                factors.update(dict.fromkeys(found, factor))
            for name, adapter in self.items():
                adapter.factor = factors[name]
        self.gate.strength = strength
        if self.gate.merged:
            self._write()

    def set_keys(self, keys: Iterable[int]) -> None:
        """The sample keys of the next forward pass, one for each sample, for dropout."""
        self.keys.values = tuple(keys)

    def check_used(self, run: Callable[[], Any]) -> None:
        """Calls `run` (one forward pass) and raises ConfigError naming adapters that never acted.

        A layer whose weight is used without calling it (half of a fused projection) would train
        nothing, and say nothing. Layers of one module that read the same tensor (q, k, v) compute their
        bottlenecks together from then on. Raises RuntimeError when not attached, or merged.
        """
        if not self.attached or self.gate.merged:
            raise RuntimeError("unmerge the adapters first" if self.attached else "attach the adapters first")
        calls = _Calls(self)
        for name, adapter in self.items():
            adapter.shared = None  # type: ignore[assignment]
            adapter.dropout_masks = self._masks(name)
            _attachment(self.targets[name]).recorder = calls
        try:
            with torch.no_grad():
                run()
        finally:
            for name in self.names:
                _attachment(self.targets[name]).recorder = None
        unused = [name for name in self.names if name not in calls.seen]
        if unused:
            raise ConfigError(
                f"{len(unused)} adapted layers take no part in a forward pass, so their adapters would not "
                f"train: {', '.join(unused[:5])}. Exclude them, or unfuse the projections of this model."
            )
        for group in calls.groups():
            reads = SharedReads(group)
            for adapter in group:
                adapter.shared, adapter.dropout_masks = reads, group[0].dropout_masks

    # -- training -----------------------------------------------------------------------------

    def penalty(self) -> Tensor | None:
        """The sum of the methods' own loss terms, or None where none has one."""
        terms = [METHODS[method].penalty(members) for method, members in self._by_method().items()]
        known = [term for term in terms if term is not None]
        return torch.stack(known).sum() if known else None

    def after_step(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """To be called after each optimizer step, before the gradients are cleared; `step` counts from 0."""
        for method, members in self._by_method().items():
            METHODS[method].after_step(members, step, optimizer)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups, one for each learning rate among the targets; `lr` where none is set.

        Each has a `name` for the metrics: "lr" for `lr` itself, "lr(1e-05)" for another.
        """
        groups: dict[float, list[nn.Parameter]] = {}
        for _, adapter in self.items():
            rate = lr if adapter.config.lr is None else adapter.config.lr
            for parameter, factor in adapter.rates():
                groups.setdefault(rate * factor, []).append(parameter)
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


class _Calls:
    """Which adapters of a set are called in a forward pass, and which of them with the same tensor."""

    def __init__(self, adapter_set: AdapterSet) -> None:
        self._adapters = dict(adapter_set.items())
        self.seen: dict[str, int] = defaultdict(int)
        self._readers: list[tuple[tuple[str, object], weakref.ref[Tensor], list[str]]] = []

    def __call__(self, attachment: Attachment, x: Tensor | None) -> None:
        name = attachment.target.name
        self.seen[name] += 1
        if x is None:
            return
        place = name.rpartition(".")[0], version(x)  # changed in place between two calls, x is another input
        for known, read, names in reversed(self._readers[-8:]):
            if known == place and read() is x:
                names.append(name)
                return
        self._readers.append((place, weakref.ref(x), [name]))

    def groups(self) -> Iterator[list[Any]]:
        """Lists of adapters to read together, in the order of their calls."""
        for _, _, names in self._readers:
            once = [self._adapters[name] for name in names if self.seen[name] == 1]
            if may_share(once):
                yield once


def _attachment(target: Target) -> Attachment:
    """The attachment of a target, made where there is none yet."""
    place = target.layer.__dict__.setdefault(_PLACE, {})
    if target.parameter not in place:
        place[target.parameter] = Attachment(target)
    return place[target.parameter]


def _forget(target: Target) -> None:
    place = target.layer.__dict__[_PLACE]
    del place[target.parameter]
    if not place:
        del target.layer.__dict__[_PLACE]
