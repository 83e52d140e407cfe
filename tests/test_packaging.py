"""The wheel holds what an installed studio needs, and nothing that builds it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_ships_code_presets_and_assets(names: set[str]) -> None:
    shipped = [path for folder in ("studio", "trainers") for path in (ROOT / folder).rglob("*.py")]
    assert {str(path.relative_to(ROOT)) for path in shipped} <= names
    data = [*(ROOT / "presets").glob("*.yaml"), *(path for path in (ROOT / "assets").glob("*/*") if path.is_file())]
    expected = {f"studio/_data/{path.relative_to(ROOT)}" for path in data if "build" not in path.parts}
    assert expected <= names


def test_the_wheel_leaves_out_tests_and_build_scripts(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"studio", "trainers"}
    assert not [name for name in names if "assets/build" in name]


def test_every_dependency_is_pinned() -> None:
    """wandb is left to its users: it follows the service."""
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    wanted = {_normal(requirement) for group in groups for requirement in group}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    assert wanted - {_normal(pin) for pin in pins} == {"wandb"}


def _normal(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")
