"""`studio train-sd`: adapters for Stable Diffusion models, from a folder of pictures to a checked file."""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from studio.config import TrainSDConfig
from studio.data.images import scan_folder
from studio.devices import best_device, precision_dtype
from studio.diffusion.sheets import loss_plot
from studio.families.loading import load_base
from studio.formats.consumers import ConsumerReport, check_file
from studio.runs import Run
from studio.terminal import program, short
from trainers.adapter_settings import adapter_settings
from trainers.loop import fit
from trainers.sd_plan import Plan, make_plan
from trainers.sd_task import DiffusionTask

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run made. `file` is the adapter (a folder for PEFT); `checks` are of the tools that use any of it."""

    run_folder: Path
    file: Path | None
    sheet: Path | None
    loss_plot: Path | None
    checks: list[ConsumerReport]
    next_commands: list[str]


def build_task(config: TrainSDConfig, device: torch.device | None = None) -> DiffusionTask:
    """Dataset, base and adapters, on `device` (the best one by default).

    Raises ConfigError and DatasetError for everything that can be known before training.
    """
    device = device or best_device()
    adapter_settings(config.adapter, config.train.steps)  # a misspelt method shows before the base is loaded
    images = scan_folder(Path(config.data.folder))
    dtype = precision_dtype(config.model.precision, device)
    family, models = load_base(config.model.source, dtype, config.model.config or None, config.model.prediction_type)
    cut = family.too_long(models, [item.caption for item in images.items])
    if cut:
        log.warning(
            "%d captions are longer than the text encoder reads; their ends are lost, such as: %s", len(cut), cut[0]
        )
    return DiffusionTask(config, family, models, images).to(device)


def plan(config: TrainSDConfig) -> Plan:
    """What `train` would do; raises what it would raise before the first step."""
    return make_plan(build_task(config))


def train(config: TrainSDConfig, run: Run) -> TrainResult:
    """Trains, draws, saves and checks; a run that was stopped saves a checkpoint and no final file."""
    accelerator = _accelerator(config, run)
    run.update_status(message="loading the base and the pictures", total=config.train.steps)
    task = build_task(config, accelerator.device)
    log.info("%s\n%s", task.images.report(), task.describe())
    if accelerator.ddp_handler:
        # SDXL reads its first text encoder before the last layer, whose adapters get no gradient
        accelerator.ddp_handler.find_unused_parameters = task.trains_text
    run.update_status(message="encoding pictures")
    task.encode_all(run)
    step = fit(task, run, accelerator, config.train, config.optimizer, config.schedule)
    accelerator.end_training()
    if step < config.train.steps or not accelerator.is_main_process:
        return TrainResult(
            run.folder, None, None, None, [], [shlex.join([*program(), "train-sd", "--resume", str(short(run.folder))])]
        )
    return _finish(config, run, task, step)


def _finish(config: TrainSDConfig, run: Run, task: DiffusionTask, step: int) -> TrainResult:
    """The file, the before/after sheet, the loss plot, and the proof that other tools load the file."""
    file = task.save(run.folder / config.output.name, step, run.samples / f"step-{step:06d}" / "00.png")
    sheet = task.before_after(run)
    plot = run.folder / "loss.png"
    loss_plot(run.metrics(), plot)
    checks = [check for check in check_file(file, task.family, task.models).values() if check.used]
    for check in checks:
        if check.unused:
            log.warning("%s would leave %d keys unused, such as %s", check.consumer, len(check.unused), check.unused[0])
    return TrainResult(run.folder, file, sheet, plot, checks, _next_commands(config, run, task, file))


def _next_commands(config: TrainSDConfig, run: Run, task: DiffusionTask, file: Path) -> list[str]:
    """What to type next, quoted for a shell; `generate` draws the sheet's first picture."""
    model, samples = config.model, config.samples
    base = [] if model.source == "builtin" else ["--model", model.source]
    config_of_base = ["--model-config", model.config] if model.config else []
    if model.prediction_type != "auto":
        config_of_base += ["--prediction-type", model.prediction_type]
    drawn = ["--steps", str(samples.steps), "--guidance", f"{samples.guidance:g}", "--seed", str(samples.seed)]
    prompt = task.preview_prompts()[0]
    commands = [
        ["generate", prompt, "--lora", str(short(file)), *base, *config_of_base, *drawn],
        ["check", str(short(file)), *(["--base", model.source] if base else [])],
        ["runs", "show", str(short(run.folder))],
    ]
    return [shlex.join([*program(), *command]) for command in commands]


def _accelerator(config: TrainSDConfig, run: Run) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    device = best_device()
    dtype = precision_dtype(config.model.precision, device)
    precision = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=list(config.output.trackers) or None,
        project_dir=str(run.folder),
        kwargs_handlers=[DistributedDataParallelKwargs()],
        step_scheduler_with_optimizer=False,
    )
    if config.output.trackers:
        accelerator.init_trackers("adapter-studio", config=_flat(config.model_dump(mode="json")))
    return accelerator


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; what is no number is written as text, as trackers ask."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
