"""Does the demo's LoRA work? `python -m benchmarks.demo_style LORA.safetensors [--work DIR]`.

A small classifier learns the two styles from real pictures; then it judges the base's and the
LoRA's pictures for 100 prompts that are not in the demo dataset. So that mush does not pass, the
shape must still be the right concept: nearest among the base style's real pictures by blurred
distance from white, colour ignored.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assets.build import pictures as source
from assets.build.demo_set import SUBJECTS
from assets.build.similarity import blurred, nearest
from benchmarks.drawing import draw, grid
from benchmarks.report import end
from studio.diffusion.lora import loras, parse_lora
from studio.families.loading import load_base

PROMPTS, SEED = 100, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", help="FILE[:strength]")
    parser.add_argument("--work", type=Path, default=Path(".build"), help="where the picture packages are or go")
    parser.add_argument("--out", type=Path, help="folder for the two sheets")
    options = parser.parse_args()
    folders = source.fetch(options.work)
    noto, lines = source.noto(folders), source.fluent(folders)
    classifier, accuracy = train_classifier(noto, lines)
    others = [picture.name for picture in source.concepts(noto) if picture.name not in SUBJECTS]
    prompts = [others[i] for i in np.random.default_rng(SEED).choice(len(others), PROMPTS, replace=False)]
    family, models = load_base("builtin")
    base = draw(family, models, prompts, SEED)
    with loras(family, models, [parse_lora(options.lora)]):
        styled = draw(family, models, prompts, SEED)
    result = {"classifier_held_out_accuracy": round(accuracy, 4), "prompts": PROMPTS}
    for name, drawn in (("base", base), ("lora", styled)):
        result[f"{name}_new_style"] = round(is_new_style(classifier, drawn).float().mean().item(), 4)
        result[f"{name}_right_shape"] = round(right_shape(drawn, prompts, noto).float().mean().item(), 4)
        if options.out:
            grid(drawn, columns=10).save(options.out / f"held_out_{name}.png")
    result["chance_of_right_shape"] = round(1 / len(noto), 5)
    wanted = {"classifier_held_out_accuracy": 0.95, "lora_new_style": 0.85, "lora_right_shape": 0.4}
    end(result, at_least=wanted, at_most={"base_new_style": 0.05})


def _inputs(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255  # (N, 3, 64, 64)


def train_classifier(noto: list[source.Picture], lines: list[source.Picture]) -> tuple[nn.Module, float]:
    """A four-layer network on real pictures; returns it with its accuracy on the held-out real ones."""
    torch.manual_seed(0)
    widths = (3, 16, 32, 64)
    convolutions = [
        module for i in range(3) for module in (nn.Conv2d(widths[i], widths[i + 1], 5, stride=2, padding=2), nn.ReLU())
    ]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    pools = [np.stack([p.pixels for p in pictures if not p.held_out]) for pictures in (noto, lines)]
    rng = np.random.default_rng(0)
    labels = torch.cat([torch.zeros(32), torch.ones(32)])
    for _ in range(150):
        batch = np.concatenate([pool[rng.integers(len(pool), size=32)] for pool in pools])
        loss = F.binary_cross_entropy_with_logits(model(_inputs(batch)).squeeze(1), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    unseen = [np.stack([p.pixels for p in pictures if p.held_out]) for pictures in (noto, lines)]
    verdicts = [is_new_style(model, pixels) == bool(style) for style, pixels in enumerate(unseen)]
    return model, torch.cat(verdicts).float().mean().item()


@torch.no_grad()
def is_new_style(classifier: nn.Module, pixels: np.ndarray) -> Tensor:
    """(N,) booleans."""
    return classifier(_inputs(pixels)).squeeze(1) > 0


def _shape(pixels: np.ndarray) -> Tensor:
    """Blurred distance from white, of unit length: where something is drawn, whatever its colour. (N, 64, 64)."""
    distance = (1 - blurred(pixels)).square().mean(dim=1).sqrt()
    return F.normalize(distance.flatten(1), dim=1)


def right_shape(drawn: np.ndarray, prompts: list[str], noto: list[source.Picture]) -> Tensor:
    """(N,) booleans: is the nearest real picture of the base's style the one that the prompt names?"""
    found = nearest(_shape(drawn), _shape(np.stack([picture.pixels for picture in noto])))
    return torch.tensor([noto[int(i)].name == prompt for i, prompt in zip(found, prompts, strict=True)])


if __name__ == "__main__":
    main()
