"""What the library screen does with files: thumbnails, metadata, import, names, and a bin that gives back."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from studio.errors import ConfigError
from studio.ui.adapters import AdapterFile, find, metadata_of
from studio.ui.blending import free_name, safe_name
from studio.workspace import Workspace

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FIELDS = {  # what the editor calls it -> where a file keeps it
    "title": "modelspec.title",
    "triggers": "modelspec.trigger_phrase",
    "description": "modelspec.description",
    "licence": "modelspec.license",
}
THUMBNAIL = "modelspec.thumbnail"
LONGEST = 4000  # characters of a field


def take_file(workspace: Workspace, upload: Path) -> AdapterFile:
    """Puts an uploaded file into the library under a safe name that is free; a taken one gets a number.

    Raises ConfigError, and keeps nothing, for what is no adapter that can be read.
    """
    from studio.formats import read_adapter

    if upload.suffix.lower() != ".safetensors":
        raise ConfigError(f"'{upload.name}' is no .safetensors file: other kinds may hold code, and are not taken")
    name = _unused(workspace, safe_name(upload.name))
    part = workspace.library / f".{name}.{os.getpid()}.safetensors"
    try:
        shutil.copyfile(upload, part)
        read_adapter(part)
        target = workspace.library / f"{name}.safetensors"
        os.replace(part, target)
    except ConfigError as problem:
        raise ConfigError(str(problem).replace(str(part), f"'{upload.name}'")) from problem
    finally:
        part.unlink(missing_ok=True)
    return find(workspace, f"library/{target.name}")


def keep(workspace: Workspace, key: str) -> AdapterFile:
    """Copies what a run made into the library, with its first sample beside it. Raises ConfigError."""
    one = find(workspace, key)
    if one.in_library:
        raise ConfigError(f"'{one.label}' is in the library already")
    name = _unused(workspace, safe_name(one.path.name))
    target = workspace.library / f"{name}{one.path.suffix}"
    picture = sidecar(workspace, one)
    (shutil.copytree if one.path.is_dir() else shutil.copyfile)(one.path, target)
    if picture:
        shutil.copyfile(picture, workspace.library / f"{name}{picture.suffix}")
    return find(workspace, f"library/{target.name}")


def sidecar(workspace: Workspace, one: AdapterFile) -> Path | None:
    """The picture beside a file; of a run, its last step's first sample. None without any."""
    stem = one.path.name.removesuffix(".safetensors")
    beside = (one.path.with_name(f"{stem}{ending}") for ending in PICTURES)
    samples = sorted((one.path.parent / "samples").glob("*/00.png"))
    return next((picture for picture in beside if picture.is_file()), samples[-1] if samples else None)


def describe(one: AdapterFile) -> dict[str, str]:
    """The editor's fields as the file has them."""
    return {name: one.triggers if name == "triggers" else one.metadata.get(key, "") for name, key in FIELDS.items()}


def edit(workspace: Workspace, key: str, fields: Mapping[str, str], picture: Path | None = None) -> None:
    """Rewrites a file's header with these fields, "" to remove one; `picture` becomes the thumbnail.

    The file is replaced whole or not at all, and its tensors stay, byte for byte. Raises ConfigError for a field that
    is too long, a picture that cannot be read, and for files that are not in the library.
    """
    from studio.formats.in_place import copy_with_metadata

    path = _own(workspace, key).path
    if path.is_dir():
        raise ConfigError("a peft folder keeps its description in files of its own: convert it to edit it here")
    if long := [name for name, text in fields.items() if len(text) > LONGEST]:
        raise ConfigError(f"the {long[0]} has more than {LONGEST} characters: shorten it")
    metadata = metadata_of(path) | {FIELDS[name]: text.strip() for name, text in fields.items()}
    if picture:
        metadata[THUMBNAIL] = _small(picture)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        copy_with_metadata(path, part, {name: text for name, text in metadata.items() if text})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def rename(workspace: Workspace, key: str, name: str) -> str:
    """Gives a file of the library another name, its picture too; the new key. Raises ConfigError for a taken one."""
    one = _own(workspace, key)
    name = free_name(workspace, name)
    target = one.path.with_name(f"{name}{_ending(one.path)}")
    picture = _beside(one)
    one.path.rename(target)
    if picture:
        picture.rename(picture.with_name(f"{name}{picture.suffix}"))
    return f"library/{target.name}"


def delete(workspace: Workspace, key: str) -> str:
    """Moves a file of the library and its picture into the bin; what `restore` takes to bring them back."""
    one = _own(workspace, key)
    place = bin_of(workspace) / f"{time.time_ns():020d}"
    place.mkdir(parents=True)
    for path in filter(None, (_beside(one), one.path)):
        path.rename(place / path.name)
    return place.name


def deleted(workspace: Workspace) -> list[tuple[str, str]]:
    """(name, what `restore` takes) of what is in the bin, the latest first."""
    places = sorted(bin_of(workspace).glob("[0-9]*"), reverse=True)
    return [(_main(place).name.removesuffix(".safetensors"), place.name) for place in places if _main(place)]


def restore(workspace: Workspace, id: str) -> str:
    """Brings a deleted adapter back, under a number where its name was taken since; its key. Raises ConfigError."""
    if id not in [one for _, one in deleted(workspace)]:
        raise ConfigError("there is nothing to bring back")
    place = bin_of(workspace) / id
    main = _main(place)
    old = main.name.removesuffix(".safetensors")
    name = _unused(workspace, old)
    for path in list(place.iterdir()):
        path.rename(workspace.library / f"{name}{path.name.removeprefix(old)}")
    place.rmdir()
    return f"library/{name}{_ending(main)}"


def bin_of(workspace: Workspace) -> Path:
    """The folder of deleted adapters, hidden, so that it is in no list and never served."""
    return workspace.library / ".bin"


def _own(workspace: Workspace, key: str) -> AdapterFile:
    one = find(workspace, key)
    if not one.in_library:
        raise ConfigError("this file belongs to its run: put it into the library first")
    return one


def _beside(one: AdapterFile) -> Path | None:
    """The picture of a library's file that is its own."""
    stem = one.path.name.removesuffix(".safetensors")
    beside = (one.path.with_name(f"{stem}{ending}") for ending in PICTURES)
    return next((picture for picture in beside if picture.is_file()), None)


def _main(place: Path) -> Path:
    """The adapter among the files of a place in the bin."""
    return next(path for path in place.iterdir() if path.suffix not in PICTURES)


def _ending(path: Path) -> str:
    return ".safetensors" if path.name.endswith(".safetensors") else ""


def _unused(workspace: Workspace, name: str) -> str:
    """The name, or the first of "name 2", "name 3", ... that is free."""
    taken = {path.name.removesuffix(".safetensors") for path in workspace.library.iterdir()}
    return next(one for number in range(1, len(taken) + 2) if (one := f"{name} {number}" if number > 1 else name) not in taken)


def _small(picture: Path) -> str:
    from PIL import UnidentifiedImageError

    from studio.formats.metadata import thumbnail

    try:
        return thumbnail(picture)
    except (OSError, UnidentifiedImageError) as problem:
        raise ConfigError(f"'{picture.name}' is no picture that can be read: take a PNG or JPEG") from problem
