"""What a trained file says of itself: kohya's `ss_*` facts of the training, and the studio's own settings."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from studio.config import TrainSDConfig
from studio.data.images import ImageFolder
from studio.families.base import DiffusionFamily, Models
from studio.formats.metadata import as_strings


def training_metadata(
    config: TrainSDConfig, family: DiffusionFamily, models: Models, images: ImageFolder, step: int
) -> dict[str, str]:
    """safetensors strings; `studio.config` holds every setting, with names in place of this machine's paths."""
    train, optimizer = config.train, config.optimizer
    folder = images.path.name
    repeats = sum(item.repeats for item in images.items)
    text_lr = optimizer.text_encoder_lr or optimizer.lr
    facts: dict[str, Any] = {
        "ss_output_name": config.output.name,
        "ss_base_model_version": _base_version(family, models),
        "ss_sd_model_name": Path(config.model.source).name,
        "ss_learning_rate": optimizer.lr,
        "ss_unet_lr": optimizer.lr,
        "ss_text_encoder_lr": text_lr if config.adapter.train_text_encoder else None,
        "ss_optimizer": f"torch.optim.AdamW(weight_decay={optimizer.weight_decay},betas={optimizer.betas})",
        "ss_lr_scheduler": config.schedule.name,
        "ss_lr_warmup_steps": config.schedule.warmup_steps,
        "ss_max_grad_norm": train.max_grad_norm,
        "ss_max_train_steps": train.steps,
        "ss_steps": step,
        "ss_seed": train.seed,
        "ss_total_batch_size": train.batch_size * train.gradient_accumulation,
        "ss_gradient_accumulation_steps": train.gradient_accumulation,
        "ss_gradient_checkpointing": train.gradient_checkpointing,
        "ss_mixed_precision": config.model.precision,
        "ss_num_train_images": repeats,
        "ss_num_reg_images": 0,
        "ss_resolution": f"({config.data.resolution}, {config.data.resolution})",
        "ss_enable_bucket": True,
        "ss_clip_skip": None,
        "ss_min_snr_gamma": config.loss.min_snr_gamma,
        "ss_caption_dropout_rate": config.loss.caption_dropout,
        "ss_network_dropout": config.adapter.dropout or None,
        "ss_dataset_dirs": {folder: {"n_repeats": 1, "img_count": len(images.items)}},
        "ss_tag_frequency": {folder: _tags(images)},
    }
    return {
        **as_strings(facts),
        "modelspec.prediction_type": "v" if family.prediction_type(models) == "v_prediction" else "epsilon",
        "modelspec.title": config.output.name,
        "modelspec.resolution": f"{config.data.resolution}x{config.data.resolution}",
        "studio.config": json.dumps(_shareable(config)),
    }


def _shareable(config: TrainSDConfig) -> dict[str, Any]:
    """All settings, but names in place of this machine's paths: files are passed on."""
    settings = config.model_dump(mode="json")
    for group, key in (("data", "folder"), ("model", "source"), ("model", "config"), ("output", "folder")):
        path = Path(settings[group][key])
        settings[group][key] = path.name if path.is_absolute() else settings[group][key]
    return settings


def _tags(images: ImageFolder) -> dict[str, int]:
    """Comma-separated parts of all captions with their counts, the most frequent first."""
    parts = (part.strip() for item in images.items for part in item.caption.split(","))
    return dict(Counter(part for part in parts if part).most_common())


def _base_version(family: DiffusionFamily, models: Models) -> str:
    """sd-scripts' name of the base, by which A1111 and others filter their lists."""
    if family.name == "sdxl":
        return "sdxl_base_v1-0"
    version = "sd_v2" if models.parts["unet"].config.cross_attention_dim == 1024 else "sd_v1"
    return f"{version}_v" if family.prediction_type(models) == "v_prediction" else version
