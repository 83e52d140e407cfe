"""The learned blend: fitted coefficients keep each adapter's own effect, and the result is a plain LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import tiny
import torch
from layers import randomise
from torch import Tensor

from studio.adapters import AdapterConfig, AdapterPlan, attach_adapters, inject
from studio.algebra import blend
from studio.algebra.learned import LearnedBlend, prepared
from studio.errors import ConfigError
from studio.families.base import DiffusionFamily, Models
from studio.families.loading import load_base
from studio.formats.state import AdapterState
from trainers.blend import learn_blend

PROMPTS = [["a cat"], ["two dogs, sitting"]]
Case = tuple[DiffusionFamily, Models, list[AdapterState]]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """A base, and two adapters that share a third of what they do; the second on convolutions too."""
    family, models = load_base(str(tiny.folder(request.param)))
    states = []
    for seed, targets in enumerate([("cross-attention", "text-encoder"), ("cross-attention", "convolutions")]):
        plan = AdapterPlan(targets, config=AdapterConfig(rank=4, alpha=2.0))
        adapters = inject(family.prefixes(models), plan, family.roles)
        randomise(adapters, seed)
        states.append(AdapterState(family.name, adapters.state()))
        adapters.detach()
    shared = {
        name: {**entry, "lora_up.weight": entry["lora_up.weight"] + 0.5 * states[0].tensors[name]["lora_up.weight"]}
        | {"lora_down.weight": entry["lora_down.weight"] + 0.5 * states[0].tensors[name]["lora_down.weight"]}
        for name, entry in states[1].tensors.items()
        if name in states[0].tensors
    }
    states[1] = AdapterState(family.name, {**states[1].tensors, **shared})
    yield family, models, prepared(states, [0.5, -0.4])


def applied(family: DiffusionFamily, models: Models, *tensors: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    sets = [attach_adapters(family.prefixes(models), one) for one in tensors]
    prediction = tiny.predict(family, models)
    for one in sets:
        one.detach()
    return prediction


def test_coefficients_scale_the_columns_of_each_change(case: Case) -> None:
    family, models, states = case
    learned = LearnedBlend(family.prefixes(models), states)
    try:
        plain = tiny.predict(family, models)
        for place, one in enumerate(learned.sets):
            for number, (_, adapter) in enumerate(one.items()):
                generator = torch.Generator().manual_seed(1000 * place + number)
                adapter.columns.data.normal_(generator=generator)
        live, exported = tiny.predict(family, models), learned.states()
    finally:
        learned.detach()
    assert torch.allclose(plain, applied(family, models, *(state.tensors for state in states)), atol=1e-5)
    name = next(name for name in states[0].tensors if name in states[1].tensors)
    columns = dict(learned.sets[0].items())[name].columns.detach()
    before, after = (state.tensors[name]["lora_down.weight"] for state in (states[0], exported[0]))
    assert torch.equal(after, before * columns)
    assert (live - plain).abs().max() > 0.05
    assert torch.allclose(applied(family, models, *(state.tensors for state in exported)), live, atol=1e-5)
    assert torch.allclose(applied(family, models, blend(exported, [1.0, 1.0]).tensors), live, atol=1e-5)


def test_learning_keeps_more_of_each_effect_and_leaves_the_base_alone(case: Case) -> None:
    family, models, states = case
    base = tiny.predict(family, models)
    done: list[tuple[int, int]] = []
    found = learn_blend(family, models, states, PROMPTS, steps=15, progress=lambda *step: done.append(step))
    assert done[-1] == (15, 15) and len(done) == 15
    assert torch.equal(tiny.predict(family, models), base)
    assert not any(parameter.requires_grad for part in models.parts.values() for parameter in part.parameters())
    worst_before, worst_after = max(found.before), max(found.after)
    assert worst_after < 0.9 * worst_before
    assert sum(one**2 for one in found.after) < 0.8 * sum(one**2 for one in found.before)
    ups = [
        (one.tensors[name], entry)
        for one, old in zip(found.states, states, strict=True)
        for name, entry in old.tensors.items()
    ]
    assert all(torch.equal(new["lora_up.weight"], old["lora_up.weight"]) for new, old in ups)


def test_learning_is_a_function_of_its_seed() -> None:
    family, models = load_base(str(tiny.folder("sd15")))
    adapters = inject(
        family.prefixes(models), AdapterPlan(("cross-attention",), config=AdapterConfig(rank=2)), family.roles
    )
    randomise(adapters, 1)
    states = [AdapterState("sd", adapters.state())] * 2
    adapters.detach()
    global_stream = torch.random.get_rng_state()
    runs = [learn_blend(family, models, states, PROMPTS, steps=2, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), global_stream)
    downs = [torch.cat([one["lora_down.weight"].flatten() for one in run.states[0].tensors.values()]) for run in runs]
    assert torch.equal(downs[0], downs[1]) and not torch.equal(downs[0], downs[2])


def test_what_cannot_be_learned_is_one_clear_error(case: Case) -> None:
    family, models, states = case
    with pytest.raises(ConfigError, match="2 adapters and prompts for 1"):
        learn_blend(family, models, states, PROMPTS[:1])
    none = AdapterState(family.name, {"unet.conv_in": {"diff": torch.ones(8, 4, 3, 3)}})
    with pytest.raises(ConfigError, match=r"1 of the 1 layers of adapter 2 are not low-rank.*studio resize"):
        prepared([states[0], none], [1.0, 1.0])
    token = AdapterState(family.name, states[0].tensors, embeddings={"<ink>": {"text_encoder": torch.ones(1, 16)}})
    with pytest.raises(ConfigError, match="<ink>"):
        prepared([token, states[1]], [1.0, 1.0])
    name = next(iter(states[1].tensors))
    entry = states[1].tensors[name]
    silent = AdapterState(family.name, {name: {**entry, "lora_up.weight": torch.zeros_like(entry["lora_up.weight"])}})
    with pytest.raises(ConfigError, match="adapter 2 changes nothing on 'two dogs"):
        learn_blend(family, models, [states[0], silent], PROMPTS)
    strange = AdapterState(family.name, {"unet.nowhere": entry})
    with pytest.raises(ConfigError, match=r"1 layers are not in the base: unet\.nowhere"):
        learn_blend(family, models, [states[0], strange], PROMPTS)
