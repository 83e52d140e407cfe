"""PEFT folders of every method that peft has in an equal form: loaded there, the model computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import tiny_transformers
import torch
from layers import close, config_of, randomise
from peft.tuners.randlora.config import RandLoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from studio.adapters import METHODS, AdapterPlan, attach_adapters, inject, named_targets
from studio.errors import ConfigError
from studio.families import FAMILIES
from studio.families.base import DiffusionFamily, Models
from studio.families.loading import load_base
from studio.formats import read_adapter, write_adapter
from studio.formats.peft.table import PEFT_METHODS
from studio.formats.state import AdapterState

KERNELS = ("conv_in", "conv_out", "conv1", "conv2", "samplers.0.conv", "pos_embed.proj")
EMBEDDINGS = ("_embedding", "shared", "embed_tokens", "relative_attention_bias")
ALIKE = ("hira", "miss", "vera", "randlora", "c3a", "oftv2")  # one rank for all layers, or sizes instead of ranks
OPTIONS: dict[str, dict[str, Any]] = {"oftv2": {"block_size": 4}, "tokens": {"token_ids": (158, 189)}}  # "a" and "cat"
MORE = {  # further settings: the method, its options
    "lokr both": ("lokr", {"decompose_both": True}),
    "lokr full": ("lokr", {"full_matrix": True}),
    "lokr tucker": ("lokr", {"tucker": True, "factor": 2}),
    "loha tucker": ("loha", {"tucker": True}),
    "ia3 on inputs": ("ia3", {"gate": "input"}),
    "oftv2 by number": ("oftv2", {}),
    "oftv2 shared": ("oftv2", {"block_size": 2, "block_share": True, "neumann_terms": 3}),
    "oftv2 exact": ("oftv2", {"block_size": 8, "neumann_terms": 0}),
    "c3a small": ("c3a", {"block_size": 4}),
    "vera seeded": ("vera", {"seed": 3}),
}
CASES = {**{method: (method, OPTIONS.get(method, {})) for method in PEFT_METHODS}, **MORE}


def targets(modules: dict[str, nn.Module], method: str, options: dict[str, Any]) -> list[str]:
    """The layers that the method can adapt both here and in peft."""
    names = []
    for name, target in named_targets(modules).items():
        if target.spec.kind == "norm" or (name.endswith(EMBEDDINGS) and method not in ("lora", "oftv2", "tokens")):
            continue
        if (method == "oftv2" and name.endswith(KERNELS)) or (method == "tokens" and "token_embedding" not in name):
            continue
        if "relative_attention_bias" in name or ("embed_tokens" in name and method != "lora"):
            continue
        if method in ("vera", "randlora") and not name.startswith(("unet.", "transformer.")):
            continue
        with suppress(ConfigError):
            METHODS[method].check(target.spec, config_of(method, options))
            names.append(name)
    return names


def adapted(modules: dict[str, nn.Module], method: str, options: dict[str, Any]) -> Any:
    """Random factors; of the methods whose layers may differ, one layer in three has rank 2 and alpha 3."""
    names = targets(modules, method, options)
    overrides = {} if method in ALIKE else {name: {"rank": 2, "alpha": 3.0} for name in names[::3]}
    plan = AdapterPlan(tuple(names), config=config_of(method, options), overrides=overrides)
    adapters = inject(modules, plan, {})
    randomise(adapters)
    return adapters


def in_peft(parts: dict[str, nn.Module], folder: Path, run: Callable[[dict[str, nn.Module]], Tensor]) -> Tensor:
    """What `run` gives for the parts, copied, under the folder's adapters in peft: all of its tensors are used."""
    parts = dict(parts)
    for subfolder in folder.iterdir():
        model = peft.PeftModel.from_pretrained(copy.deepcopy(parts[subfolder.name]), subfolder)
        saved = load_file(subfolder / "adapter_model.safetensors")
        loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        assert loaded.keys() >= saved.keys()
        parts[subfolder.name] = model
    return run(parts)


@pytest.fixture(scope="module")
def sd() -> tuple[DiffusionFamily, Models]:
    return load_base(str(tiny.folder("sd15")))


