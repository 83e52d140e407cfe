"""The proof of the design: a method written here, one class and nothing else, does all that the others do."""

from __future__ import annotations

import inspect
import math
import sys
from pathlib import Path

import pytest
import test_methods as invariants
import test_train_sd as training
import tiny
import torch
from layers import LAYERS, close, randomise
from safetensors.torch import load_file
from test_train_sd import _own_cache as _own_cache  # a fixture
from test_train_sd import pictures as pictures  # a fixture
from torch import Tensor, nn

from studio import cli
from studio.adapters import METHODS, Adapter, AdapterConfig, LayerSpec, WeightView, attach_adapters, named_targets
from studio.adapters.entries import filled
from studio.algebra import combine
from studio.errors import ConfigError
from studio.families.loading import load_base
from studio.formats import AdapterState, read_adapter, write_adapter
from studio.formats.describe import describe_adapter
from trainers import sd


class Toy(Adapter):
    """dW = sin(a b^T): two vectors make a matrix of full rank. `toy_a` (out,), `toy_b` (in * kernel,)."""

    method = "toy"
    kinds = frozenset({"linear", "conv", "embedding", "norm", "experts"})
    needed = frozenset({"toy_a", "toy_b"})

    def __init__(self, spec: LayerSpec, config: AdapterConfig) -> None:
        super().__init__(spec, config)
        self.toy_a = nn.Parameter(torch.zeros(spec.weight_shape[0]))
        self.toy_b = nn.Parameter(torch.zeros(math.prod(spec.weight_shape[1:])))

    def reset(self, generator: torch.Generator, weight: WeightView) -> None:
        nn.init.normal_(self.toy_a, generator=generator)
        nn.init.zeros_(self.toy_b)

    def delta_weight(self, weight: WeightView) -> Tensor:
        return torch.outer(self.toy_a, self.toy_b).sin().reshape(weight.shape)

    def export(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @classmethod
    def from_export(cls, spec: LayerSpec, tensors: dict[str, Tensor]) -> Toy:
        return filled(cls(spec, AdapterConfig(cls.method)), tensors)


del METHODS["toy"]  # other tests run over the methods that ship


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", Toy)


INVARIANTS = [
    (function, {"method": "toy", **({"kind": kind} if kind else {})})
    for name, function in vars(invariants).items()
    if name.startswith("test_") and "method" in inspect.signature(function).parameters
    for kind in (LAYERS if "kind" in inspect.signature(function).parameters else (None,))
]


@pytest.mark.parametrize(
    ("invariant", "arguments"),
    INVARIANTS,
    ids=[f"{function.__name__}-{arguments.get('kind', 'any')}" for function, arguments in INVARIANTS],
)
def test_it_passes_every_invariant(invariant, arguments) -> None:
    invariant(**arguments)


def test_the_invariants_are_all_there() -> None:
    assert len(INVARIANTS) >= 7 * len(LAYERS) + 2


def config(pictures: Path, tmp_path: Path):
    adapter = {"method": "toy", "dropout": 0, "targets": ["attention", "convolutions", "*.norm2"]}
    return training.config(pictures, tmp_path, adapter=adapter)


def test_it_trains_saves_and_loads(pictures: Path, tmp_path: Path) -> None:
    result = training.trained(config(pictures, tmp_path))
    assert result.file is not None
    tensors = load_file(result.file)
    assert {key.partition(".")[2] for key in tensors} == {"toy_a", "toy_b"}
    assert all(tensor.any() for tensor in tensors.values()), "b left its zeros"
    assert all(check.used == 0 for check in result.checks), "no other tool reads it, and the check says so"
    family, models = load_base(str(tiny.folder("sd15")))
    base, state = tiny.predict(family, models), read_adapter(result.file)
    attach_adapters(family.prefixes(models), state.tensors)
    assert not close(tiny.predict(family, models), base)
    facts = describe_adapter(result.file)
    assert (facts["method"], facts["metadata"]["ss_network_module"]) == ("toy", "studio.adapters")


def test_what_was_trained_is_what_is_loaded(pictures: Path, tmp_path: Path) -> None:
    task = sd.build_task(config(pictures, tmp_path), torch.device("cpu"))
    randomise(task.adapters)
    ours = tiny.predict(task.family, task.models)
    file = task.save(tmp_path / "toy", 1)
    task.adapters.detach()
    assert not close(tiny.predict(task.family, task.models), ours)
    attach_adapters(task.family.prefixes(task.models), read_adapter(file).tensors)
    assert close(tiny.predict(task.family, task.models), ours)


def test_it_blends(pictures: Path, tmp_path: Path) -> None:
    task = sd.build_task(config(pictures, tmp_path), torch.device("cpu"))
    modules, states = task.family.prefixes(task.models), []
    for seed in (1, 2):
        randomise(task.adapters, seed)
        states.append(task.state(1))
    task.adapters.detach()
    sets = [attach_adapters(modules, one.tensors, weight) for one, weight in zip(states, (0.7, -0.4), strict=True)]
    both = tiny.predict(task.family, task.models)
    for one in sets:
        one.detach()
    with pytest.raises(ConfigError, match="'toy' is known only with the base"):
        combine(states, [0.7, -0.4])
    bases = {name: WeightView(target) for name, target in named_targets(modules).items()}
    blend = combine(states, [0.7, -0.4], bases=bases)
    attach_adapters(modules, read_adapter(write_adapter(blend, tmp_path / "blend")).tensors)
    assert close(tiny.predict(task.family, task.models), both)


def test_the_command_line_takes_it(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-sd", "--model", str(tiny.folder("sd15")), "--data", str(pictures), "--resolution", "64"]
    command += ["--method", "toy", "--rank", "4", "--set", "adapter.overrides.*.to_q={method: lora}"]
    monkeypatch.setattr(sys, "argv", ["studio", *command, "--dry-run"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)
    plan = capsys.readouterr().out
    assert "toy rank 4" in plan and "lora rank 4" in plan


def test_a_file_of_it_is_refused_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"toy_a": torch.ones(2), "toy_b": torch.ones(2)}
    file = write_adapter(AdapterState("sd", {"unet.conv_in": entry}), tmp_path / "toy")
    monkeypatch.delitem(METHODS, "toy")
    with pytest.raises(ConfigError, match="toy_a"):
        read_adapter(file)
