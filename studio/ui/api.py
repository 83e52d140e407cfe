"""The REST API, under /api/v1: start, status, stop, list and generate. /api/docs describes it.

A job's `kind` and `config` are those of the command line; everything answers with JSON, and a wrong request with
422 and the message that the command line would print.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio import jobs
from studio.errors import ConfigError, StudioError
from studio.jobs import queue
from studio.runs import RunView, list_runs, look
from studio.workspace import Workspace

if TYPE_CHECKING:
    from fastapi import APIRouter


def describe(workspace: Workspace, view: RunView) -> dict[str, Any]:
    """What the API says of a job."""
    made = jobs.result(view.folder)
    files = [file for file in made.files if file.is_relative_to(workspace.root)] if made else []
    status = vars(view.status)
    return {
        "id": view.id,
        "kind": jobs.kind_of(view.folder),
        "title": jobs.title_of(view.folder),
        **{key: status[key] for key in ("state", "step", "total", "eta_s", "loss", "message")},
        "log": list(view.log_tail),
        "files": [f"/files/{file.relative_to(workspace.root)}" for file in files],
    }


def find(workspace: Workspace, id: str) -> Path:
    """The folder of a job. Raises ConfigError for an id that is none: a path is none either."""
    for parent in (workspace.runs, workspace.jobs):
        if re.fullmatch(r"\w[\w.-]*", id) and (parent / id / "config.yaml").is_file():
            return parent / id
    raise ConfigError(f"there is no job '{id}'")


def router(workspace: Workspace) -> APIRouter:
    """The routes."""
    from fastapi import APIRouter, Body, HTTPException
    from fastapi.routing import APIRoute

    class Explained(APIRoute):
        """A user's mistake is an answer, not a failure."""

        def get_route_handler(self) -> Any:
            handler = super().get_route_handler()

            async def explained(request: Any) -> Any:
                try:
                    return await handler(request)
                except StudioError as problem:
                    raise HTTPException(422, str(problem)) from problem

            return explained

    routes = APIRouter(route_class=Explained)

    @routes.get("/jobs")
    def list_jobs() -> dict[str, Any]:
        """All jobs, the newest first, and the ids of those that wait, in their order."""
        views = [view for parent in (workspace.runs, workspace.jobs) for view in list_runs(parent)]
        newest = sorted(views, key=lambda view: view.id, reverse=True)
        waiting = [entry.id for entry in queue.waiting(workspace)]
        return {"jobs": [describe(workspace, view) for view in newest], "queue": waiting}

    @routes.post("/jobs")
    def start(kind: str = Body(), config: dict[str, Any] = Body(), title: str = Body("")) -> dict[str, Any]:  # noqa: B008
        """Puts a job into the queue."""
        return describe(workspace, look(jobs.submit(workspace, kind, config, title)))

    @routes.get("/jobs/{id}")
    def status(id: str) -> dict[str, Any]:
        """What a job is doing, the end of its log, and the addresses of what it made."""
        return describe(workspace, look(find(workspace, id)))

    @routes.post("/jobs/{id}/stop")
    def stop(id: str) -> dict[str, Any]:
        """Saves and stops a job, or takes it out of the queue; answers at once."""
        folder = find(workspace, id)
        jobs.stop(folder)
        return describe(workspace, look(folder))

    @routes.post("/jobs/{id}/resume")
    def resume(id: str) -> dict[str, Any]:
        """Puts a job that stopped, failed or crashed into the queue again."""
        folder = find(workspace, id)
        jobs.resume(workspace, folder)
        return describe(workspace, look(folder))

    @routes.post("/generate")
    def generate(config: dict[str, Any] = Body()) -> dict[str, Any]:  # noqa: B008
        """Draws: the body is the config of a job of the kind "draw"."""
        return describe(workspace, look(jobs.submit(workspace, "draw", config)))

    return routes
