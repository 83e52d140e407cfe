"""Every method in every format for every family: the same bytes come back, or the format refuses and says why."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_transformers
import torch
from layers import config_of, randomise
from torch import Tensor

from studio.adapters import METHODS, AdapterPlan, inject, named_targets
from studio.errors import ConfigError
from studio.families import FAMILIES
from studio.families.loading import load_base
from studio.formats import FORMATS, read_adapter, write_adapter
from studio.formats.original import layer_names, original_name
from studio.formats.peft.settings import is_embedding
from studio.formats.peft.table import PEFT_METHODS
from studio.formats.state import AdapterState

FUSED = ("kohya", "comfyui")  # formats with the original code's layers, of which some are several of diffusers'
NO_FORM_FUSED = {"lokr", "shira", "vera", "randlora", "mora", "boft", "oftv2", "tokens"}
SHOWS_OUTPUTS = {"lora", "dora", "diff", "hira", "loha", "c3a"}  # how many to an input, which tells SD3's last block
ONE_FOR_ALL = {"hira", "miss", "vera", "randlora"}  # PEFT has one rank for all layers of a component
FOLDED = {"hira_B": "hira_A", "miss_block": "miss_block"}  # PEFT has no scale: a factor, and what tells its rank
OPTIONS = {"tokens": {"token_ids": (4, 7)}, "oft": {"block_size": 2}, "oftv2": {"block_size": 2}, "boft": {}}
PLACES = (
    *("attn2.to_k", "attn2.to_out.0", "ff.net.2", "resnets.0.conv1", "conv_shortcut", "conv_in", "conv_norm_out"),
    *("transformer_blocks.0.norm2", "attentions.0.proj_in", "fc1", "layer_norm1", "token_embedding"),
)


@functools.cache
def modules_of(family: str) -> dict[str, torch.nn.Module]:
    if family in tiny_transformers.FAMILIES:
        models = tiny_transformers.models(family)
    else:
        models = load_base(str(tiny.folder({"sd": "sd15"}.get(family, family))))[1]
    return FAMILIES[family].prefixes(models)


@functools.cache
def state_of(family: str, method: str, alike: bool = False) -> AdapterState:
    """Random factors on layers of all kinds, alpha = rank / 2; two ranks, unless all are `alike`."""
    names: dict[int, list[str]] = {4: [], 2: []}
    config = config_of(method, OPTIONS.get(method))
    for place, (name, target) in enumerate(named_targets(modules_of(family)).items()):
        if family in tiny_transformers.FAMILIES or name.endswith(PLACES):
            with suppress(ConfigError):
                METHODS[method].check(target.spec, config)
                names[2 if place % 3 == 0 and not alike else 4].append(name)
    plan = AdapterPlan(
        (*names[4], *names[2]), config=config, overrides={name: {"rank": 2, "alpha": 1.0} for name in names[2]}
    )
    adapters = inject(modules_of(family), plan, {})
    randomise(adapters)
    state = adapters.state()
    adapters.detach()
    return AdapterState(family, state, {"ss_output_name": "tiny", "ss_seed": "1"})


def is_fused(format: str, family: str) -> bool:
    return format in FUSED and family in tiny_transformers.FAMILIES


def fused_with(name: str, family: str) -> bool:
    """Whether the original code has several of diffusers' layers in this one, or its outputs in another order."""
    original = original_name(name, family)
    assert original is not None
    return len(layer_names(original, family)) > 1 or name.endswith(("norm1_context.linear", "norm_out.linear"))


