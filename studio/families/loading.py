"""Finding and loading a base: the built-in one, a hub id, a diffusers folder or a single file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from studio.errors import ConfigError
from studio.families.base import FAMILIES, DiffusionFamily, Models
from studio.hub import hub_reason, load_errors
from studio.paths import assets

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_base(
    source: str, dtype: torch.dtype = torch.float32, config: str | None = None, prediction_type: str = "auto"
) -> tuple[DiffusionFamily, Models]:
    """The family of a base and its models, on the CPU, in eval mode, without gradients.

    `source` is "builtin", a hub id, a diffusers folder or a `.safetensors` checkpoint; `config` is a
    diffusers folder that lends a single file its configurations and tokenizers. `prediction_type`
    ("epsilon" or "v_prediction") replaces the base's own, which a single file does not say: diffusers
    takes every Stable Diffusion 2 file for "v_prediction", every SDXL file for "epsilon". Raises
    ConfigError for a base that is not there, that is damaged, that no family knows, or that is of a family of
    names alone.
    """
    place = str(assets() / "base") if source == "builtin" else source
    if source == "builtin" and not Path(place).is_dir():
        raise ConfigError(f"the built-in base is not at {place}; reinstall the package, or build it")
    family = FAMILIES[family_of(place)]
    if not isinstance(family, DiffusionFamily):
        able = ", ".join(name for name, one in FAMILIES.items() if isinstance(one, DiffusionFamily))
        raise ConfigError(
            f"{source} is of the family '{family.name}', which is not supported yet for training and generating: those "
            f"are {able}. Its adapters can be checked, converted and merged"
        )
    models = family.load(place, dtype, config)
    _check(family, models, source)
    models.source = source
    if prediction_type != "auto":
        models.scheduler["prediction_type"] = prediction_type
    return family, models


def _check(family: DiffusionFamily, models: Models, source: str) -> None:
    """Refuses pipelines of the family's classes that do something else: a refiner, inpainting, upscaling, ..."""
    if missing := [name for name in family.components if name not in models.parts]:
        raise ConfigError(f"{source} has no {' and no '.join(missing)}: such variants are not supported yet")
    takes, given = models.parts["unet"].config.in_channels, models.parts["vae"].config.latent_channels
    if takes != given:
        raise ConfigError(
            f"the U-Net of {source} takes {takes} channels where the VAE's latents have {given}: "
            "inpainting and other variants are not supported yet. Give a text-to-image base."
        )


# how the names of a family's pipelines begin, the longest first
_PIPELINES = {"StableDiffusionXL": "sdxl", "StableDiffusion3": "sd3", "StableDiffusion": "sd", "FluxPipeline": "flux"}
_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # a hub id may end in ".0", as SDXL's does
_BLOCKS = {"double_blocks.0.": "flux", "joint_blocks.0.": "sd3"}  # of transformers' own files, and in checkpoints


def family_of(source: str) -> str:
    """The family's name, read from `model_index.json` or from a checkpoint's keys; see `load_base`."""
    path = Path(source)
    if path.is_file():
        return _family_of_checkpoint(path)
    kind = str(_pipeline_config(path, source).get("_class_name"))
    for start, family in _PIPELINES.items():
        if kind.startswith(start):
            return family
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
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or path.suffix in _FILES:
        raise ConfigError(
            f"there is no model at {path.absolute()}; give a diffusers folder, a .safetensors file, a hub id "
            "such as stable-diffusion-v1-5/stable-diffusion-v1-5, or builtin"
        )
    from diffusers import DiffusionPipeline

    try:
        return dict(DiffusionPipeline.load_config(source))
    except load_errors() as problem:
        raise ConfigError(_not_on_hub(source, problem)) from problem


def _not_on_hub(source: str, problem: Exception) -> str:
    return (
        f"the model '{source}' is not a folder here ({Path(source).absolute()}), and the hub did not give it: "
        f"{hub_reason(problem)} Check the name, or give a local folder."
    )


def _family_of_checkpoint(path: Path) -> str:
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is not a .safetensors file; checkpoints of other kinds can run code when opened")
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as problem:
        raise ConfigError(f"{path} cannot be read: {problem}") from problem
    for start, family in _BLOCKS.items():
        if any(key.removeprefix("model.diffusion_model.").startswith(start) for key in keys):
            return family
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise ConfigError(f"{path} is not a full checkpoint (no model.diffusion_model.* keys); is it an adapter?")
    return "sdxl" if any(key.startswith("conditioner.embedders.1.") for key in keys) else "sd"


def load_pipeline(
    kind: str, source: str, dtype: torch.dtype, config: str | None, left_out: tuple[str, ...] = ()
) -> Models:
    """The parts of a diffusers pipeline of class `kind`, less `left_out`; see `DiffusionFamily.load`."""
    return _models(open_pipeline(kind, source, dtype, config, left_out), source, dtype)


def open_pipeline(
    kind: str, source: str, dtype: torch.dtype, config: str | None, left_out: tuple[str, ...] = ()
) -> DiffusionPipeline:
    """The diffusers pipeline itself; arguments and errors as for `load_pipeline`."""
    import diffusers
    import transformers

    pipeline_class = getattr(diffusers, kind)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, **dict.fromkeys(left_out)}
    try:
        if Path(source).is_file():
            return pipeline_class.from_single_file(source, config=config, **options)
        return _from_pretrained(pipeline_class, source, options)
    except load_errors() as problem:
        raise ConfigError(_cannot_load(source, config, problem)) from problem


def _from_pretrained(pipeline_class: Any, source: str, options: dict[str, Any]) -> DiffusionPipeline:
    """A folder, or a hub id; the hub's files of half the size where they are precise enough."""
    if options["dtype"] != torch.float32 and not Path(source).exists():
        with suppress(ValueError):  # the repository has none
            return pipeline_class.from_pretrained(source, variant="fp16", **options)
    return pipeline_class.from_pretrained(source, **options)


def _cannot_load(source: str, config: str | None, problem: Exception) -> str:
    reason = hub_reason(problem)
    if Path(source).is_file() and config is None:
        return (
            f"{source} cannot be loaded: {reason} A single file holds no tokenizer, which comes from the hub the "
            "first time: connect once, or name a local diffusers folder of the same architecture as its config, "
            "with --set model.config=DIR (train) or --model-config DIR (generate)."
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
    parts["vae"].enable_slicing()  # one picture at a time: a batch of them would fill the memory
    info = {"force_zeros_for_empty_prompt": pipeline.config.get("force_zeros_for_empty_prompt", False)}
    return Models(parts, dict(_tokenizers(pipeline)), dict(pipeline.scheduler.config), source, info)


def _tokenizers(pipeline: DiffusionPipeline) -> Iterable[tuple[str, Any]]:
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part is not None:
            yield name.replace("tokenizer", "text_encoder"), part