@pytest.mark.parametrize("case", CASES)
def test_stable_diffusion_computes_the_same_in_peft(case, sd, tmp_path):
    family, models = sd
    method, options = CASES[case]
    base = tiny.predict(family, models)
    adapters = adapted(family.prefixes(models), method, options)
    ours = tiny.predict(family, models)
    state = AdapterState(family.name, adapters.state())
    adapters.detach()
    folder = write_adapter(state, tmp_path / "adapter", "peft")
    assert not close(base, ours)

    def run(parts: dict[str, nn.Module]) -> Tensor:
        return tiny.predict(family, Models(parts, models.tokenizers, models.scheduler, models.source, models.info))

    assert close(in_peft(models.parts, folder, run), ours)


@pytest.mark.parametrize("method", [name for name in PEFT_METHODS if name != "tokens"])
@pytest.mark.parametrize("name", tiny_transformers.FAMILIES)
def test_transformers_compute_the_same_in_peft(name, method, tmp_path):
    family, models = FAMILIES[name], tiny_transformers.models(name)
    modules = {"transformer": models.parts["transformer"]}
    base = tiny_transformers.predict(name, models)
    adapters = adapted(modules, method, {"block_size": 2} if method == "oftv2" else {})
    ours = tiny_transformers.predict(name, models)
    state = AdapterState(family.name, adapters.state())
    adapters.detach()
    folder = write_adapter(state, tmp_path / "adapter", "peft")
    assert not close(base, ours)
    theirs = in_peft(modules, folder, lambda parts: tiny_transformers.predict(name, Models(parts, {}, {}, "")))
    assert close(theirs, ours)


QKV = ["attn1.to_q", "attn2.to_v", "to_out.0"]
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=QKV, alpha_pattern={"to_q": 3}),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=QKV, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=[*QKV, "conv1"], use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=2, target_modules=[*QKV, "conv1"], use_effective_conv2d=True),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=[*QKV, "conv1"], decompose_both=True),
    "ia3": lambda: peft.IA3Config(target_modules=QKV, feedforward_modules=["attn1.to_q"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=QKV),
    "hira": lambda: peft.HiraConfig(r=4, target_modules=QKV),
    "miss": lambda: peft.MissConfig(r=4, target_modules=QKV),
    "c3a": lambda: peft.C3AConfig(block_size=4, target_modules=QKV),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=QKV, projection_prng_key=5),
    "randlora": lambda: RandLoraConfig(r=4, randlora_alpha=2, target_modules=QKV, projection_prng_key=7),
}


def saved_by_peft(unet: nn.Module, config: peft.PeftConfig, folder: Path) -> nn.Module:
    """peft's model around a copy of `unet`, its adapter random, and saved."""
    model = peft.get_peft_model(copy.deepcopy(unet), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CONFIGS)
def test_what_peft_saves_computes_the_same_here(case, sd, tmp_path):
    family, models = sd
    theirs = saved_by_peft(models.parts["unet"], CONFIGS[case](), tmp_path)
    expected = tiny.predict(family, replace(models, parts={**models.parts, "unet": theirs}))
    base = tiny.predict(family, models)
    adapters = attach_adapters(family.prefixes(models), read_adapter(tmp_path).tensors)
    ours = tiny.predict(family, models)
    adapters.detach()
    assert close(ours, expected) and not close(ours, base)


UNREADABLE: dict[str, tuple[Callable[[], peft.PeftConfig], str]] = {
    "road": (lambda: peft.RoadConfig(target_modules=QKV, group_size=4), "of the type ROAD; .* can be read"),
    "boft": (lambda: peft.BOFTConfig(boft_block_size=4, target_modules=QKV), "of the type BOFT"),
    "pissa": (lambda: peft.LoraConfig(r=4, target_modules=QKV, init_lora_weights="pissa"), "peft has changed"),
    "coft": (lambda: peft.OFTConfig(oft_block_size=4, target_modules=QKV, coft=True), "coft"),
    "no projections": (lambda: peft.VeraConfig(r=4, target_modules=QKV, save_projection=False), "save_projection=True"),
    "sparse": (lambda: RandLoraConfig(r=4, target_modules=QKV, sparse=True), "not those of its projection_prng_key"),
    "bias": (lambda: peft.LoraConfig(r=4, target_modules=["to_out.0"], bias="lora_only"), r"keys .*base_layer\.bias"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_has_no_equal_form_here_is_refused(case, sd, tmp_path):
    make, message = UNREADABLE[case]
    saved_by_peft(sd[1].parts["unet"], make(), tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_adapter(tmp_path)
