"""What a trained file says of itself: kohya's `ss_*` facts of the training, and the studio's own settings.

Files are passed on, so the settings name no folder of the machine that trained: `studio.config` has names in
place of paths, `studio.config.left_out` says where. With those given again, `settings_of` trains the file anew.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from studio import paths
from studio.config import OutputConfig, TrainSDConfig
from studio.data.images import ImageFolder
from studio.errors import ConfigError
from studio.families.base import DiffusionFamily, Models
from studio.formats import read_adapter
from studio.formats.metadata import BLEND, as_strings, parsed, thumbnail

CONFIG, LEFT_OUT = "studio.config", "studio.config.left_out"

log = logging.getLogger(__name__)


def training_metadata(
    config: TrainSDConfig,
    family: DiffusionFamily,
    models: Models,
    images: ImageFolder,
    step: int,
    picture: Path | None = None,
) -> dict[str, str]:
    """safetensors strings. What stands in every caption is the trigger phrase; `picture` becomes the thumbnail."""
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
    settings, left_out = _shareable(config)
    return {
        **as_strings(facts),
        "modelspec.prediction_type": "v" if family.prediction_type(models) == "v_prediction" else "epsilon",
        "modelspec.title": config.output.name,
        "modelspec.resolution": f"{config.data.resolution}x{config.data.resolution}",
        **({"modelspec.trigger_phrase": phrase} if (phrase := _in_every_caption(images)) else {}),
        **({"modelspec.thumbnail": thumbnail(picture)} if picture else {}),
        CONFIG: json.dumps(settings),
        LEFT_OUT: json.dumps(left_out),
    }


def _shareable(config: TrainSDConfig) -> tuple[dict[str, Any], list[str]]:
    """(all settings, the keys of those where a name stands in place of this machine's path).

    Where the runs are kept is nobody's but this machine's, and where the demo is, every installation knows.
    """
    settings = config.model_dump(mode="json")
    settings["output"]["folder"] = OutputConfig().folder
    if config.model.source == "builtin" and Path(config.data.folder) == paths.assets() / "demo":
        settings["data"]["folder"] = ""
    left_out = []
    for group, key in (("data", "folder"), ("model", "source"), ("model", "config")):
        path = Path(settings[group][key])
        if path.is_absolute():
            settings[group][key] = path.name
            left_out.append(f"{group}.{key}")
    return settings, left_out


def settings_of(file: Path, given: Collection[str]) -> dict[str, Any]:
    """The settings that the adapter in a file, or a PEFT folder, was trained with, group by group.

    `given` holds the dotted keys that the user sets. Raises ConfigError for a file that has no settings, and
    where one that is left out of it is not given.
    """
    metadata = read_adapter(file).metadata
    settings, left_out = parsed(metadata, CONFIG), parsed(metadata, LEFT_OUT) or []
    made_of = metadata.get("modelspec.merged_from") if BLEND in metadata else None
    if not settings or not isinstance(settings, dict) or not isinstance(left_out, list):
        reason = f"it was made of others: {made_of}" if made_of else f"it has no valid '{CONFIG}' in its metadata"
        raise ConfigError(f"'{file}' does not say how it was trained: {reason}. Give a .yaml, .toml or .json file")
    if missing := [key for key in left_out if key not in given]:
        raise ConfigError(f"'{file}' names no folders of the machine that trained it: give {_asked(settings, missing)}")
    if made_of:
        log.warning("'%s' was made of %s, which is what these settings train", file, made_of)
    return settings


_FLAGS = {"data.folder": "--data FOLDER", "model.source": "--model FOLDER"}


def _asked(settings: dict[str, Any], keys: list[str]) -> str:
    """ "--data FOLDER (there, it was called 'cats')", and so on."""
    words = []
    for key in keys:
        group, _, name = key.partition(".")
        called = settings.get(group, {}).get(name, "?")
        words.append(f"{_FLAGS.get(key, f'--set {key}=FOLDER')} (there, it was called '{called}')")
    return " and ".join(words)


def _tags(images: ImageFolder) -> dict[str, int]:
    """Comma-separated parts of all captions with their counts, the most frequent first."""
    parts = (part.strip() for item in images.items for part in item.caption.split(","))
    return dict(Counter(part for part in parts if part).most_common())


def _in_every_caption(images: ImageFolder) -> str:
    """The comma-separated parts that all captions share, in the order of the first."""
    first, *rest = ([part.strip() for part in item.caption.split(",")] for item in images.items)
    return ", ".join(part for part in first if part and all(part in other for other in rest))


def _base_version(family: DiffusionFamily, models: Models) -> str:
    """sd-scripts' name of the base, by which A1111 and others filter their lists."""
    if family.name == "sdxl":
        return "sdxl_base_v1-0"
    version = "sd_v2" if models.parts["unet"].config.cross_attention_dim == 1024 else "sd_v1"
    return f"{version}_v" if family.prediction_type(models) == "v_prediction" else version
