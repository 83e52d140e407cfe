"""`studio queue`: what waits, what runs, and in which order."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from studio import jobs
from studio.commands.flags import Json
from studio.jobs import queue
from studio.terminal import emit
from studio.workspace import Workspace

app = typer.Typer(help="List and change the queue of jobs; alone, list it.", rich_markup_mode=None)

Root = Annotated[
    Path | None,
    typer.Option("--workspace", help="Folder of runs, pictures and adapters. (default $STUDIO_HOME, or this folder)"),
]
Stay = Annotated[float, typer.Option(help="Seconds to wait for more jobs.", min=0)]
Id = Annotated[str, typer.Argument(metavar="JOB", help="A job's id: the name of its folder.")]


@app.callback(invoke_without_command=True)
def _list_alone(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_()


@app.command("list")
def list_(workspace: Root = None, as_json: Json = False) -> None:
    """The jobs at work, and those that wait, in their order."""
    place = Workspace(workspace)
    found = queue.entries(place)
    lines = [f"{_state(entry):<9} {entry.id:<40} {entry.title}" for entry in found]
    lines += [f"waiting for {view.id}, which was started beside the queue" for view in queue.beside(place)]
    emit({"jobs": [_described(entry) for entry in found]}, "\n".join(lines) or "The queue is empty.", as_json)


@app.command()
def cancel(job: Id, workspace: Root = None) -> None:
    """Take a waiting job out of the queue; one at work saves and stops."""
    entry = queue.find(Workspace(workspace), job)
    jobs.stop(entry.folder)
    emit({}, f"{entry.id}: {'cancelled' if entry.waiting else 'stopping'}", as_json=False)


@app.command()
def up(job: Id, workspace: Root = None) -> None:
    """Let a waiting job change places with the one before it."""
    queue.up(Workspace(workspace), job)
    list_(workspace)


@app.command()
def run(workspace: Root = None, stay: Stay = 0) -> None:
    """Do the jobs of the queue, one after another, until it is empty.

    The app and `train-sd --queue` start this by themselves, in the background.
    """
    if not jobs.supervise(Workspace(workspace), stay):
        emit({}, "Another process works on this queue already: `studio queue` lists it.", as_json=False)


def job(
    folder: Annotated[Path, typer.Argument(help="A job's folder.")], workspace: Root = None, stay: Stay = 0
) -> None:
    """Do one job; with a workspace, as its queue's turn."""
    if workspace is None:
        jobs.run_job(folder)
    else:
        jobs.work(Workspace(workspace), folder.name, stay)


def _state(entry: queue.Entry) -> str:
    return "waiting" if entry.waiting else entry.look().status.state


def _described(entry: queue.Entry) -> dict[str, Any]:
    about = {"id": entry.id, "folder": entry.folder, "kind": entry.kind, "title": entry.title}
    return about | asdict(entry.look().status) | {"state": _state(entry)}
