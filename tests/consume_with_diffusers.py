"""Loads adapter files with diffusers alone, in a process of its own, and says what they do.

Run with a JSON list of {kind, base, file}, a torch file of each kind's inputs, and an output path; writes a torch
file with, for each: every component's output, layer -> change of its weight, and why the file was refused.
"""

from __future__ import annotations

import copy
import functools
import json
import sys

import diffusers
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
PIPELINES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "flux": "FluxPipeline"}
LEFT_OUT = {"flux": ("scheduler", "vae", "tokenizer", "tokenizer_2")}  # of the tiny pipelines


def weights(pipeline):
    """Full layer name -> its weight, under PEFT's wrapping too."""
    found = {}
    for component in COMPONENTS:
        module = getattr(pipeline, component, None)
        for name, parameter in [] if module is None else module.named_parameters():
            if "lora_" not in name and name.endswith(".weight"):
                path = name.replace(".base_layer", "").removesuffix(".weight")
                flat_clip = component != "unet" and path.startswith("encoder.layers.")  # since transformers 5
                found[f"{component}.{'text_model.' * flat_clip}{path}"] = parameter.clone()
    return found


@functools.cache
def loaded(kind, base):
    left_out = dict.fromkeys(LEFT_OUT.get(kind, ()))
    return getattr(diffusers, PIPELINES[kind]).from_pretrained(base, **left_out)


def consume(job, inputs):
    from component_outputs import outputs

    pipeline = copy.deepcopy(loaded(job["kind"], job["base"]))
    before = weights(pipeline)
    try:
        pipeline.load_lora_weights(job["file"])
    except Exception as problem:
        return {"refused": repr(problem)}
    found = outputs(pipeline, inputs[job["kind"]])
    for component in COMPONENTS:
        for layer in getattr(pipeline, component, torch.nn.Module()).modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
    after = weights(pipeline)
    changes = {name: after[name] - weight for name, weight in before.items()}
    return {"outputs": found, "changes": {name: one for name, one in changes.items() if one.any()}, "refused": ""}


@torch.no_grad()
def main(jobs, inputs, output, tests):
    torch.set_num_threads(1)
    sys.path.append(tests)
    inputs = torch.load(inputs)
    results = [consume(job, inputs) for job in json.loads(jobs)]
    ours = [name for name in sys.modules if name.partition(".")[0] in ("studio", "trainers")]
    torch.save({"results": results, "ours": ours}, output)


main(*sys.argv[1:])
