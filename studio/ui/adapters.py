"""The adapters of a workspace, by their headers alone: a list of hundreds takes no tensor library and no tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from studio import jobs
from studio.errors import ConfigError, nearest
from studio.status import read_status
from studio.workspace import Workspace

TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_words", "ss_trigger")
"""Where files keep the words that call what they learnt, as in `studio.formats.metadata`."""
_LONGEST_HEADER = 64 << 20  # bytes; an honest one has a few hundred for each layer
_BASES = {  # sd-scripts' version of the base -> what people call it
    "sd_v1": "SD 1.5",
    "sd_v2": "SD 2",
    "sd_v2_v": "SD 2 (v-prediction)",
    "sdxl_base_v1-0": "SDXL",
    "medium": "SD 3 medium",
    "5-medium": "SD 3.5 medium",
    "5-large": "SD 3.5 large",
    "flux1": "FLUX.1",
}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter, and what its header says of itself: "" for what it does not say.

    `key` is its place in the workspace ("library/ink.safetensors"), which is what pages and requests may name;
    `source` is the base that the studio trained it on, `thumbnail` a picture as a data URL.
    """

    path: Path
    key: str
    label: str
    base: str = ""
    source: str = ""
    method: str = ""
    rank: str = ""
    title: str = ""
    triggers: str = ""
    thumbnail: str = ""
    size: int = 0
    changed: float = 0.0
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def in_library(self) -> bool:
        return self.key.startswith("library/")

    @property
    def facts(self) -> str:
        """ "SD 1.5, lora, rank 8", as far as it is known."""
        return ", ".join(filter(None, (self.base, self.method, self.rank and f"rank {self.rank}")))


def adapters_of(workspace: Workspace) -> list[AdapterFile]:
    """The adapters of the library, by name, and then those that runs made, the newest first."""
    library = sorted(workspace.library.glob("[!.]*"), key=lambda path: path.name.removesuffix(".safetensors").lower())
    found = [(path, path.name.removesuffix(".safetensors")) for path in library]
    for folder in sorted(workspace.runs.glob("[!.]*"), reverse=True):
        if read_status(folder).state == "finished" and (made := jobs.result(folder)) and made.files:
            found.append((made.files[0], f"{made.files[0].stem} (run {folder.name})"))
    return [_adapter(workspace, path, label) for path, label in found if _weights(path)]


def find(workspace: Workspace, key: str | None) -> AdapterFile:
    """The adapter with this key. Raises ConfigError for any other text: a path is none."""
    known = {one.key: one for one in adapters_of(workspace)}
    if not key:
        raise ConfigError("choose an adapter first")
    if key not in known:
        raise ConfigError(f"there is no adapter '{key}'.{nearest(key, known)} It may have been renamed or deleted.")
    return known[key]


def choices(adapters: list[AdapterFile]) -> list[tuple[str, str]]:
    """(what a list shows, key)."""
    return [(f"{one.label} · {one.facts}" if one.facts else one.label, one.key) for one in adapters]


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata in a file's header; {} where there is none that can be read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= _LONGEST_HEADER else {}
    except (OSError, ValueError, RecursionError):
        return {}
    found = header.get("__metadata__") if isinstance(header, dict) else None
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _weights(path: Path) -> Path | None:
    """The file with the tensors: a peft folder's is in it. None for what is no adapter."""
    if path.suffix == ".safetensors" and path.is_file():
        return path
    return next(iter(sorted(path.rglob("adapter_model.safetensors"))), None) if path.is_dir() else None


def _adapter(workspace: Workspace, path: Path, label: str) -> AdapterFile:
    weights = _weights(path)
    assert weights is not None
    stat = weights.stat()
    facts = _facts(weights, stat.st_size, stat.st_mtime_ns)
    return AdapterFile(path, str(path.relative_to(workspace.root)), label, **facts)


@lru_cache(maxsize=2048)
def _facts(weights: Path, size: int, changed_ns: int) -> dict[str, Any]:
    """What the header says; size and time tell the versions of a file apart."""
    metadata = metadata_of(weights)
    version = metadata.get("ss_base_model_version", "")
    thumbnail = metadata.get("modelspec.thumbnail", "")
    trained = _json(_json(metadata.get("studio.config")).get("model"))
    return {
        "base": _BASES.get(version, version) or metadata.get("modelspec.architecture", "").partition("/")[0],
        "source": str(trained.get("source") or metadata.get("ss_sd_model_name", "")),  # a blend has but the latter
        "method": _method(metadata),
        "rank": _known(metadata.get("ss_network_dim", "")),
        "title": metadata.get("modelspec.title", ""),
        "triggers": next((metadata[key] for key in TRIGGERS if metadata.get(key)), ""),
        "thumbnail": thumbnail if thumbnail.startswith("data:image/") and '"' not in thumbnail else "",
        "size": size,
        "changed": changed_ns / 1e9,
        "metadata": metadata,
    }


def _method(metadata: Mapping[str, str]) -> str:
    """sd-scripts' module and its arguments say which method it is."""
    if not metadata.get("ss_network_module"):
        return ""
    arguments = _json(metadata.get("ss_network_args"))
    return "dora" if arguments.get("dora_wd") == "True" else str(arguments.get("algo", "lora"))


def _known(number: str) -> str:
    """ "8"; "mixed" where layers differ."""
    return {"None": "", "Dynamic": "mixed"}.get(number, number)


def _json(value: Any) -> dict[str, Any]:
    """A table, or one in JSON; {} for anything else."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
