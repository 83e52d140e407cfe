"""`studio train-sd`: from flags to a run, and what it made."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from studio.commands.flags import Json, settings_help, with_flags
from studio.config import TrainSDConfig, check_trackers
from studio.errors import ConfigError, DatasetError
from studio.runs import Run
from studio.settings import load, presets, resolve
from studio.terminal import BUILTIN_ONLY, emit, program, short

if TYPE_CHECKING:
    from trainers.sd import TrainResult

FLAGS = {
    "model": "model.source",
    "data": "data.folder",
    "output_dir": "output.folder",
    "name": "output.name",
    "method": "adapter.method",
    "rank": "adapter.rank",
    "alpha": "adapter.alpha",
    "targets": "adapter.targets",
    "steps": "train.steps",
    "lr": "optimizer.lr",
    "batch_size": "train.batch_size",
    "resolution": "data.resolution",
    "precision": "model.precision",
    "seed": "train.seed",
    "train_text_encoder": "adapter.train_text_encoder",
    "format": "output.format",
}
CONFIG_HELP = "Settings from a .yaml, .toml or .json file, or those that an adapter file was trained with."
PRESET_HELP = f"Settings below all others: {', '.join(presets())}, or a file."


def _list_settings(wanted: bool) -> None:
    if wanted:
        typer.echo(settings_help(TrainSDConfig))
        raise typer.Exit


@with_flags(TrainSDConfig, FLAGS)
def train_sd(
    settings: dict[str, Any],
    preset: Annotated[str | None, typer.Option(help=PRESET_HELP)] = None,
    config: Annotated[Path | None, typer.Option(help=CONFIG_HELP)] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting: GROUP.KEY=VALUE.", metavar="KEY=VALUE")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run folder with its own settings.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, exit.")] = False,
    queue: Annotated[bool, typer.Option("--queue", help="Do it after the jobs that wait, in the background.")] = False,
    as_json: Json = False,
    help_all: Annotated[
        bool, typer.Option("--help-all", help="List every setting and exit.", is_eager=True, callback=_list_settings)
    ] = False,
) -> None:
    """Train a LoRA for Stable Diffusion or SDXL.

    Without flags, it trains the demo on the built-in base. Later wins: defaults, preset, config file,
    flags and --set. The defaults are for full-size models; the built-in base has its own preset,
    builtin-style. --help-all lists every setting that --set, presets and config files take.
    """
    if resume and (preset or config or sets or any(value is not None for value in settings.values())):
        raise ConfigError("--resume continues a run with its own settings: give no others, or start a new run")
    if resume:
        chosen = load(TrainSDConfig, Run.open(resume).config_file)
    else:
        chosen = _chosen(preset, config, settings, sets or [])
    check_trackers(chosen.output.trackers)
    if dry_run:
        from trainers import sd

        plan = sd.plan(chosen)
        emit(plan, str(plan), as_json)
    elif queue:
        _enqueue(chosen, resume, as_json)
    else:
        _train(chosen, resume, as_json)


def _chosen(preset: str | None, file: Path | None, flags: dict[str, Any], sets: list[str]) -> TrainSDConfig:
    """The settings of the user; those of an adapter file are complete, so that no preset is below them."""
    if file is None or not (file.suffix == ".safetensors" or file.is_dir()):
        return resolve(TrainSDConfig, preset, file, flags, sets)
    if preset:
        raise ConfigError(f"'{file}' holds every setting: a preset below them would change nothing. Leave out --preset")
    from trainers.sd_metadata import settings_of

    given = {key for key, value in flags.items() if value is not None} | {one.partition("=")[0].strip() for one in sets}
    return resolve(TrainSDConfig, "", settings_of(file, given), flags, sets)


def _enqueue(config: TrainSDConfig, resume: Path | None, as_json: bool) -> None:
    """Adds the run to the queue of the workspace, $STUDIO_HOME or the current folder."""
    from studio import jobs
    from studio.workspace import Workspace

    workspace = Workspace()
    parent = (resume.resolve().parent if resume else Path(config.output.folder).expanduser()).resolve()
    if parent != workspace.runs:
        raise ConfigError(
            f"the queue of '{workspace.root}' makes its runs in {workspace.runs}, not in {parent}: "
            "leave out --output-dir, or --queue"
        )
    if resume:
        jobs.resume(workspace, resume)
        folder = resume.resolve()
    else:
        folder = jobs.submit(workspace, jobs.TRAIN_SD, config)
    text = f"Queued: {short(folder)}\nNext:\n  {shlex.join([*program(), 'queue'])}"
    emit({"id": folder.name, "folder": folder}, text, as_json)


def _train(config: TrainSDConfig, resume: Path | None, as_json: bool) -> None:
    from studio.jobs.result import save_result
    from studio.jobs.train import result_of
    from studio.progress import show_run
    from trainers import sd

    run = _same_run_everywhere(
        lambda: Run.open(resume) if resume else Run.create(config.output.folder, config.output.name, config)
    )
    try:
        with run.session(), show_run(run, config.train.batch_size * config.train.gradient_accumulation * _processes()):
            result = sd.train(config, run)
            if run.is_main:
                save_result(run.folder, result_of(result))
    except (ConfigError, DatasetError):
        if run.is_main and not resume and run.status.step == 0:
            shutil.rmtree(run.folder, ignore_errors=True)  # it holds nothing but the mistake
        raise
    if run.is_main:
        facts = {"state": run.status.state, "step": run.status.step, **vars(result)}
        emit(facts, _summary(config, result, run), as_json)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _same_run_everywhere(make: Callable[[], Run]) -> Run:
    """The run of all processes of an `accelerate launch`: the main one makes it and tells the others."""
    if _processes() == 1:
        return make()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from studio.devices import best_device

    is_main = PartialState(cpu=best_device().type == "cpu").is_main_process
    run = make() if is_main else None
    shared = broadcast_object_list([str(run.folder) if run else ""])
    return run or Run(Path(shared[0]), is_main=False)


def _summary(config: TrainSDConfig, result: TrainResult, run: Run) -> str:
    if run.status.state == "stopped":
        (resume,) = result.next_commands
        return f"Stopped and saved at step {run.status.step} of {run.status.total}. Go on with:\n  {resume}"
    made = {"LoRA": result.file, "Before/after": result.sheet, "Loss plot": result.loss_plot, "Run": result.run_folder}
    lines = [f"{label + ':':<14}{short(path)}" for label, path in made.items() if path]
    used = [f"{check.consumer} {check.used}/{check.total}" for check in result.checks]
    lines.append(f"{'Keys used by:':<14}{', '.join(used)}")
    if config.model.source == "builtin":
        lines.append(BUILTIN_ONLY)
    return "\n".join([*lines, "Next:", *(f"  {command}" for command in result.next_commands)])
