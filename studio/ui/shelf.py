"""What the library screen does with files: thumbnails, metadata, import, names, and a bin that gives back."""

from __future__ import annotations

import base64
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO

from studio.errors import ConfigError
from studio.ui.adapters import TRIGGERS, AdapterFile, find, metadata_of
from studio.ui.blending import free_name, safe_name
from studio.workspace import Workspace

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FIELDS = {  # what the editor calls it -> where a file keeps it
    "title": "modelspec.title",
    "triggers": TRIGGERS[0],
    "description": "modelspec.description",
    "licence": "modelspec.license",
}
THUMBNAIL = "modelspec.thumbnail"
LONGEST = 4000  # characters of a field


def take_file(workspace: Workspace, upload: Path) -> AdapterFile:
    """Puts an uploaded file into the library under a safe name that is free: a taken one gets a number.

    Raises ConfigError, and keeps nothing, for what is no adapter that can be read.
    """
    from studio.formats import read_adapter

    if upload.suffix.lower() != ".safetensors":
        raise ConfigError(f"'{upload.name}' is no .safetensors file: other kinds may hold code, and are not taken")
    name = _unused(workspace, safe_name(upload.name))
    part = workspace.library / f".{name}.{os.getpid()}.safetensors"
    target = workspace.library / f"{name}.safetensors"
    try:
        shutil.copyfile(upload, part)
        read_adapter(part)
        os.replace(part, target)
    except ConfigError as problem:
        raise ConfigError(str(problem).replace(str(part), f"'{upload.name}'")) from problem
    finally:
        part.unlink(missing_ok=True)
    one = find(workspace, f"library/{target.name}")
    with suppress(ConfigError, ValueError):  # from anywhere: what is no picture is none
        _put_beside(one, BytesIO(base64.b64decode(one.thumbnail.partition("base64,")[2])))
    return one


def keep(workspace: Workspace, key: str) -> AdapterFile:
    """Copies what a run made into the library, with its last sample beside it. Raises ConfigError."""
    one = find(workspace, key)
    if one.in_library:
        raise ConfigError(f"'{one.label}' is in the library already")
    target = workspace.library / f"{_unused(workspace, safe_name(one.path.name))}{_ending(one.path)}"
    (shutil.copytree if one.path.is_dir() else shutil.copyfile)(one.path, target)
    kept = find(workspace, f"library/{target.name}")
    if sample := picture(one):
        _put_beside(kept, sample)
    return kept


def picture(one: AdapterFile) -> Path | None:
    """The picture beside a file; of a run's, the first sample of its last step. None without any."""
    samples = () if one.in_library else sorted((one.path.parent / "samples").glob("*/00.png"), reverse=True)
    return next(iter((*_beside(one.path), *samples)), None)


def describe(one: AdapterFile) -> dict[str, str]:
    """The editor's fields as the file has them."""
    return {name: one.metadata.get(key, "") for name, key in FIELDS.items()} | {"triggers": one.triggers}


def edit(workspace: Workspace, key: str, fields: Mapping[str, str], picture: Path | None = None) -> None:
    """Rewrites a file's header with these fields, "" to remove one; `picture` becomes the thumbnail.

    The file is replaced whole or not at all, and its tensors stay, byte for byte. Raises ConfigError for a field that
    is too long, a picture that cannot be read, and for files that are not in the library.
    """
    from studio.formats.in_place import copy_with_metadata

    one = _own(workspace, key)
    if one.path.is_dir():
        raise ConfigError("a peft folder keeps its description in files of its own: convert it to edit it here")
    if long := [name for name, text in fields.items() if len(text) > LONGEST]:
        raise ConfigError(f"the {long[0]} has more than {LONGEST} characters: shorten it")
    metadata = metadata_of(one.path) | {FIELDS[name]: text.strip() for name, text in fields.items()}
    if "triggers" in fields:  # the one field that files keep in several places
        metadata |= dict.fromkeys(TRIGGERS[1:], "")
    if picture:
        metadata[THUMBNAIL] = _put_beside(one, picture)
    part = one.path.with_name(f".{one.path.name}.{os.getpid()}.part")
    try:
        copy_with_metadata(one.path, part, {name: text for name, text in metadata.items() if text})
        os.replace(part, one.path)
    finally:
        part.unlink(missing_ok=True)


