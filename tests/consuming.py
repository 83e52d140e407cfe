"""Adapter files for other tools: what they mean by our own reading, and what the tools make of them on their own."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tiny
import tiny_transformers
import torch
from component_outputs import inputs, outputs
from torch import Tensor, nn

from studio.adapters import AdapterConfig, AdapterPlan, WeightView, attach_adapters, inject
from studio.adapters.targets import named_targets
from studio.families import FAMILIES, ModelFamily
from studio.families.base import Models
from studio.families.loading import load_base
from studio.formats import read_adapter, write_adapter
from studio.formats.consumers import ConsumerReport, check_file
from studio.formats.state import AdapterState

TESTS = Path(__file__).parent
KINDS = ("sd15", "sdxl", "sdxl-deep", "flux")
"""The tiny pipelines; the deep one has SDXL's ten transformer blocks, as sd-scripts builds it whatever its width."""

NEEDED = 3e-5
"""Each layer's change moves the outputs by more than this, three times what they may be off."""

# name -> (method, rank, alpha, options) and the (rank, alpha) of the feed-forwards
ADAPTERS: dict[str, tuple[AdapterConfig, tuple[int, float]]] = {
    "lora": (AdapterConfig("lora", 4, 2.0), (3, 2.0)),
    "lora, mixed alphas": (AdapterConfig("lora", 4, 2.0), (3, 5.0)),
    "lora, all layers": (AdapterConfig("lora", 4, 2.0), (3, 5.0)),
    "locon": (AdapterConfig("lora", 4, 2.0), (3, 2.0)),
    "dora": (AdapterConfig("dora", 4, 2.0), (3, 5.0)),
    "loha": (AdapterConfig("loha", 4, 2.0), (3, 5.0)),
    "lokr": (AdapterConfig("lokr", 1, 0.5), (2, 5.0)),
    "oft": (AdapterConfig("oft", options={"block_size": 2, "constraint": 0.02}), (4, 1.0)),
}
MORE: dict[str, tuple[AdapterConfig, tuple[int, float]]] = {
    "dora, input axis": (AdapterConfig("dora", 4, 2.0, options={"norm_axis": "in"}), (3, 5.0)),
    "tucker": (AdapterConfig("tucker", 4, 2.0), (3, 5.0)),
    "oft, rescaled": (AdapterConfig("oft", options={"block_size": 2, "rescaled": True}), (4, 1.0)),
    "boft": (AdapterConfig("boft", 4, options={"constraint": 0.02}), (4, 1.0)),
    "diff": (AdapterConfig("diff"), (1, 1.0)),
}
"""Others, which some tools read in their own way."""


def plan(name: str, family: ModelFamily) -> AdapterPlan:
    """The adapter on all layers that tools have names for."""
    config, (rank, alpha) = (ADAPTERS | MORE)[name]
    targets = ["attention", "feed-forward", "text-encoder"]
    overrides: dict[str, dict[str, Any]] = {"feed-forward": {"rank": rank, "alpha": alpha}}
    overrides["mlp.fc1"] = overrides["feed-forward"]
    if "projections" in family.roles:
        targets.append("projections")
    if name == "lora, all layers":
        targets += [role for role in ("time-embedding", "modulation", "embedders", "output") if role in family.roles]
    if name in ("locon", "tucker"):
        targets.append("convolutions")
        overrides["convolutions"] = {"rank": 3, "alpha": 1.0}
    return AdapterPlan(tuple(targets), config=config, overrides=overrides)


@functools.cache
def folder(kind: str) -> Path:
    """The diffusers folder of a tiny pipeline."""
    if kind in tiny.KINDS:
        return tiny.folder(kind)
    place = Path(tiny.ROOT.name) / kind
    if kind == "flux":
        import diffusers

        rest = dict.fromkeys(("scheduler", "vae", "tokenizer", "tokenizer_2"))
        diffusers.FluxPipeline(**tiny_transformers.models("flux").parts, **rest).save_pretrained(place)
    else:
        pipeline = tiny.pipeline("sdxl")
        pipeline.unet = deep_unet()
        pipeline.save_pretrained(place)
    return place


def deep_unet() -> nn.Module:
    """SDXL's U-Net of width 32, with all its blocks."""
    from diffusers import UNet2DConditionModel

    config = dict(tiny.unet("sdxl").config)
    sizes = {"block_out_channels": (32, 64, 128), "attention_head_dim": (1, 1, 2)}
    with torch.random.fork_rng():
        unet = UNet2DConditionModel(**{**config, **sizes, "transformer_layers_per_block": (1, 2, 10)})
    return tiny.fill(unet, 2)


@functools.cache
def base(kind: str) -> tuple[ModelFamily, Models]:
    """A tiny base, which all share: what is attached to it has to be detached again."""
    return (FAMILIES["flux"], tiny_transformers.models("flux")) if kind == "flux" else load_base(str(folder(kind)))


