"""`studio`: the command line. Its exit codes: 0 done, or stopped after saving; 1 failure while running;
2 bad usage or configuration; 3 the dataset; 4 out of memory; 130 interrupted twice."""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

import typer

from studio.commands import algebra, files, queue, runs
from studio.commands.check import check
from studio.commands.generate import generate
from studio.commands.inspect import inspect
from studio.commands.methods import methods
from studio.commands.push import push
from studio.commands.train import train_sd
from studio.errors import OutOfMemoryError, StudioError
from studio.terminal import configure_logging, say_error
from studio.ui.command import app as open_app

INTERRUPTED = 130

app = typer.Typer(
    help="Train adapters on a few pictures, see the difference, and load them elsewhere.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train-sd")(train_sd)
app.command()(generate)
app.command()(check)
app.command()(inspect)
app.command()(files.convert)
app.command()(algebra.blend)
app.command()(algebra.resize)
app.command()(algebra.extract)
app.command()(algebra.merge)
app.command()(push)
app.command()(methods)
app.command("app")(open_app)
app.add_typer(runs.app, name="runs")
app.add_typer(queue.app, name="queue")
app.command(hidden=True)(queue.job)


def main() -> None:
    """Runs one command and ends the process with its exit code."""
    configure_logging()
    try:
        app()
    except StudioError as problem:
        say_error(str(problem))
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        say_error("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as problem:
        if _is_out_of_memory(problem):
            say_error(
                f"out of memory: {problem}\nUse a smaller --batch-size or --resolution, "
                "--set train.gradient_checkpointing=true, or --precision bf16."
            )
            sys.exit(OutOfMemoryError.exit_code)
        say_error(f"{type(problem).__name__}: {problem}\nThe details are in {_keep_traceback(problem)}")
        sys.exit(StudioError.exit_code)


def _is_out_of_memory(problem: Exception) -> bool:
    torch = sys.modules.get("torch")  # a command that never loaded it had no device to fill
    if isinstance(problem, MemoryError) or (torch and isinstance(problem, torch.OutOfMemoryError)):
        return True
    # the CPU allocator and Apple's raise plain RuntimeErrors
    return isinstance(problem, RuntimeError) and any(
        words in str(problem) for words in ("out of memory", "can't allocate memory")
    )


def _keep_traceback(problem: Exception) -> Path:
    with tempfile.NamedTemporaryFile("w", prefix="studio-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.writelines(traceback.format_exception(problem))
    return Path(file.name)
