"""A folder of captioned pictures: every picture is checked once, and whatever is left out is reported."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from studio.data import decode
from studio.data.captions import METADATA, SIDECARS, CaptionError, folder_form, read_metadata, read_sidecars
from studio.data.decode import UnusablePicture
from studio.errors import DatasetError

NO_CAPTION = "no caption: trained with an empty one (write it to a .txt file of the same name)"
THREADS = min(4, os.cpu_count() or 1)  # Pillow decodes outside the interpreter lock; each may hold 360 MB of pixels
SHOWN = 20  # left-out pictures a report lists before it counts the rest
NAMED = 5  # pictures a note names before it counts the rest


@dataclass(frozen=True)
class ImageItem:
    """A usable picture. `width` and `height` are pixels after EXIF rotation; `repeats` >= 1 is how often an
    epoch sees it; `id` is the SHA-256 of the file's bytes, in hex."""

    path: Path
    caption: str
    width: int
    height: int
    repeats: int
    id: str


@dataclass(frozen=True)
class LeftOut:
    """A picture or caption that is not used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Note:
    """Something about a used picture, or the folder, that the user may want to know."""

    path: Path
    text: str


@dataclass(frozen=True)
class ImageFolder:
    """What `scan_folder` found, sorted by path."""

    path: Path
    items: tuple[ImageItem, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[Note, ...] = ()

    def report(self) -> str:
        """What is used, what is noteworthy, and what is left out and why, as lines of text."""
        epoch = sum(item.repeats for item in self.items)
        lines = [f"{len(self.items)} picture{'s' * (len(self.items) != 1)} in {self.path}, {epoch} an epoch"]
        by_text: dict[str, list[Path]] = {}
        for note in self.notes:
            by_text.setdefault(note.text, []).append(note.path)
        lines += [f"  {text}: {_names(self.path, paths)}" for text, paths in by_text.items()]
        return "\n".join(lines + _left_out_lines(self.path, self.left_out))


@dataclass
class _Listing:
    """The files below a folder, by what they are for."""

    pictures: list[Path] = field(default_factory=list)
    sidecars: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    other: Counter[str] = field(default_factory=Counter)
    left_out: list[LeftOut] = field(default_factory=list)


def scan_folder(path: str | Path) -> ImageFolder:
    """Finds, checks and captions the pictures in `path` and its subfolders.

    Every picture is decoded once, so that damage shows here and not in the middle of a run. Raises DatasetError
    when the folder is missing, holds no picture, or none that can be used.
    """
    root = Path(path)
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise DatasetError(f"The dataset folder {root} {problem}: give a folder of pictures")
    listing = _list_files(root)
    if not listing.pictures:
        raise DatasetError(_nothing_found(root, listing))
    metadata = _all_metadata(listing)
    items, left_out, notes = [], listing.left_out, _folder_notes(root, listing)
    with ThreadPoolExecutor(THREADS) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `decode` applies the limit itself
        for found in pool.map(lambda picture: _read(root, picture, metadata), listing.pictures):
            if isinstance(found, LeftOut):
                left_out.append(found)
            else:
                items.append(found[0])
                notes += found[1]
    items, doubles = _without_duplicates(items)
    left_out = sorted(left_out + doubles, key=lambda entry: entry.path.as_posix())
    if not items:
        lines = _left_out_lines(root, left_out)
        raise DatasetError("\n".join([f"No picture in {root} can be used.", *lines]))
    unused = {entry.path for entry in left_out}
    notes = [note for note in notes if note.path not in unused]
    return ImageFolder(root, tuple(items), tuple(left_out), tuple(notes))


def list_captions(path: Path) -> dict[Path, str]:
    """Every picture in `path` and its subfolders -> its caption, as `scan_folder` takes it, without opening pictures.

    "" stands for no caption, and for a caption file that cannot be read. Raises DatasetError for a metadata file
    that cannot.
    """
    listing = _list_files(path)
    metadata = _all_metadata(listing)
    found = {}
    for picture in listing.pictures:
        with suppress(CaptionError):
            captions, default = _captions(path, picture, metadata)
            found[picture] = next(iter(captions.values()), default)
        found.setdefault(picture, "")
    return found


def _list_files(root: Path) -> _Listing:
    """Walks `root`, following links once, without hidden files and folders. Order does not depend on the disk."""
    listing, visited = _Listing(), set()

    def unreadable(error: OSError) -> None:
        listing.left_out.append(LeftOut(Path(error.filename), f"the folder cannot be read: {error.strerror}"))

    for folder, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in visited else sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        if real in visited:
            continue
        visited.add(real)
        for name in files:
            path = Path(folder, name)
            suffix = path.suffix.lower()
            if name.startswith("."):
                continue
            if name in METADATA:
                listing.metadata.append(path)
            elif suffix in decode.EXTENSIONS:
                listing.pictures.append(path)
            elif suffix in SIDECARS:
                listing.sidecars.append(path)
            else:
                listing.other[suffix or "no extension"] += 1
    for paths in (listing.pictures, listing.sidecars, listing.metadata):
        paths.sort(key=Path.as_posix)
    return listing


def _all_metadata(listing: _Listing) -> dict[Path, str]:
    """Captions by normalised path; rows that cannot be used, or name no picture, are left out."""
    captions: dict[Path, str] = {}
    pictures = {Path(os.path.normpath(picture)) for picture in listing.pictures}
    for path in listing.metadata:
        metadata = read_metadata(path)
        listing.left_out += [LeftOut(path, f"line {line} {reason}") for line, reason in metadata.problems]
        missing = [picture for picture in metadata.captions if picture not in pictures]
        listing.left_out += [LeftOut(picture, f"named in {path.name}, but no such picture") for picture in missing]
        captions |= metadata.captions  # files are sorted: metadata.jsonl wins over metadata.csv
    return captions


def _folder_notes(root: Path, listing: _Listing) -> list[Note]:
    notes = []
    stems = {picture.with_suffix("") for picture in listing.pictures}
    orphans = [path for path in listing.sidecars if path.with_suffix("") not in stems or path.suffix not in SIDECARS]
    notes += [Note(path, "text without a picture of the same name, not used") for path in orphans]
    if listing.other:
        notes.append(Note(root, f"other files, not used: {_count(listing.other)}"))
    folders = {parent for picture in listing.pictures for parent in picture.parents if parent.is_relative_to(root)}
    for folder in sorted(folders - {root}):
        if form := folder_form(folder.name):
            notes.append(
                Note(folder, f"repeated {form[0]} times an epoch, captioned {form[1]!r} where nothing else is")
            )
    if folder_form(root.resolve().name):
        notes.append(
            Note(root, "the name has kohya's form REPEATS_CAPTION, which counts below the dataset folder only")
        )
    return notes


def _read(root: Path, picture: Path, metadata: dict[Path, str]) -> tuple[ImageItem, list[Note]] | LeftOut:
    repeats, _ = _folder_default(root, picture)
    if repeats == 0:
        return LeftOut(picture, "its folder's name asks for 0 repeats")
    try:
        (width, height), several_frames = decode.verify(picture)
        captions, default = _captions(root, picture, metadata)
        with picture.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except (UnusablePicture, CaptionError, OSError) as error:
        return LeftOut(picture, str(error))
    source, caption = next(iter(captions.items()), ("", default))
    texts = []
    if not caption:
        texts.append(NO_CAPTION)
    if len(set(captions.values())) > 1:
        texts.append(f"captions differ between {', '.join(captions)}; used is {source}")
    if several_frames:
        texts.append(decode.SEVERAL_FRAMES)
    return ImageItem(picture, caption, width, height, repeats, content), [Note(picture, text) for text in texts]


def _captions(root: Path, picture: Path, metadata: dict[Path, str]) -> tuple[dict[str, str], str]:
    """(source -> caption, the first of which is used; the caption where there is no source). Raises CaptionError."""
    captions = read_sidecars(picture)
    normalised = Path(os.path.normpath(picture))
    if normalised in metadata:
        captions["metadata"] = metadata[normalised]
    return captions, _folder_default(root, picture)[1]


def _folder_default(root: Path, picture: Path) -> tuple[int, str]:
    """(repeats, caption) from the nearest folder of kohya's form between the picture and `root`; else (1, "")."""
    for folder in picture.relative_to(root).parents:
        if form := folder_form(folder.name):
            return form
    return 1, ""


