"""The library: what comes in and why not, a header rewritten around the same tensors, names, and a bin."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from PIL import Image
from safetensors import safe_open

from studio import jobs
from studio.errors import ConfigError
from studio.formats import read_adapter, write_adapter
from studio.ui import shelf
from studio.ui.adapters import adapters_of, find
from studio.ui.context import Context
from studio.ui.files import find as served
from studio.ui.library import EMPTY, facts_html, picture_of, tiles_html
from studio.workspace import Workspace

INK = "library/ink.safetensors"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, _, adapters = tiny.random_adapter("sd15")
    return write_adapter(tiny.state_of(family, adapters), tmp_path_factory.mktemp("made") / "ink.safetensors")


@pytest.fixture
def workspace(tmp_path: Path, file: Path) -> Workspace:
    """With "ink" in its library."""
    workspace = Workspace(tmp_path / "home").create()
    shelf.take_file(workspace, file)
    return workspace


def picture(place: Path, colour: str = "red") -> Path:
    Image.new("RGB", (600, 300), colour).save(place)
    return place


def tensor_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def visible(workspace: Workspace) -> set[str]:
    return {path.name for path in workspace.library.iterdir()}


def test_a_file_comes_in_as_it_is_and_a_taken_name_gets_a_number(workspace: Workspace, file: Path) -> None:
    assert (workspace.library / "ink.safetensors").read_bytes() == file.read_bytes()
    assert shelf.take_file(workspace, file).key == "library/ink 2.safetensors"
    assert visible(workspace) == {"ink.safetensors", "ink 2.safetensors"}


@pytest.mark.parametrize("name", ["../../escape.safetensors", "a/b/escape.safetensors", ".escape.safetensors"])
def test_an_uploads_name_leads_nowhere_else(workspace: Workspace, file: Path, tmp_path: Path, name: str) -> None:
    upload = tmp_path / "up" / "x" / "y" / name
    upload.parent.mkdir(parents=True, exist_ok=True)
    upload.write_bytes(file.read_bytes())
    assert shelf.take_file(workspace, upload).key == "library/escape.safetensors"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("lie.safetensors", b"\xff" * 100, "'lie.safetensors' cannot be read"),
        ("short.safetensors", b"", "'short.safetensors'"),
        ("code.ckpt", b"\x80\x02", "no .safetensors file"),
        ("page.html", b"<script>", "no .safetensors file"),
    ],
)
def test_what_is_no_adapter_is_refused_and_leaves_nothing(
    workspace: Workspace, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said) as refusal:
        shelf.take_file(workspace, tmp_path / name)
    assert str(workspace.root) not in str(refusal.value)
    assert visible(workspace) == {"ink.safetensors"}


def test_editing_writes_the_header_and_leaves_the_tensors(workspace: Workspace, tmp_path: Path) -> None:
    path = workspace.library / "ink.safetensors"
    before, seed = tensor_bytes(path), read_adapter(path).metadata["ss_seed"]
    fields = {"title": 'Ink "wash" 墨', "triggers": "ink style", "description": "", "licence": "CC0-1.0"}
    shelf.edit(workspace, INK, fields, picture(tmp_path / "red.png"))
    one = find(workspace, INK)
    assert shelf.describe(one) == fields and one.thumbnail.startswith("data:image/jpeg;base64,")
    assert tensor_bytes(path) == before and one.metadata["ss_seed"] == seed
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata()["modelspec.license"] == "CC0-1.0" and "modelspec.description" not in opened.metadata()
    assert visible(workspace) == {"ink.safetensors", "ink.png"}
    shelf.edit(workspace, INK, {**fields, "triggers": ""})
    assert find(workspace, INK).triggers == "" and find(workspace, INK).thumbnail == one.thumbnail


def test_clearing_trigger_words_clears_them_wherever_the_file_has_them(workspace: Workspace) -> None:
    from studio.formats.in_place import copy_with_metadata

    path = workspace.library / "other.safetensors"
    copy_with_metadata(workspace.library / "ink.safetensors", path, {"ss_trigger_words": "ohwx", "ss_seed": "1"})
    key = "library/other.safetensors"
    assert shelf.describe(find(workspace, key))["triggers"] == "ohwx"
    shelf.edit(workspace, key, {"triggers": ""})
    assert find(workspace, key).triggers == "" and find(workspace, key).metadata["ss_seed"] == "1"


def test_an_edit_that_fails_changes_nothing(workspace: Workspace, tmp_path: Path) -> None:
    before = (workspace.library / "ink.safetensors").read_bytes()
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="no picture"):
        shelf.edit(workspace, INK, {"title": "new"}, tmp_path / "no.png")
    with pytest.raises(ConfigError, match="characters"):
        shelf.edit(workspace, INK, {"title": "x" * 5000})
    assert (workspace.library / "ink.safetensors").read_bytes() == before and visible(workspace) == {"ink.safetensors"}


def test_a_thumbnail_in_a_file_that_comes_in_becomes_its_picture(workspace: Workspace, tmp_path: Path) -> None:
    shelf.edit(workspace, INK, {}, picture(tmp_path / "red.png"))
    (tmp_path / "red ink.safetensors").write_bytes((workspace.library / "ink.safetensors").read_bytes())
    one = shelf.take_file(workspace, tmp_path / "red ink.safetensors")
    beside = shelf.picture(one)
    assert beside == workspace.library / "red ink.png"
    with Image.open(beside) as image:
        red, green, _ = image.convert("RGB").getpixel((9, 9))  # type: ignore[misc]
    assert red > 240 and green < 15


def test_renaming_takes_the_picture_along_and_no_taken_name(workspace: Workspace, tmp_path: Path, file: Path) -> None:
    shelf.edit(workspace, INK, {}, picture(tmp_path / "red.png"))
    assert shelf.rename(workspace, INK, "../new ink") == "library/new ink.safetensors"
    assert visible(workspace) == {"new ink.safetensors", "new ink.png"}
    shelf.take_file(workspace, file)
    with pytest.raises(ConfigError, match="already"):
        shelf.rename(workspace, INK, "new ink")


def test_deleting_is_undone_even_where_the_name_was_taken_since(
    workspace: Workspace, tmp_path: Path, file: Path
) -> None:
    shelf.edit(workspace, INK, {}, picture(tmp_path / "red.png"))
    content = (workspace.library / "ink.safetensors").read_bytes()
    id = shelf.delete(workspace, INK)
    assert adapters_of(workspace) == [] and shelf.deleted(workspace) == [id]
    assert served(workspace, f"library/.bin/{id}/ink.safetensors") is None
    assert shelf.restore(workspace, id) == INK and shelf.deleted(workspace) == []
    assert (workspace.library / "ink.safetensors").read_bytes() == content
    id = shelf.delete(workspace, INK)
    shelf.take_file(workspace, file)
    assert shelf.restore(workspace, id) == "library/ink 2.safetensors"
    assert (workspace.library / "ink 2.png").is_file()


@pytest.mark.parametrize("id", ["", "..", "../..", "nothing"])
def test_only_what_is_in_the_bin_comes_back(workspace: Workspace, id: str) -> None:
    shelf.delete(workspace, INK)
    with pytest.raises(ConfigError, match="nothing to bring back"):
        shelf.restore(workspace, id)


def test_a_runs_file_is_kept_before_it_is_changed(workspace: Workspace, file: Path) -> None:
    run = workspace.runs / "20260101-120000-fox"
    (run / "samples" / "step-000010").mkdir(parents=True)
    picture(run / "samples" / "step-000010" / "00.png", "blue")
    (run / "status.json").write_text('{"state": "finished"}')
    (run / "fox.safetensors").write_bytes(file.read_bytes())
    jobs.save_result(run, jobs.Result([run / "fox.safetensors"]))
    key = "runs/20260101-120000-fox/fox.safetensors"
    for change in (lambda: shelf.edit(workspace, key, {}), lambda: shelf.rename(workspace, key, "name")):
        with pytest.raises(ConfigError, match="belongs to its run"):
            change()
    with pytest.raises(ConfigError, match="belongs to its run"):
        shelf.delete(workspace, key)
    kept = shelf.keep(workspace, key)
    assert kept.key == "library/fox.safetensors" and (workspace.library / "fox.png").is_file()
    assert (run / "fox.safetensors").is_file()


def test_tiles_say_what_each_is_and_nothing_from_a_file_becomes_markup(workspace: Workspace, tmp_path: Path) -> None:
    context = Context(workspace)
    assert tiles_html(context, [], "") == EMPTY
    evil = "<img src=x onerror=alert(1)>"
    shelf.edit(workspace, INK, {"title": evil, "triggers": evil, "licence": evil})
    one = find(workspace, INK)
    page = tiles_html(context, [one], INK) + facts_html(context, one)
    assert "<img src=x" not in page and 'aria-pressed="true"' in page and "rank 4" in page and "no picture" in page
    shelf.edit(workspace, INK, {}, picture(tmp_path / "red.png"))
    assert picture_of(context, find(workspace, INK)).startswith("/files/library/ink.png?width=256&v=")
