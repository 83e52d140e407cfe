"""`studio generate`: pictures from prompts, with any number of LoRAs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from studio.commands.flags import Json
from studio.terminal import emit

if TYPE_CHECKING:
    from studio.diffusion.generate import GenerateRequest
    from studio.families.base import DiffusionFamily, Models

DEFAULT_LORA_DIRS = [Path("loras"), Path("runs")]
PROMPT_HELP = "What to draw; (word:1.2) weighs, <lora:name:0.8> applies a LoRA."
MODEL_HELP = '"builtin", a hub id, a diffusers folder or a .safetensors checkpoint.'
CONFIG_HELP = "A diffusers folder that lends a single checkpoint file its configurations and tokenizers."
GUIDANCE_HELP = "Guidance scale; 1 is none. (default 3 for the built-in base, 7 for others)"
LORA_HELP = "A file, folder or hub id, with an optional strength; repeat for more."
PREDICTION_HELP = "What the base predicts; auto reads it from the base, which a single checkpoint file may not say."
Precision = Literal["auto", "fp32", "fp16", "bf16"]
PredictionType = Literal["auto", "epsilon", "v_prediction"]


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help=PROMPT_HELP)],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "builtin",
    model_config: Annotated[str | None, typer.Option(help=CONFIG_HELP)] = None,
    prediction_type: Annotated[PredictionType, typer.Option(help=PREDICTION_HELP)] = "auto",
    lora: Annotated[list[str] | None, typer.Option(help=LORA_HELP, metavar="FILE[:strength]")] = None,
    lora_dir: Annotated[
        list[Path] | None, typer.Option(help="Where <lora:name> looks for files. (default loras and runs)")
    ] = None,
    negative: Annotated[str, typer.Option(help="What to keep out of the pictures.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of a prompt's first picture; the next add 1.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Sampler steps.", min=1)] = 25,
    guidance: Annotated[float | None, typer.Option(help=GUIDANCE_HELP, min=0)] = None,
    sampler: Annotated[str, typer.Option(help="Sampler, by A1111's name.")] = "DPM++ 2M",
    width: Annotated[int | None, typer.Option(help="Pixels; without it, the base's own size.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; without it, the base's own size.")] = None,
    clip_skip: Annotated[int, typer.Option(help="Last text encoder layers to leave out.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Pictures for each prompt.", min=1)] = 1,
    precision: Annotated[Precision, typer.Option(help="Precision of the computation.")] = "auto",
    output_dir: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    as_json: Json = False,
) -> None:
    """Draw pictures from prompts.

    Each PNG says how it was made, and which LoRAs acted.
    """
    from studio.devices import best_device, precision_dtype
    from studio.diffusion.generate import GenerateRequest
    from studio.diffusion.lora import wanted_loras
    from studio.families.loading import load_base

    folders = [folder for folder in lora_dir or DEFAULT_LORA_DIRS if folder.is_dir()]
    if guidance is None:
        guidance = 3.0 if model == "builtin" else 7.0
    jobs = []
    for prompt in prompts:
        text, wanted = wanted_loras(prompt, lora or [], folders)
        request = GenerateRequest(text, negative, seed, steps, guidance, sampler, width, height, clip_skip, batch)
        jobs.append((request, wanted))
    device = best_device()
    family, models = load_base(model, precision_dtype(precision, device), model_config, prediction_type)
    for part in models.parts.values():
        part.to(device)
    output_dir.mkdir(parents=True, exist_ok=True)
    pictures = [picture for job in jobs for picture in _draw(family, models, *job, output_dir)]
    emit({"pictures": pictures}, "\n".join(str(picture["file"]) for picture in pictures), as_json)


def _draw(
    family: DiffusionFamily, models: Models, request: GenerateRequest, wanted: list[tuple[str, float]], folder: Path
) -> list[dict[str, Any]]:
    """Draws one request and saves its pictures; says where, and what acted."""
    from studio.diffusion.generate import generate as draw
    from studio.diffusion.lora import check_mentioned, loras
    from studio.diffusion.metadata import save_png
    from studio.progress import show_steps

    made = []
    with loras(family, models, wanted) as applied, show_steps(request.prompt) as progress:
        check_mentioned(applied, [request.prompt, request.negative_prompt])
        for index, image in enumerate(draw(family, models, request, progress)):
            file = _unused(folder, request.prompt, request.seed + index)
            base = Path(models.source).name.removesuffix(".safetensors")  # a hub id may end in "-1.0"
            save_png(image, file, request, applied, index, base)
            acted = [{"name": one.name, "strength": one.strength, "layers": one.layers} for one in applied]
            made.append({"file": file, "prompt": request.prompt, "seed": request.seed + index, "loras": acted})
    return made


def _unused(folder: Path, prompt: str, seed: int) -> Path:
    """`0007-a-red-fox-42.png`: the next number, so that no picture is overwritten."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "picture"
    numbers = [int(file.name[:4]) for file in folder.glob("[0-9][0-9][0-9][0-9]-*.png")]
    return folder / f"{max(numbers, default=0) + 1:04d}-{slug}-{seed}.png"
