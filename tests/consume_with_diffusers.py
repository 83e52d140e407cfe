"""Loads adapter files with diffusers alone, in a process of its own, and says what they do.

Run with a JSON list of {kind, base, file, drop} and an output path; writes a torch file with, for each,
the noise prediction, and with "drop" the largest change that switching off each module makes.
"""

from __future__ import annotations

import json
import sys

import diffusers
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

PROMPTS = ["a cat", "two dogs, sitting"]


def encode(pipeline, kind):
    encoded = pipeline.encode_prompt(
        prompt=PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(2, 1)
    return encoded[0], {"text_embeds": encoded[2], "time_ids": sizes} if kind == "sdxl" else None


def predict(pipeline, text):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    return pipeline.unet(latents, torch.tensor([40, 700]), text[0], added_cond_kwargs=text[1]).sample


def changes(pipeline, kind, whole):
    """Component.module -> largest change of the prediction without that module (the others fused, for speed)."""
    found = {}
    text = encode(pipeline, kind)
    pipeline.fuse_lora()
    for component in ("unet", "text_encoder", "text_encoder_2"):
        for name, layer in getattr(pipeline, component, torch.nn.Module()).named_modules():
            if isinstance(layer, BaseTunerLayer):
                weight = layer.get_base_layer().weight
                (adapter,) = layer.scaling
                kept = weight.clone()
                weight.sub_(layer.get_delta_weight(adapter))
                without = predict(pipeline, text if component == "unet" else encode(pipeline, kind))
                weight.copy_(kept)
                found[f"{component}.{name}"] = (without - whole).abs().max().item()
    return found


@torch.no_grad()
def main(jobs, output):
    torch.set_num_threads(1)
    results = []
    for job in jobs:
        kind = "StableDiffusionXLPipeline" if job["kind"] == "sdxl" else "StableDiffusionPipeline"
        pipeline = getattr(diffusers, kind).from_pretrained(job["base"])
        pipeline.load_lora_weights(job["file"])
        whole = predict(pipeline, encode(pipeline, job["kind"]))
        results.append({"prediction": whole, "changes": changes(pipeline, job["kind"], whole) if job["drop"] else {}})
    ours = [name for name in sys.modules if name.partition(".")[0] in ("studio", "trainers")]
    torch.save({"results": results, "ours": ours}, output)


main(json.loads(sys.argv[1]), sys.argv[2])
