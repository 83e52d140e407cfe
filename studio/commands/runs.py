"""`studio runs`: list, show and stop runs, whoever started them."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from studio import paths
from studio.commands.flags import Json
from studio.errors import ConfigError, nearest
from studio.runs import RunView, list_runs, look
from studio.terminal import console, emit

app = typer.Typer(help="List, show and stop runs; alone, list them.", rich_markup_mode=None)

RUNS = paths.home() / "runs"
OutputDir = Annotated[Path, typer.Option(help="Folder that holds the runs.")]
Name = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, its folder, or `last`.")]


def find(name: str, output_dir: Path) -> Path:
    """The folder of a run by id, path or `last`. Raises ConfigError."""
    if (Path(name) / "config.yaml").is_file():
        return Path(name).resolve()
    known = sorted(file.parent.name for file in output_dir.glob("*/config.yaml"))
    if name == "last" and known:
        return (output_dir / known[-1]).resolve()
    if name not in known:
        newest = ", ".join(reversed(known[-3:]))
        hint = f"{nearest(name, ['last', *known])} The newest are: {newest}." if known else " It holds none."
        raise ConfigError(f"there is no run '{name}' in '{output_dir}'.{hint}")
    return (output_dir / name).resolve()


@app.callback(invoke_without_command=True)
def _list_alone(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_()


@app.command("list")
def list_(output_dir: OutputDir = RUNS, as_json: Json = False) -> None:
    """All runs, the newest first."""
    views = list_runs(output_dir)
    lines = [f"{view.id:<40} {view.status.state:<9} {view.status.step}/{view.status.total}" for view in views]
    text = "\n".join(lines) or f"There are no runs in '{output_dir}'."
    emit({"runs": [_described(view) for view in views]}, text, as_json)


@app.command()
def show(run: Name, output_dir: OutputDir = RUNS, as_json: Json = False) -> None:
    """The state of one run, and the end of its log."""
    view = look(find(run, output_dir))
    status = view.status
    lines = [f"{view.id}: {status.state}, step {status.step} of {status.total}"]
    if status.loss is not None:
        lines.append(f"loss {status.loss:.4f}")
    if status.message:
        lines.append(status.message)
    heartbeat = datetime.fromtimestamp(status.heartbeat).isoformat(" ", "seconds")
    lines += [f"folder {view.folder}", f"last heartbeat {heartbeat}", *(f"  {line}" for line in view.log_tail)]
    emit(_described(view), "\n".join(lines), as_json)


@app.command()
def stop(
    run: Name,
    output_dir: OutputDir = RUNS,
    patience: Annotated[float, typer.Option(help="Seconds to let it finish its step and save.", min=0)] = 120,
    as_json: Json = False,
) -> None:
    """Stop a run: it saves first. What does not answer gets SIGTERM, and in the end SIGKILL."""
    from studio.launch import stop as stop_run

    folder = find(run, output_dir)
    for rung in stop_run(folder, patience_s=patience):
        console().print(rung)
    view = look(folder)
    emit(_described(view), f"{view.id}: {view.status.state} at step {view.status.step}", as_json)


def _described(view: RunView) -> dict[str, Any]:
    return {"id": view.id, "folder": view.folder, "alive": view.alive, **asdict(view.status), "log": view.log_tail}