def _without_duplicates(items: list[ImageItem]) -> tuple[list[ImageItem], list[LeftOut]]:
    kept: dict[tuple[str, str], ImageItem] = {}
    doubles = []
    for item in items:
        first = kept.setdefault((item.id, item.caption), item)
        if first is not item:
            doubles.append(LeftOut(item.path, f"same picture and caption as {first.path.name}"))
    return list(kept.values()), doubles


def _nothing_found(root: Path, listing: _Listing) -> str:
    looked_for = f"looked for {' '.join(sorted(decode.EXTENSIONS))} there and in its subfolders"
    there = listing.other + Counter(path.suffix.lower() for path in listing.sidecars)
    found = f"found only {_count(there)}" if there else "found no files"
    unreadable = _left_out_lines(root, listing.left_out)
    return "\n".join([f"No pictures in {root}: {looked_for}, {found}", *unreadable])


def _count(extensions: Counter[str]) -> str:
    return ", ".join(f"{number} {extension}" for extension, number in sorted(extensions.items()))


def _left_out_lines(root: Path, left_out: Iterable[LeftOut]) -> list[str]:
    left_out = list(left_out)
    lines = [f"  {_name(root, entry.path)}: {entry.reason}" for entry in left_out[:SHOWN]]
    if len(left_out) > SHOWN:
        lines.append(f"  and {len(left_out) - SHOWN} more")
    return [f"Left out: {len(left_out)}", *lines] if left_out else []


def _names(root: Path, paths: list[Path]) -> str:
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(_name(root, path) for path in paths[:NAMED]) + more


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) and path != root else str(path)