def held(state: AdapterState, format: str) -> AdapterState:
    """The layers for which the format has names; for random matrices in PEFT, those of one component."""
    (method, *_) = state.methods
    own = {name: entry for name, entry in state.tensors.items() if FORMATS[format].has_name(name, state.family)}
    if format == "peft" and method in ("vera", "randlora"):
        own = {name: entry for name, entry in own.items() if name.startswith(("unet.", "transformer."))}
    if format == "peft" and method in ("ia3", "dora"):
        own = {name: entry for name, entry in own.items() if not is_embedding(name)}
    if format == "peft" and method == "oftv2":
        own = {name: entry for name, entry in own.items() if "conv_in" not in name and ".conv1" not in name}
        own = {name: entry for name, entry in own.items() if "pos_embed" not in name}
    if is_fused(format, state.family) and method in NO_FORM_FUSED:
        own = {name: entry for name, entry in own.items() if not fused_with(name, state.family)}
    if is_fused(format, state.family) and method not in SHOWS_OUTPUTS:
        own = {name: entry for name, entry in own.items() if not name.endswith("norm1_context.linear")}
    return AdapterState(state.family, own, state.metadata)


def promised(format: str, methods: set[str]) -> bool:
    """Whether the format can hold these methods, on layers that it has names for."""
    if format == "peft":
        return methods <= PEFT_METHODS.keys()
    return format != "diffusers" or methods <= {"lora", "dora"}


LAYERS = [name for name in FORMATS if name != "embedding"]  # that one holds no layers
CASES = [(family, format, method) for family in FAMILIES for format in LAYERS for method in METHODS]


@pytest.mark.parametrize(("family", "format", "method"), CASES)
def test_the_same_bytes_come_back_or_the_format_refuses(family, format, method, tmp_path):
    alike = (method in ONE_FOR_ALL and format == "peft") or (method == "miss" and is_fused(format, family))
    state = held(state_of(family, method, alike), format)
    if not promised(format, set(state.methods)):
        check_refused(state, format, tmp_path)
    elif state.tensors:
        again = read_adapter(write_adapter(state, tmp_path / "file", format))
        assert again.family == family and again.metadata["ss_seed"] == "1"
        expected = {name: folded(one) if format == "peft" else one for name, one in state.tensors.items()}
        assert again.tensors.keys() == expected.keys()
        assert [name for name, entry in expected.items() if not same(entry, again.tensors[name])] == []
    else:
        assert not any(FORMATS[format].has_name(name, family) for name in state_of(family, method).tensors)


@pytest.mark.parametrize("format", FUSED)
@pytest.mark.parametrize("method", sorted(NO_FORM_FUSED))
@pytest.mark.parametrize("family", tiny_transformers.FAMILIES)
def test_methods_without_a_form_for_fused_layers_are_refused_there(family, method, format, tmp_path):
    names = [name for name in state_of(family, method).tensors if name.endswith(("attn.to_q", "attn.to_k"))]
    tensors = {name: state_of(family, method).tensors[name] for name in names}
    if tensors:
        check_refused(AdapterState(family, tensors), format, tmp_path)


@pytest.mark.parametrize("format", LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_tokens_come_along_or_are_refused(family, format, tmp_path):
    lora = held(state_of(family, "lora"), format)
    encoders = [name for name in FAMILIES[family].components if name.startswith("text_encoder")]
    vectors = {name: torch.rand(3, 16) for name in encoders}
    state = replace(lora, embeddings={"ink-style": vectors})
    if format in ("diffusers", "peft"):
        with pytest.raises(ConfigError, match=r"no place for trained tokens \(ink-style\): use one of"):
            write_adapter(state, tmp_path / "file", format)
        return
    again = read_adapter(write_adapter(state, tmp_path / "file", format))
    assert again.tensors.keys() == state.tensors.keys()
    assert again.embeddings.keys() == {"ink-style"} and same(vectors, again.embeddings["ink-style"])


def check_refused(state: AdapterState, format: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot hold .*(use one of the formats|bake it)|has no names .*Choose"):
        write_adapter(state, folder / "file", format)
    assert list(folder.iterdir()) == []


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.shape == other[suffix].shape and torch.equal(tensor, other[suffix]) for suffix, tensor in one.items()
    )


def folded(entry: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """With the scale in a factor and alpha = rank."""
    for factor, ranked in FOLDED.items():
        if factor in entry:
            rank = len(entry[ranked])
            return {**entry, factor: entry[factor] * (entry["alpha"] / rank), "alpha": torch.tensor(float(rank))}
    return entry
