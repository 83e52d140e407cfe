"""Adapters on the hub: one is downloaded, never all that a repository holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from studio.errors import ConfigError
from studio.formats.hub import locate


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A hub with one repository of `files`; `asked` holds what was downloaded."""
    state: dict[str, Any] = {"files": [], "asked": [], "offline": False}

    def listing(api: object, repo: str) -> list[str]:
        if state["offline"]:
            raise OfflineModeIsEnabled("offline")
        return state["files"]

    def download(repo: str, file: str) -> str:
        state["asked"].append((repo, file))
        return f"/cache/{file}"

    def snapshot(repo: str, allow_patterns: list[str] | None = None) -> str:
        state["asked"].append((repo, allow_patterns))
        return "/cache"

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", listing)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    return state


def test_the_only_file_is_downloaded(hub: dict[str, Any]) -> None:
    hub["files"] = ["README.md", "sample.png", "deep/ink.safetensors"]
    assert locate("user/ink") == Path("/cache/deep/ink.safetensors")
    assert hub["asked"] == [("user/ink", "deep/ink.safetensors")]


def test_of_a_peft_repository_only_its_adapter_is_downloaded(hub: dict[str, Any]) -> None:
    adapter = ["unet/adapter_config.json", "unet/adapter_model.safetensors"]
    hub["files"] = ["optimizer.safetensors", "checkpoint-10/adapter_model.safetensors", *adapter]
    assert locate("user/ink") == Path("/cache")
    assert hub["asked"] == [("user/ink", adapter)]


def test_of_several_files_one_must_be_named(hub: dict[str, Any]) -> None:
    hub["files"] = ["a.safetensors", "deep/b.safetensors"]
    with pytest.raises(ConfigError, match=r"2 \.safetensors files: a\.safetensors, deep/b\.safetensors.*user/ink/a\."):
        locate("user/ink")
    assert hub["asked"] == []
    assert locate("user/ink/deep/b.safetensors") == Path("/cache/deep/b.safetensors")
    assert hub["asked"] == [("user/ink", "deep/b.safetensors")]


def test_a_repository_without_adapters_is_refused(hub: dict[str, Any]) -> None:
    hub["files"] = ["README.md", "model.ckpt"]
    with pytest.raises(ConfigError, match=r"'user/ink' holds no \.safetensors file"):
        locate("user/ink")


def test_without_a_connection_an_earlier_download_is_used(hub: dict[str, Any]) -> None:
    hub["offline"] = True
    assert locate("user/ink") == Path("/cache") and hub["asked"] == [("user/ink", None)]


@pytest.mark.parametrize("source", ["loras/ink.safetensors", "./a/b", "~/a/b", "/a/b", "a/b/c", "ink", "a//b"])
def test_paths_are_never_taken_for_hub_ids(source: str, hub: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="there is no adapter at"):
        locate(source)
    assert hub["asked"] == []


def test_a_hub_out_of_reach_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in ("someone/no-such-adapter", "someone/no-such-adapter/ink.safetensors"):
        with pytest.raises(ConfigError, match=r"'someone/no-such-adapter': the hub cannot be reached"):
            locate(source)
