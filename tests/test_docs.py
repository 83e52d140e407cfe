"""The code of docs/adapters.md runs as it stands, and `studio methods` knows every method."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from studio.adapters import METHODS
from studio.cli import app

DOCS = Path(__file__).parent.parent / "docs"


def test_the_blocks_of_the_engines_page_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "adapters.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec("\n".join(blocks), {"__name__": "docs"})


def test_every_method_is_listed_with_its_options() -> None:
    result = CliRunner().invoke(app, ["methods", "--json"])
    listed = {one["name"]: one for one in json.loads(result.stdout)["methods"]}
    assert set(listed) == set(METHODS)
    assert listed["lora"]["options"]["init"] == "kaiming"
    assert all(one["about"] and one["layers"] for one in listed.values())


@pytest.mark.parametrize("method", METHODS)
def test_one_method_has_its_whole_description(method: str) -> None:
    result = CliRunner().invoke(app, ["methods", method])
    assert result.exit_code == 0 and result.stdout.startswith(method) and len(result.stdout.splitlines()) > 4
