"""Where a picture's caption comes from: a file beside it, a metadata file, or the name of its folder.

The first that exists wins: `NAME.txt`, `NAME.caption`, `metadata.jsonl` and `metadata.csv` (imagefolder of the
datasets library: columns `file_name` and `text` or `caption`), kohya's folder form `10_sks dog`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from studio.errors import DatasetError

SIDECARS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("text", "caption")


class CaptionError(Exception):
    """Why a caption cannot be read, with the fix, as a message for the user."""


@dataclass
class Metadata:
    """`captions` by path of the picture; `problems` are (line number, reason) of rows that are not used."""

    captions: dict[Path, str] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)


def decode_text(data: bytes) -> str:
    """UTF-8, with or without a byte order mark, or UTF-16 with one. Anything else would be a guess.

    Raises CaptionError.
    """
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise CaptionError(f"not valid UTF-8 or UTF-16 (byte {error.start}): save it again as UTF-8") from error
    if "\0" in text:
        raise CaptionError("contains zero bytes, as UTF-16 without a byte order mark does: save it again as UTF-8")
    return text


def clean(text: str) -> str:
    """One line: runs of whitespace and line ends become single spaces."""
    return " ".join(text.split())


def read_sidecars(picture: Path) -> dict[str, str]:
    """File name -> caption, for each caption file beside `picture`. Raises CaptionError naming the file."""
    found = {}
    for suffix in SIDECARS:
        path = picture.with_suffix(suffix)
        try:
            found[path.name] = clean(decode_text(path.read_bytes()))
        except FileNotFoundError:
            continue
        except (CaptionError, OSError) as error:
            raise CaptionError(f"caption file {path.name}: {error}") from error
    return found


def folder_form(name: str) -> tuple[int, str] | None:
    """(repeats, caption) of kohya's folder form: `10_sks dog` -> (10, "sks dog")."""
    match = re.fullmatch(r"(\d+)_(.+)", name)
    return (int(match[1]), clean(match[2])) if match else None


def read_metadata(path: Path) -> Metadata:
    """Reads a `metadata.jsonl` or `metadata.csv`; pictures are named relative to its folder.

    Raises DatasetError when the file is not text or not one row has the two columns.
    """
    try:
        text = decode_text(path.read_bytes())
        rows = _json_rows(text) if path.suffix == ".jsonl" else _csv_rows(text)
    except (CaptionError, OSError, csv.Error) as error:
        raise DatasetError(f"{path}: {error}") from error
    metadata = Metadata()
    columns: dict[str, None] = {}  # an ordered set
    for line, row in rows:
        if isinstance(row, str):
            metadata.problems.append((line, row))
            continue
        columns |= dict.fromkeys(row)
        caption = next((row[c] for c in COLUMNS if isinstance(row.get(c), str)), None)
        name = row.get("file_name")
        if not isinstance(name, str) or not name or caption is None:
            metadata.problems.append((line, "has no file_name, or neither text nor caption"))
            continue
        metadata.captions[Path(os.path.normpath(path.parent / name))] = clean(caption)
    if not metadata.captions:
        found = f"its columns are {', '.join(map(str, columns))}" if columns else "it has no readable rows"
        raise DatasetError(f"{path} needs the columns file_name and text (or caption), but {found}")
    return metadata


def _json_rows(text: str) -> list[tuple[int, dict | str]]:
    """(line number, row or what is wrong with it). Lines end at newlines only: JSON text may hold U+2028."""
    rows: list[tuple[int, dict | str]] = []
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except ValueError as error:
            rows.append((line, f"is not JSON: {error}"))
            continue
        rows.append((line, row if isinstance(row, dict) else "is not a JSON object"))
    return rows


def _csv_rows(text: str) -> list[tuple[int, dict | str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    return [(reader.line_num, row) for row in reader]
