"""Finding and loading a base: the built-in one, a hub id, a diffusers folder or a single file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from studio.errors import ConfigError
from studio.families.base import FAMILIES, DiffusionFamily, Models
from studio.paths import assets

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# what diffusers and the hub raise for a part that is not there, or damaged
LOAD_ERRORS = (OSError, ValueError, SafetensorError)


def load_base(
    source: str, dtype: torch.dtype = torch.float32, config: str | None = None
) -> tuple[DiffusionFamily, Models]:
    """The family of a base and its models, on the CPU, in eval mode, without gradients.

    `source` is "builtin", a hub id, a diffusers folder or a `.safetensors` checkpoint; `config` is a
    diffusers folder that lends a single file its configurations and tokenizers. Raises ConfigError
    for a base that is not there, that is damaged, or that no family knows.
    """
    place = str(assets() / "base") if source == "builtin" else source
    if source == "builtin" and not Path(place).is_dir():
        raise ConfigError(f"the built-in base is not at {place}; reinstall the package, or build it")
    family = FAMILIES[family_of(place)]
    assert isinstance(family, DiffusionFamily)
    models = family.load(place, dtype, config)
    models.source = source
    return family, models


def family_of(source: str) -> str:
    """The family's name, read from `model_index.json` or from a checkpoint's keys; see `load_base`."""
    path = Path(source)
    if path.is_file():
        return _family_of_checkpoint(path)
    kind = str(_pipeline_config(path, source).get("_class_name"))
    if kind.startswith("StableDiffusionXL"):
        return "sdxl"
    if kind.startswith("StableDiffusion") and not kind.startswith("StableDiffusion3"):
        return "sd"
    raise ConfigError(f"{source} is a {kind}; bases of the families {', '.join(FAMILIES)} are supported")


def _pipeline_config(path: Path, source: str) -> dict[str, Any]:
    if path.is_dir():
        index = path / "model_index.json"
        if not index.is_file():
            raise ConfigError(f"{path} has no model_index.json: give the top folder of a diffusers pipeline")
        try:
            return json.loads(index.read_text(encoding="utf-8"))
        except ValueError as problem:
            raise ConfigError(f"{index} is damaged: {problem}") from problem
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or path.suffix:
        raise ConfigError(
            f"there is no model at {path.absolute()}; give a diffusers folder, a .safetensors file, a hub id "
            "such as stable-diffusion-v1-5/stable-diffusion-v1-5, or builtin"
        )
    from diffusers import DiffusionPipeline

    try:
        return dict(DiffusionPipeline.load_config(source))
    except LOAD_ERRORS as problem:
        raise ConfigError(_not_on_hub(source, problem)) from problem


def _not_on_hub(source: str, problem: Exception) -> str:
    reason = str(problem).strip().splitlines()[0]
    return (
        f"the model '{source}' is neither a folder here ({Path(source).absolute()}) nor could it be had from the "
        f"hub: {reason} Check the name and the connection, or give a local folder."
    )


def _family_of_checkpoint(path: Path) -> str:
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is not a .safetensors file; checkpoints of other kinds can run code when opened")
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as problem:
        raise ConfigError(f"{path} cannot be read: {problem}") from problem
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise ConfigError(f"{path} is not a full checkpoint (no model.diffusion_model.* keys); is it an adapter?")
    return "sdxl" if any(key.startswith("conditioner.embedders.1.") for key in keys) else "sd"


def load_pipeline(
    kind: str, source: str, dtype: torch.dtype, config: str | None, left_out: tuple[str, ...] = ()
) -> Models:
    """The parts of a diffusers pipeline of class `kind`, less `left_out`; see `DiffusionFamily.load`."""
    import diffusers
    import transformers

    pipeline_class = getattr(diffusers, kind)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, **dict.fromkeys(left_out)}
    try:
        if Path(source).is_file():
            pipeline = pipeline_class.from_single_file(source, config=config, **options)
        else:
            pipeline = pipeline_class.from_pretrained(source, **options)
    except LOAD_ERRORS as problem:
        raise ConfigError(_cannot_load(source, config, problem)) from problem
    return _models(pipeline, source, dtype)


def _cannot_load(source: str, config: str | None, problem: Exception) -> str:
    reason = str(problem).strip().splitlines()[0]
    if Path(source).is_file() and config is None:
        return (
            f"{source} cannot be loaded: {reason} A single file holds no tokenizer, which comes from the hub the "
            "first time: connect once, or name a local diffusers folder of the same architecture as its config."
        )
    if Path(source).exists():
        return f"{source} cannot be loaded: {reason}"
    return _not_on_hub(source, problem)


def _models(pipeline: DiffusionPipeline, source: str, dtype: torch.dtype) -> Models:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    for part in parts.values():
        part.requires_grad_(False).eval()
    if dtype == torch.float16 and parts["vae"].config.get("force_upcast"):
        parts["vae"].float()  # SDXL's VAE overflows in fp16
    info = {"force_zeros_for_empty_prompt": pipeline.config.get("force_zeros_for_empty_prompt", False)}
    return Models(parts, dict(_tokenizers(pipeline)), dict(pipeline.scheduler.config), source, info)


def _tokenizers(pipeline: DiffusionPipeline) -> Iterable[tuple[str, Any]]:
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part is not None:
            yield name.replace("tokenizer", "text_encoder"), part
