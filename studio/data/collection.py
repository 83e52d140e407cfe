"""A dataset that is edited: a folder of pictures with a caption file each, every change on disk at once.

Names come from outside, from browsers and other people's folders: no name leads out of the folder, and none
takes the place of another picture. What is left out moves to a hidden folder inside, and can come back.
"""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from studio.data import decode
from studio.data.captions import METADATA, SIDECARS, CaptionError, clean, decode_text
from studio.data.images import list_captions
from studio.errors import DatasetError
from studio.status import write_atomic

LEFT_OUT = ".left-out"
LONGEST_NAME = 80  # characters: file systems allow 255 bytes, captions and thumbnails add to it


@dataclass
class Added:
    """What became of files that were given: names in the dataset, and (name, reason) of those refused."""

    pictures: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)


def safe_name(name: str, fallback: str = "picture") -> str:
    """A name that is one file in a folder, on any system: no path, no control signs, no leading dot.

    Letters of every language stay; what file systems, shells or addresses give a meaning becomes "-".
    """
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name))[-1]
    plain = "".join(sign if sign.isalnum() or sign in " ._-()+," else "-" for sign in last)
    stem, dot, suffix = clean(plain).strip(". -").rpartition(".")
    if not dot:
        stem, suffix = suffix, ""
    return (stem.strip(". -")[:LONGEST_NAME].rstrip(". ") or fallback) + dot + suffix[:10]


def inside(folder: Path, name: str) -> Path:
    """The file that a relative `name` means in a dataset. Raises DatasetError for one that leads out of it."""
    place = Path(os.path.normpath(folder / name))
    parts = place.relative_to(folder).parts if place.is_relative_to(folder) else ()
    if "\0" in name or not parts or any(part.startswith(".") for part in parts):
        raise DatasetError(f"'{name}' is no picture of this dataset")
    if not place.resolve().is_relative_to(folder.resolve()):
        raise DatasetError(f"'{name}' is a link that leads out of this dataset")
    return place


def captions(folder: Path) -> dict[str, str]:
    """Relative name of every picture -> its caption, "" where it has none; no picture is opened."""
    return {picture.relative_to(folder).as_posix(): caption for picture, caption in list_captions(folder).items()}


def write_caption(folder: Path, name: str, text: str) -> str:
    """Writes a picture's caption to the .txt beside it, as one line; returns what it wrote. Raises DatasetError."""
    picture = inside(folder, name)
    if not picture.is_file():
        raise DatasetError(f"{name} is not there any more: open the dataset again")
    caption = clean(text)
    write_atomic(picture.with_suffix(".txt"), caption + "\n")
    return caption


def write_captions(folder: Path, changed: Mapping[str, str]) -> None:
    """Writes several; see `write_caption`."""
    for name, text in changed.items():
        write_caption(folder, name, text)


# -- bringing files in ------------------------------------------------------------------------


def add_files(folder: Path, files: Iterable[tuple[Path, str]]) -> Added:
    """Moves uploaded files, (where they lie, what they were called), into a dataset.

    A caption file follows its picture, which may be there already. A picture whose name is taken by another
    gets a number; one that is there already, byte for byte, is not doubled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    added, texts, renamed = Added(), [], {}
    for source, name in files:
        safe = safe_name(name)
        if Path(safe).suffix.lower() in SIDECARS:
            texts.append((source, safe))
        elif Path(safe).suffix.lower() not in decode.EXTENSIONS:
            added.refused.append((name, f"is no picture: use {', '.join(sorted(decode.EXTENSIONS))}"))
        else:
            place = _free_place(folder, safe, source)
            renamed[Path(safe).stem] = place
            if not place.exists():
                shutil.move(source, place)
                added.pictures.append(place.name)
    for source, safe in texts:
        _add_caption(folder, source, safe, renamed.get(Path(safe).stem), added)
    return added


def import_folder(source: Path, folder: Path) -> None:
    """Copies the pictures and captions of a folder on this machine into a new dataset, with its subfolders.

    Pictures are hard links where the disk allows, so that they take no space twice; captions are copies, since
    they are edited. Raises DatasetError where there is no picture.
    """
    pictures = list_captions(source)
    if not pictures:
        raise DatasetError(f"there are no pictures in {source}")
    wanted = [side for one in pictures for side in (one, *(one.with_suffix(suffix) for suffix in SIDECARS))]
    wanted += [source / name for name in METADATA]
    for file in dict.fromkeys(file for file in wanted if file.is_file()):
        place = folder / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file in pictures:
            _link_or_copy(file, place)
        else:
            shutil.copyfile(file, place)


def new_folder(parent: Path, name: str) -> Path:
    """A new folder in `parent` for a dataset called `name`, with a number where that is taken."""
    safe = safe_name(name, "pictures").replace(" ", "-")
    for count in range(1, 1000):
        folder = parent / (safe if count == 1 else f"{safe}-{count}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise DatasetError(f"there are a thousand datasets called {safe}")


def _add_caption(folder: Path, source: Path, safe: str, picture: Path | None, added: Added) -> None:
    stem = Path(safe).stem
    picture = picture or next((one for one in sorted(folder.glob("*")) if _is_picture(one, stem)), None)
    if picture is None:
        added.refused.append((safe, "there is no picture of the same name"))
        return
    try:
        text = clean(decode_text(source.read_bytes()))
    except CaptionError as problem:
        added.refused.append((safe, str(problem)))
        return
    added.captions.append(picture.name)
    write_caption(folder, picture.name, text)


def _is_picture(file: Path, stem: str) -> bool:
    return file.stem == stem and file.suffix.lower() in decode.EXTENSIONS


def _free_place(folder: Path, name: str, source: Path) -> Path:
    """Where a picture goes: its stem is its own, since captions are found by it."""
    stem, suffix = Path(name).stem, Path(name).suffix.lower()
    for count in range(1, 10_000):
        place = folder / (f"{stem}{suffix}" if count == 1 else f"{stem}-{count}{suffix}")
        same = [one for one in folder.glob(f"{_literal(place.stem)}.*") if _is_picture(one, place.stem)]
        if not same or (place in same and _equal(place, source)):
            return place
    raise DatasetError(f"there are ten thousand pictures called {stem}")


def _literal(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


def _equal(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def _link_or_copy(source: Path, place: Path) -> None:
    try:
        os.link(source.resolve(), place)
    except OSError:
        shutil.copyfile(source, place)


# -- leaving out, and back --------------------------------------------------------------------


def leave_out(folder: Path, names: Iterable[str]) -> list[str]:
    """Takes pictures out of a dataset, with their captions; returns the names of those that were there."""
    moved = []
    for name in names:
        picture = inside(folder, name)
        if picture.is_file():
            _move(folder, folder / LEFT_OUT, picture)
            moved.append(name)
    return moved


def put_back(folder: Path, names: Iterable[str]) -> list[str]:
    """The inverse of `leave_out`; a picture whose place has been taken stays out."""
    store, back = folder / LEFT_OUT, []
    for name in names:
        place = inside(folder, name)
        picture = store / place.relative_to(folder)
        if picture.is_file() and not place.exists():
            _move(store, folder, picture)
            back.append(name)
    return back


def left_out(folder: Path) -> list[str]:
    """Names of the pictures that `put_back` can bring back."""
    store = folder / LEFT_OUT
    return [picture.relative_to(store).as_posix() for picture in list_captions(store)] if store.is_dir() else []


def _move(top: Path, to: Path, picture: Path) -> None:
    for file in (picture, *(picture.with_suffix(suffix) for suffix in SIDECARS)):
        if file.is_file():
            place = to / file.relative_to(top)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
