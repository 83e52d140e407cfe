"""Loads adapter files with lycoris_lora alone, in a process of its own, and says what they do.

Arguments as for `consume_with_diffusers.py`; writes for each file: every component's output with the network applied,
the layers that it found, and layer -> change of its weight by `merge_to`. The files have the wrapper's names.
"""

from __future__ import annotations

import copy
import functools
import json
import sys

import diffusers
import torch
from lycoris import LycorisNetwork, create_lycoris_from_weights
from safetensors.torch import load_file

PIPELINES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "flux": "FluxPipeline"}
LEFT_OUT = {"flux": ("scheduler", "vae", "tokenizer", "tokenizer_2")}  # of the tiny pipelines
COMPONENTS = ("unet", "transformer", "text_encoder")


class Wrapped(torch.nn.Module):
    """A text encoder under the name that its modules had before transformers 5."""

    def __init__(self, clip):
        super().__init__()
        self.text_model = clip


@functools.cache
def loaded(kind, base):
    left_out = dict.fromkeys(LEFT_OUT.get(kind, ()))
    return getattr(diffusers, PIPELINES[kind]).from_pretrained(base, **left_out)


def pipeline_and_networks(job):
    """A fresh pipeline, and (component, the module that has the names, its network) for each component."""
    pipeline = copy.deepcopy(loaded(job["kind"], job["base"]))
    tensors = load_file(job["file"])
    networks = []
    for component in COMPONENTS:
        if (part := getattr(pipeline, component, None)) is not None:
            module = Wrapped(part) if hasattr(part, "embeddings") else part
            networks.append((component, module, create_lycoris_from_weights(1.0, None, module, tensors)[0].eval()))
    return pipeline, networks


def consume(job, inputs):
    from component_outputs import outputs

    pipeline, networks = pipeline_and_networks(job)
    for _, _, network in networks:
        network.apply_to()
    found = outputs(pipeline, inputs[job["kind"]])
    _, networks = pipeline_and_networks(job)
    changes = {}
    for component, module, network in networks:
        layers = {path.replace(".", "_"): (path, layer) for path, layer in module.named_modules()}
        for adapter in network.loras:
            path, layer = layers[adapter.lora_name.removeprefix("lycoris_")]
            before = layer.weight.clone()
            adapter.merge_to()
            changes[f"{component}.{path}"] = layer.weight - before
    return {"outputs": found, "changes": changes}


@torch.no_grad()
def main(jobs, inputs, output, tests):
    torch.set_num_threads(1)
    sys.path.append(tests)
    inputs = torch.load(inputs)
    LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"]})
    results = [consume(job, inputs) for job in json.loads(jobs)]
    ours = [name for name in sys.modules if name.partition(".")[0] in ("studio", "trainers")]
    torch.save({"results": results, "ours": ours}, output)


main(*sys.argv[1:])
