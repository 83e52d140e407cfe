"""Errors that are the user's to mend: shown as one message with the fix, never as a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StudioError(Exception):
    """What went wrong, where, and what to do. Ends a command with `exit_code`."""

    exit_code = 1


class ConfigError(StudioError):
    """Bad usage or configuration: an unknown key, a target that matches nothing, a missing model."""

    exit_code = 2


class DatasetError(StudioError):
    """A dataset that cannot be trained on."""

    exit_code = 3


class OutOfMemoryError(StudioError):
    """The device ran out of memory."""

    exit_code = 4


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """` Did you mean a, b?` for an unknown word, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else ""
