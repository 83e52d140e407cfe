"""What a job made, in its folder: result.json."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studio.status import write_atomic


@dataclass(frozen=True)
class Result:
    """`files` are what a job made, the most important first; `facts` whatever else is worth knowing, as JSON has it."""

    files: list[Path]
    facts: dict[str, Any] = field(default_factory=dict)


def save_result(folder: Path, made: Result) -> None:
    """Writes result.json; its files are relative to the job's folder, so that a workspace may be moved."""
    from pydantic_core import to_jsonable_python

    files = [os.path.relpath(file.resolve(), folder) for file in made.files]
    content = {"files": files, "facts": to_jsonable_python(made.facts, fallback=str)}
    write_atomic(folder / "result.json", json.dumps(content))


def result(folder: Path) -> Result | None:
    """What a job has made so far, less what was removed since; None where it has not come to that."""
    try:
        saved = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    files = [Path(os.path.normpath(folder / file)) for file in saved["files"]]
    return Result([file for file in files if file.exists()], saved["facts"])
