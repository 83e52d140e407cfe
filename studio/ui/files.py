"""The files that the page shows and gives out: those of the workspace's open folders, and no others."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from studio.workspace import Workspace

if TYPE_CHECKING:
    from fastapi import APIRouter

SHOWN = {".png", ".jpg", ".jpeg", ".webp"}
GIVEN = SHOWN | {".safetensors", ".txt", ".json", ".jsonl", ".yaml", ".csv"}


def find(workspace: Workspace, asked: str) -> Path | None:
    """The file that "runs/ID/samples/00.png" means: None outside the open folders, whatever dots or links say."""
    folder, _, rest = asked.partition("/")
    if folder not in workspace.open_folders or not rest or "\0" in asked:
        return None
    top = (workspace.root / folder).resolve()
    place = (top / rest).resolve()
    inside = place.is_relative_to(top) and not any(part.startswith(".") for part in place.relative_to(top).parts)
    return place if inside and place.suffix.lower() in GIVEN and place.is_file() else None


def router(workspace: Workspace) -> APIRouter:
    """`GET /files/FOLDER/PATH[?width=N]`: a file, or a picture's thumbnail of at most N pixels."""
    from fastapi import APIRouter, HTTPException
    from fastapi.responses import FileResponse, Response

    routes = APIRouter()

    @routes.get("/files/{asked:path}")
    def file(asked: str, width: int = 0) -> Response:
        place = find(workspace, asked)
        if place is None:
            raise HTTPException(404, "no such file")
        if width and place.suffix.lower() in SHOWN:
            content = thumbnail(place, min(max(width, 16), 2048), place.stat().st_mtime_ns)
            return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"})
        return FileResponse(place)

    return routes


@lru_cache(maxsize=512)
def thumbnail(place: Path, width: int, changed: int) -> bytes:
    """A JPEG of a picture, at most `width` pixels wide; `changed` tells its versions apart."""
    from studio.data.decode import open_rgb

    small = open_rgb(place)  # upright and over white, as training sees it
    small.thumbnail((width, width * 4))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
