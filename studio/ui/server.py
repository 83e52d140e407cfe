"""The web server: the page, the files of the workspace, and the REST API, on one port."""

from __future__ import annotations

import base64
import os
import secrets
from typing import TYPE_CHECKING, Any

from studio.errors import ConfigError
from studio.workspace import Workspace

if TYPE_CHECKING:
    from fastapi import FastAPI

MAX_UPLOAD = "2gb"


def create_app(workspace: Workspace, auth: str = "") -> FastAPI:
    """The whole app as ASGI. `auth` is "user:password"; without it, who reaches the port may do everything."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import
    os.environ.setdefault("GRADIO_TEMP_DIR", str(workspace.uploads))
    import gradio as gr
    from fastapi import FastAPI

    from studio.ui import api, blocks, files
    from studio.ui.theme import CSS, theme

    app = FastAPI(title="Adapter studio", docs_url="/api/docs", redoc_url=None, openapi_url="/api/openapi.json")
    if auth:
        app.middleware("http")(_basic_auth(auth))
    app.include_router(api.router(workspace), prefix="/api/v1")
    app.include_router(files.router(workspace))
    page = blocks(workspace)
    page.queue(default_concurrency_limit=8)
    return gr.mount_gradio_app(
        app, page, path="/", theme=theme(), css=CSS, footer_links=[], max_file_size=MAX_UPLOAD, show_error=True
    )


def serve(workspace: Workspace, host: str = "127.0.0.1", port: int = 7860, auth: str = "") -> None:
    """Serves until the process is asked to end. Raises ConfigError for an `auth` that is no pair, and a busy port."""
    import uvicorn

    from studio.jobs import ensure_supervisor

    if auth and not all(auth.partition(":")[::2]):
        raise ConfigError("--auth takes USER:PASSWORD")
    _check_port(host, port)
    ensure_supervisor(workspace)
    app = create_app(workspace, auth)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)


def _check_port(host: str, port: int) -> None:
    import socket

    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as problem:
            raise ConfigError(
                f"port {port} of {host} cannot be used ({problem.strerror}): give another --port"
            ) from None


def _basic_auth(auth: str) -> Any:
    """HTTP basic authentication over every route, pages, files and the API alike."""
    from fastapi import Request
    from fastapi.responses import Response

    expected = base64.b64encode(auth.encode()).decode()

    async def check(request: Request, call_next: Any) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Basic ")
        if secrets.compare_digest(given.encode(), expected.encode()):
            return await call_next(request)
        return Response("sign in", 401, {"WWW-Authenticate": 'Basic realm="Adapter studio"'})

    return check
