"""What a command says: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> Console:
    """Standard error, styled when it is a terminal. One object, so that a live bar and messages get along."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def emit(result: Any, text: str, as_json: bool) -> None:
    """Prints `result` (dataclasses, paths, mappings) as one JSON object, or else `text`."""
    if as_json:
        from pydantic_core import to_jsonable_python

        text = json.dumps(to_jsonable_python(result), ensure_ascii=False)
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


BUILTIN_ONLY = "This file fits the built-in base (assets/base), not a published one: for those, train with --model."


def program() -> list[str]:
    """How the user can call the studio again: `studio` where it is on the path, else as it was called now."""
    called = Path(sys.argv[0])
    if shutil.which("studio"):
        return ["studio"]
    return [str(short(called))] if called.stem == "studio" else [Path(sys.executable).name, "-m", "studio"]


def short(path: Path) -> Path:
    """Relative to the current folder where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def say_error(message: str) -> None:
    """One message on standard error."""
    from rich.text import Text

    console().print(Text.assemble(("Error: ", "bold red"), message))


class _ConsoleHandler(logging.Handler):
    """Log records on the console; warnings and worse in colour."""

    def emit(self, record: logging.LogRecord) -> None:
        from rich.text import Text

        console().print(Text(self.format(record), "yellow" if record.levelno >= logging.WARNING else ""))


def configure_logging() -> None:
    """Our own records from INFO on, those of libraries from WARNING on, Python's warnings among them."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_ConsoleHandler()])
    # they print by themselves, and warn of every optional package that is not there
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.captureWarnings(True)
    # of the processes of a distributed run, the main one speaks
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    for name in ("studio", "trainers"):
        logging.getLogger(name).setLevel(level)