def rename(workspace: Workspace, key: str, name: str) -> str:
    """Gives a file of the library another name, its picture too; the new key. Raises ConfigError for a taken one."""
    one = _own(workspace, key)
    name = free_name(workspace, name)
    target = one.path.with_name(f"{name}{_ending(one.path)}")
    pictures = _beside(one.path)
    one.path.rename(target)
    for file in pictures:
        file.rename(file.with_name(f"{name}{file.suffix}"))
    return f"library/{target.name}"


def delete(workspace: Workspace, key: str) -> str:
    """Moves a file of the library and its picture into the bin; what `restore` takes to bring them back."""
    one = _own(workspace, key)
    place = bin_of(workspace) / f"{time.time_ns():020d}"
    place.mkdir(parents=True)
    for path in (*_beside(one.path), one.path):
        path.rename(place / path.name)
    return place.name


def deleted(workspace: Workspace) -> list[str]:
    """What `restore` takes of all that is in the bin, the latest first."""
    return sorted((file.parent.name for file in bin_of(workspace).glob("[0-9]*/*") if _is_adapter(file)), reverse=True)


def restore(workspace: Workspace, id: str) -> str:
    """Brings a deleted adapter back, under a number where its name was taken since; its key. Raises ConfigError."""
    if id not in deleted(workspace):
        raise ConfigError("there is nothing to bring back")
    place = bin_of(workspace) / id
    main = next(filter(_is_adapter, place.iterdir()))
    old = main.name.removesuffix(".safetensors")
    name = _unused(workspace, old)
    for path in list(place.iterdir()):
        path.rename(workspace.library / f"{name}{path.name.removeprefix(old)}")
    place.rmdir()
    return f"library/{name}{_ending(main)}"


def bin_of(workspace: Workspace) -> Path:
    """The folder of deleted adapters, hidden: it is in no list and never served."""
    return workspace.library / ".bin"


def _own(workspace: Workspace, key: str) -> AdapterFile:
    one = find(workspace, key)
    if not one.in_library:
        raise ConfigError("this file belongs to its run: keep it in the library first")
    return one


def _beside(path: Path) -> list[Path]:
    """The pictures of a file's name beside it."""
    stem = path.name.removesuffix(".safetensors")
    return [file for ending in PICTURES if (file := path.with_name(f"{stem}{ending}")).is_file()]


def _put_beside(one: AdapterFile, source: Path | IO[bytes]) -> str:
    """Makes a picture the one beside an adapter; returns it as metadata hold it. Raises ConfigError for no picture."""
    from PIL import Image

    from studio.formats.metadata import thumbnail

    target = one.path.with_name(f"{one.path.name.removesuffix('.safetensors')}.png")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with Image.open(source) as image:
            small = image.convert("RGB")
        small.thumbnail((512, 512))
        small.save(part, "PNG")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        part.unlink(missing_ok=True)
        raise ConfigError("the thumbnail is no picture that can be read: take a PNG or a JPEG") from problem
    for file in _beside(one.path):
        file.unlink()
    os.replace(part, target)
    return thumbnail(target)


def _is_adapter(path: Path) -> bool:
    return path.suffix.lower() not in PICTURES


def _ending(path: Path) -> str:
    return ".safetensors" if path.name.endswith(".safetensors") else ""


def _unused(workspace: Workspace, name: str) -> str:
    """The name, or the first of "name 2", "name 3", ... that is free."""
    taken = {path.name.removesuffix(".safetensors") for path in workspace.library.iterdir()}
    names = (name, *(f"{name} {number}" for number in range(2, len(taken) + 3)))
    return next(one for one in names if one not in taken)
