"""Finding an adapter: a file or folder here, or one adapter of a hub repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from studio.errors import ConfigError
from studio.formats.peft import COMPONENTS, CONFIG, WEIGHTS
from studio.hub import hub_reason, load_errors

_PEFT_FILES = {f"{folder}{name}" for folder in ("", *(f"{part}/" for part in COMPONENTS)) for name in (CONFIG, WEIGHTS)}


def locate(source: str | Path) -> Path:
    """The local path of a file, a folder or a hub id ("user/name" or "user/name/file.safetensors").

    Of a hub repository, only the one adapter is downloaded. Raises ConfigError where there is none,
    and where a repository holds several.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    parts = str(source).split("/")
    is_file = path.suffix == ".safetensors"
    if not all(parts) or parts[0].startswith((".", "~")) or len(parts) < 2 or is_file != (len(parts) > 2):
        raise ConfigError(
            f"there is no adapter at {path.absolute()}; give a .safetensors file, a folder, or a hub id "
            "(user/name, or user/name/file.safetensors)"
        )
    repo = "/".join(parts[:2])
    try:
        return _download(repo, "/".join(parts[2:]))
    except load_errors() as problem:
        raise ConfigError(
            f"there is no adapter at {path.absolute()}, and the hub did not give '{repo}': {hub_reason(problem)}"
        ) from problem


def _download(repo: str, file: str) -> Path:
    """`file` of the repository, or the one adapter in it."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    if file:
        return Path(hf_hub_download(repo, file))
    try:
        files = HfApi().list_repo_files(repo)
    except OfflineModeIsEnabled:
        return Path(snapshot_download(repo))  # what was downloaded before
    if peft_files := sorted(_PEFT_FILES.intersection(files)):
        return Path(snapshot_download(repo, allow_patterns=peft_files))
    return Path(hf_hub_download(repo, _only(repo, [name for name in files if name.endswith(".safetensors")])))


def _only(repo: str, candidates: Sequence[str]) -> str:
    if not candidates:
        raise ConfigError(f"the hub's '{repo}' holds no .safetensors file")
    if len(candidates) > 1:
        raise ConfigError(
            f"the hub's '{repo}' holds {len(candidates)} .safetensors files: {', '.join(candidates)}. "
            f"Name one, such as {repo}/{candidates[0]}"
        )
    return candidates[0]
