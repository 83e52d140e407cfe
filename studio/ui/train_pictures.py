"""What the train screen does with datasets: which there are, what comes in, and what the clinic mends."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from studio import paths
from studio.config import DataConfig
from studio.data import collection
from studio.errors import ConfigError, DatasetError, StudioError
from studio.settings import explain
from studio.workspace import Workspace

DEMO = "demo"
LOOPBACK = ("127.0.0.1", "::1")


def names(workspace: Workspace) -> list[str]:
    """The datasets of a workspace."""
    folder = workspace.datasets
    return sorted(one.name for one in folder.glob("[!.]*") if one.is_dir()) if folder.is_dir() else []


def folder_of(workspace: Workspace, dataset: str | None) -> Path:
    """The folder of a dataset. Raises DatasetError for none, and for a name that is no folder of the workspace."""
    if not dataset:
        raise DatasetError("There are no pictures yet: drop them on this page, or take the demo's")
    folder = workspace.datasets / dataset
    if Path(dataset).name != dataset or dataset.startswith(".") or "\0" in dataset or not folder.is_dir():
        raise DatasetError(f"there is no dataset '{dataset}': choose one of the list")
    return folder


def is_local(request: Any) -> bool:
    """Whether a request comes from the machine that runs the studio, and nobody had to sign in: only then a page may
    name folders of that machine. Behind a proxy, everybody seems to be local: its headers tell."""
    headers = request.headers
    if any(name in headers for name in ("authorization", "forwarded", "x-forwarded-for", "x-real-ip")):
        return False
    host = headers.get("host", "").rpartition(":")[0].strip("[]")  # another name may be anybody's page
    return bool(request.client) and request.client.host in LOOPBACK and host in (*LOOPBACK, "localhost")


def take_files(workspace: Workspace, files: list[str], dataset: str | None, name: str) -> tuple[str, str]:
    """Puts uploaded files into a dataset, a new one where none is chosen; (dataset, what became of the files)."""
    if dataset:
        folder = folder_of(workspace, dataset)
    else:
        folder = collection.new_folder(workspace.datasets, name.strip() or "my pictures")
    added = collection.add_files(folder, [(Path(file), Path(file).name) for file in files])
    _clear_away(files)
    notes = [f"{len(added.pictures)} pictures and {len(added.captions)} captions came in."]
    notes += [f"Not used: {file}: {reason}." for file, reason in added.refused[:5]]
    if len(added.refused) > 5:
        notes.append(f"Not used: {len(added.refused) - 5} more.")
    if not dataset and not added.pictures:
        folder.rmdir()
        return "", " ".join(notes)
    return folder.name, " ".join(notes)


def _clear_away(files: list[str]) -> None:
    """Removes what is left of uploads: captions and refused files, and the folder that each had for itself."""
    for file in map(Path, files):
        with suppress(OSError):
            file.unlink(missing_ok=True)
            file.parent.rmdir()


def take_folder(workspace: Workspace, source: Path, name: str) -> str:
    """Copies a folder into a new dataset; its name. Raises DatasetError for a folder without pictures."""
    source = source.expanduser().resolve()
    if not source.is_dir():
        raise DatasetError(f"there is no folder {source}: give the whole path of one")
    if workspace.datasets in (source, *source.parents):
        raise DatasetError(f"{source} is a dataset of this workspace already: choose it from the list")
    folder = collection.new_folder(workspace.datasets, name.strip() or source.name)
    try:
        collection.import_folder(source, folder)
    except DatasetError:
        folder.rmdir()
        raise
    return folder.name


def take_demo(workspace: Workspace) -> str:
    """The demo's pictures as a dataset, copied once; its name."""
    return DEMO if DEMO in names(workspace) else take_folder(workspace, paths.assets() / "demo", DEMO)


def save_caption(workspace: Workspace, given: list[str]) -> str:
    """Writes (dataset, picture, caption), as a page sends them. Returns what went wrong, or ""."""
    try:
        dataset, picture, caption = map(str, given)
        collection.write_caption(folder_of(workspace, dataset), picture, caption)
    except (StudioError, OSError, ValueError, TypeError) as problem:
        return str(problem)
    return ""


def data_config(resolution: float | None, step: float | None, aspect: float | None) -> DataConfig:
    """What buckets depend on, as the form's fields give it. Raises ConfigError."""
    try:
        return DataConfig.model_validate({"resolution": resolution, "bucket_step": step, "max_aspect": aspect})
    except ValidationError as problem:
        raise ConfigError(explain(problem)) from problem


def fix(folder: Path, kind: str, data: DataConfig, trigger: str) -> None:
    """Does what the clinic's finding of this kind offers; nothing where it is mended already."""
    from studio.data.clinic import examine

    for finding in examine(folder, data, trigger).findings:
        if finding.kind == kind:
            collection.leave_out(folder, finding.leave_out)
            collection.write_captions(folder, finding.captions)
            return


def put_all_back(folder: Path) -> None:
    """Brings back whatever was left out."""
    collection.put_back(folder, collection.left_out(folder))
