"""Loads adapter files with the LoRA code of a ComfyUI checkout alone, in a process of its own, and says what it does.

Arguments as for `consume_with_diffusers.py`, with the checkout's folder last; writes for each file: the keys that it
does not load, and layer -> change of its weight. Its own names of the base's weights are those that its tables of
diffusers' names give; nothing else of ComfyUI runs.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file

UNETS = {
    "sd15": {
        "num_res_blocks": [2, 2],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
    },
    "sdxl": {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 1, 1, 2, 2],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        "transformer_depth_middle": 2,
    },
}
FLUX = {"depth": 2, "depth_single_blocks": 2, "hidden_size": 16}
ENCODERS = {
    "sd15": {"text_encoder": "clip_l"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
}


class Stub(types.ModuleType):
    """A module of ComfyUI that the LoRA code imports for names that do not matter here: all are different classes."""

    def __getattr__(self, name):
        found = type(name, (), {})
        setattr(self, name, found)
        return found


def slots(kind, weights):
    """(component, diffusers' name) -> (ComfyUI's key, rows in it, change of order) for the weights of a base."""
    import comfy.utils

    if kind == "flux":
        table = comfy.utils.flux_to_diffusers(FLUX, output_prefix="diffusion_model.")
    else:
        table = {ours: f"diffusion_model.{own}" for ours, own in comfy.utils.unet_to_diffusers(UNETS[kind]).items()}
    found = {}
    for component, name in weights:
        if component in ENCODERS[kind]:
            clip = "text_model." if name.startswith(("encoder.layers.", "embeddings.", "final_")) else ""
            encoder = ENCODERS[kind][component]
            clip = "" if encoder == "t5xxl" else clip
            found[component, name] = (f"{encoder}.transformer.{clip}{name}", None, None)
        elif name in table:
            own = table[name]
            found[component, name] = (own, None, None) if isinstance(own, str) else (*own, None)[:3]
    return found


def read_base(folder):
    """(component, name) -> weight of a diffusers folder."""
    weights = {}
    for component in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        for file in sorted(Path(folder, component).glob("*.safetensors")):
            weights |= {(component, name): tensor for name, tensor in load_file(file).items()}
    return weights


def in_comfyui(weights, places):
    """ComfyUI's key -> weight, fused where several have a part in it."""
    parts = {}
    for ours, (key, rows, order) in places.items():
        tensor = weights[ours] if order is None else order(weights[ours])
        parts.setdefault(key, []).append((rows[1] if rows else 0, tensor))
    return {key: torch.cat([tensor for _, tensor in sorted(own, key=lambda one: one[0])]) for key, own in parts.items()}


@torch.no_grad()
def consume(job):
    import comfy.lora

    weights = read_base(job["base"])
    places = slots(job["kind"], weights)
    model = in_comfyui(weights, places)
    made = comfy.model_base.Flux if job["kind"] == "flux" else comfy.model_base.SDXL
    stand_in = made()
    stand_in.state_dict = lambda: model
    stand_in.model_config = types.SimpleNamespace(unet_config=FLUX if job["kind"] == "flux" else UNETS[job["kind"]])
    names = comfy.lora.model_lora_keys_clip(stand_in, comfy.lora.model_lora_keys_unet(stand_in, {}))
    tensors = load_file(job["file"])
    missed = []
    comfy.lora.logging = types.SimpleNamespace(warning=missed.append, info=print)
    patches = comfy.lora.load_lora(dict(tensors), names)
    changed = {key: tensor.clone() for key, tensor in model.items()}
    for target, patch in patches.items():
        key, rows, order = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
        given = [(1.0, patch, 1.0, rows, order)]
        changed[key] = comfy.lora.calculate_weight(given, changed[key], key, original_weights=None)
    changes = {}
    for (component, name), (key, rows, order) in places.items():
        change = changed[key] - model[key]
        change = change.narrow(*rows) if rows else change
        if name.endswith(".weight") and change.any():
            clip = "text_model." if key.startswith("clip") and not name.startswith("text_") else ""
            changes[f"{component}.{clip}{name.removesuffix('.weight')}"] = order(change) if order else change
    unused = [key for key in tensors if any(key == message.rpartition(" ")[2] for message in missed)]
    return {"changes": changes, "unused": unused}


def main(jobs, inputs, output, tests, checkout):
    torch.set_num_threads(1)
    sys.path.append(checkout)
    import comfy

    for name in ("model_base", "cli_args", "model_management"):
        module = sys.modules[f"comfy.{name}"] = Stub(f"comfy.{name}")
        setattr(comfy, name, module)
    comfy.cli_args.args = Stub("args")
    comfy.model_management.cast_to_device = lambda tensor, device, dtype, copy=False: tensor.to(dtype, copy=copy)
    results = [consume(job) for job in json.loads(jobs)]
    ours = [name for name in sys.modules if name.partition(".")[0] in ("studio", "trainers")]
    torch.save({"results": results, "ours": ours}, output)


main(*sys.argv[1:])