def adapter(kind: str, name: str) -> AdapterState:
    """An adapter with every factor random."""
    family, models = base(kind)
    adapters = inject(family.prefixes(models), plan(name, family), family.roles)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in adapters.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if "dora_scale" in key:
                parameter.mul_(1 + 0.3 * noise)
            else:
                size = 1.0 if "hada" in key else 0.5  # of LoHa's four factors
                parameter.copy_(size * noise / math.sqrt(parameter[0].numel()))
    adapters.detach()
    return AdapterState(family.name, adapters.state())


@dataclass(frozen=True)
class Case:
    """A file of one adapter for a tiny pipeline. `only`: the components that it has layers of, all without."""

    kind: str
    name: str
    format: str
    only: tuple[str, ...] = ()
    without: str = ""  # layers that are left out of the file, a part of their names

    def __str__(self) -> str:
        return f"{self.kind} {self.name} {self.format}"


@dataclass
class Answer:
    """What a file means by our own reading, what our check says of all tools, and what a tool made of it."""

    outputs: dict[str, Tensor]
    changes: dict[str, Tensor]  # full layer name -> dW
    needed: dict[str, float]
    reports: Mapping[str, ConsumerReport]
    theirs: Mapping[str, Any] = field(default_factory=dict)

    def same_outputs(self) -> bool:
        """Whether all outputs are those that the file means, within 1e-5."""
        pairs = ((output, self.theirs["outputs"][component]) for component, output in self.outputs.items())
        return all(bool((ours - theirs).abs().max() <= 1e-5) for ours, theirs in pairs)

    def deviation(self) -> float:
        """max |dW_tool - dW| over max |dW|, both over all layers."""
        theirs = self.theirs["changes"]
        wrong = max(float((own - theirs.get(name, 0)).abs().max()) for name, own in self.changes.items())
        return wrong / max(float(own.abs().max()) for own in self.changes.values())


def answers(script: str, cases: Sequence[Case], place: Path, *arguments: str) -> dict[Case, Answer]:
    """Our own reading of each case's file, and what a script that imports nothing of ours makes of it."""
    mine, jobs = {}, []
    for number, case in enumerate(cases):
        file = write_adapter(chosen(case), place / f"{number}", case.format)
        mine[case] = understood(case, file)
        jobs.append({"kind": case.kind, "base": str(folder(case.kind)), "file": str(file)})
    given, output = place / "inputs.pt", place / "output.pt"
    torch.save({kind: inputs(kind) for kind in KINDS}, given)
    paths = [str(given), str(output), str(TESTS), *arguments]
    command = [sys.executable, "-I", str(TESTS / script), json.dumps(jobs), *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(output)
    assert found["ours"] == []
    both = zip(mine.items(), found["results"], strict=True)
    return {case: replace(one, theirs=theirs) for (case, one), theirs in both}


def chosen(case: Case) -> AdapterState:
    """The adapter's layers that a case wants in its file."""
    state = adapter(case.kind, case.name)
    wanted = {
        layer: entry
        for layer, entry in state.tensors.items()
        if (not case.only or layer.partition(".")[0] in case.only) and not (case.without and case.without in layer)
    }
    return replace(state, tensors=wanted)


def understood(case: Case, file: Path) -> Answer:
    """What the file means by our own reading of it."""
    family, models = base(case.kind)
    state = read_adapter(file)
    reports = check_file(file, family, models)
    targets = named_targets(family.prefixes(models))
    adapters = attach_adapters(family.prefixes(models), state.tensors)
    with torch.no_grad():
        found = outputs(models.parts, inputs(case.kind))
        changes = {name: one.delta_weight(WeightView(targets[name])) for name, one in adapters.items()}
    adapters.merge()
    needed = importance({name: targets[name].layer.weight for name in changes}, changes, models, case.kind)
    adapters.unmerge()
    adapters.detach()
    return Answer(found, changes, needed, reports)


def importance(
    weights: Mapping[str, Tensor], changes: Mapping[str, Tensor], models: Models, kind: str
) -> dict[str, float]:
    """Layer -> how far the outputs move without its change, to first order.

    That is the most that a few random directions of all outputs show, each of length 1 in the root mean square.
    `weights` have the changes in them.
    """
    for weight in weights.values():
        weight.requires_grad_()
    found = outputs(models.parts, inputs(kind)).values()
    draw = torch.Generator().manual_seed(7)
    moved = dict.fromkeys(weights, 0.0)
    for _ in range(4):
        along = sum((torch.randn(one.shape, generator=draw) / math.sqrt(one.numel()) * one).sum() for one in found)
        gradients = torch.autograd.grad(along, list(weights.values()), retain_graph=True)
        for name, gradient in zip(weights, gradients, strict=True):
            moved[name] = max(moved[name], abs(float((gradient * changes[name]).sum())))
    return moved
