"""`studio app`: the studio in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from studio.errors import ConfigError
from studio.terminal import console


def app(
    workspace: Annotated[
        Path | None, typer.Option(help="Folder of runs, pictures and adapters. (default $STUDIO_HOME, or this folder)")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 7860,
    auth: Annotated[str, typer.Option(help="USER:PASSWORD that everybody must give.", envvar="STUDIO_AUTH")] = "",
) -> None:
    """Train, watch, blend and generate in a browser.

    Runs are the same as the command line's, and go on when the app or its page is closed.
    """
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ConfigError('the app needs gradio: pip install "adapter-studio[app]"') from None
    from studio.ui.server import serve
    from studio.workspace import Workspace

    if host not in ("127.0.0.1", "localhost", "::1") and not auth:
        console().print(
            "Everybody who reaches this address can train and read your pictures: give --auth USER:PASSWORD"
        )
    console().print(f"Adapter studio is at http://{host}:{port}/ (Ctrl-C ends the page; runs go on)")
    serve(Workspace(workspace), host, port, auth)
