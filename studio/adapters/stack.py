"""Several adapters on one model, by name: which of them act, and how strongly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from studio.adapters.adapter_set import AdapterSet, MergeReport
from studio.adapters.mixed import mixed_batch
from studio.errors import ConfigError, nearest


class AdapterStack(Mapping[str, AdapterSet]):
    """Name -> `AdapterSet`, all on one model. The effects of those that are active add.

    Activating, disabling and choosing rows set one switch for each set: their time does not depend on
    the number of layers (except for sets that are merged), and nothing is made trainable or frozen by
    them. Every method raises ConfigError for a name that is not there, with the nearest ones.
    """

    def __init__(self, sets: Mapping[str, AdapterSet] | None = None) -> None:
        self._sets: dict[str, AdapterSet] = {}
        for name, adapters in (sets or {}).items():
            self.add(name, adapters)

    def __getitem__(self, name: str) -> AdapterSet:
        if name not in self._sets:
            known = ", ".join(self._sets) or "none"
            raise ConfigError(f"no adapter is called '{name}'.{nearest(name, self._sets)} Adapters: {known}.")
        return self._sets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sets)

    def __len__(self) -> int:
        return len(self._sets)

    def __contains__(self, name: object) -> bool:
        return name in self._sets

    # -- members ------------------------------------------------------------------------------

    def add(self, name: str, adapters: AdapterSet) -> AdapterSet:
        """Takes an attached set in, as active as it is, and returns it. Raises ConfigError for a name in use."""
        self._check_free(name)
        self._sets[name] = adapters
        return adapters

    def remove(self, name: str) -> AdapterSet:
        """Takes the set off the model and out of the stack, and returns it."""
        adapters = self[name]
        adapters.detach()
        return self._sets.pop(name)

    def rename(self, name: str, new_name: str) -> None:
        """Gives a set another name; it keeps its place. Raises ConfigError for a name in use."""
        adapters = self[name]
        self._check_free(new_name)
        self._sets = {new_name if one is adapters else known: one for known, one in self._sets.items()}

    def clone(self, name: str, new_name: str) -> AdapterSet:
        """A copy of a set under another name: on the same layers, with parameters of its own, not active."""
        adapters = self[name]
        self._check_free(new_name)
        twin = adapters.clone().attach()
        twin.enabled = False
        return self.add(new_name, twin)

    def _check_free(self, name: str) -> None:
        if name in self._sets:
            raise ConfigError(f"an adapter is called '{name}' already: remove or rename it, or choose another name")

    # -- switching ----------------------------------------------------------------------------

    @property
    def active(self) -> dict[str, float]:
        """Name -> strength of the sets that act."""
        return {name: adapters.gate.strength for name, adapters in self._sets.items() if adapters.enabled}

    def activate(self, chosen: str | Iterable[str] | Mapping[str, float]) -> None:
        """Lets exactly these sets act; a mapping sets their strengths, names keep those that they have."""
        names = [chosen] if isinstance(chosen, str) else list(chosen)
        members = [self[name] for name in names]  # all of them exist, before anything changes
        self._enable_only(members)
        if isinstance(chosen, Mapping):
            for name, strength in chosen.items():
                self[name].set_strength(strength)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without any set of the stack, for the length of a `with` block."""
        with self._only(()):
            yield

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside the block, sample i of each batch is seen by the set `names[i]` alone; None is the base model.

        Sets act with the strengths that they have, active or not. Raises ConfigError, then or in the
        forward pass, where a set cannot act on single samples (a norm, experts).
        """
        choice = [None if name is None else self[name] for name in names]
        with self._only([one for one in choice if one is not None]), mixed_batch(choice):
            yield

    @contextmanager
    def merged(self) -> Iterator[dict[str, MergeReport]]:
        """The active sets merged into the base for the length of a `with` block: name -> what the merge lost."""
        with ExitStack() as stack:
            yield {name: stack.enter_context(self._sets[name].merged()) for name in self.active}

    @contextmanager
    def _only(self, members: Sequence[AdapterSet]) -> Iterator[None]:
        before = {name: adapters.enabled for name, adapters in self._sets.items()}
        self._enable_only(members)
        try:
            yield
        finally:
            for name, enabled in before.items():
                _enable(self._sets[name], enabled)

    def _enable_only(self, members: Sequence[AdapterSet]) -> None:
        for adapters in self._sets.values():
            _enable(adapters, any(adapters is one for one in members))


def _enable(adapters: AdapterSet, enabled: bool) -> None:
    """A merged set is written into the layers anew when it is switched: only where something changes."""
    if adapters.enabled != enabled:
        adapters.enabled = enabled
