"""The blend screen: its tables say what the algebra has, and the file that it saves draws what its preview drew."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from studio import jobs
from studio.adapters import AdapterConfig, AdapterPlan
from studio.algebra import BLENDS
from studio.errors import ConfigError
from studio.formats import FORMATS, read_adapter, write_adapter
from studio.jobs import queue
from studio.runs import look
from studio.ui import blend, blending, checking
from studio.ui import blend_html as html
from studio.ui.adapters import adapters_of, find
from studio.ui.blending import METHODS, SETTINGS, Scene, free_name, recipe, safe_name
from studio.ui.context import Context
from studio.workspace import Workspace

INK, WASH = "library/ink.safetensors", "library/wash.safetensors"
ROWS = [(INK, 0.8, ""), (WASH, 0.5, "text-encoder = 0.5")]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """With two adapters in its library, and nobody who works on its queue but `work`."""
    workspace = Workspace(tmp_path / "home").create()
    tiny.write_two(workspace.library)
    monkeypatch.setattr(jobs, "ensure_supervisor", lambda workspace: None)
    return workspace


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(str(tiny.folder("sd15")), "a red fox", seed=3, steps=2)


def work(workspace: Workspace) -> None:
    """Does all that waits."""
    for entry in queue.waiting(workspace):
        assert queue.take(workspace, entry)
        jobs.run_job(entry.folder)
        assert look(entry.folder).status.state == "finished"


def made(folder: Path) -> Path:
    found = jobs.result(folder)
    assert found is not None
    return found.files[0]


# -- what the page offers --------------------------------------------------------------------


def test_every_blend_is_offered_with_all_its_settings_and_defaults() -> None:
    assert {name: dict(one.settings) for name, one in METHODS.items()} == {
        name: dict(one.settings) for name, one in BLENDS.items()
    }
    assert set(SETTINGS) == {name for one in BLENDS.values() for name in one.settings}


def test_every_layout_for_whole_adapters_is_offered() -> None:
    from studio.ui.blend_tools import LAYOUTS

    assert set(blend.FORMATS) == set(LAYOUTS) == set(FORMATS) - {"embedding"}


def test_lists_and_screens_load_no_tensor_library() -> None:
    code = "import sys; import studio.ui.blend, studio.ui.library; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# -- what it asks for ------------------------------------------------------------------------


def test_a_recipe_has_the_methods_own_settings_alone(workspace: Workspace) -> None:
    everything = {"density": 0.3, "scale": 2.0, "gamma": 0.1, "normalise": True}
    made = recipe(workspace, [*ROWS, ("", 1.0, "")], "ties", everything, {"rank": 4})
    assert made.settings == {"density": 0.3, "scale": 2.0} and made.rank == 4
    assert [use.strength for use in made.adapters] == [0.8, 0.5]
    assert made.adapters[1].blocks == {"text-encoder": 0.5} and made.file.place == "job"
    assert made.base == "", "LoRA alone needs no base"


def test_methods_that_need_the_base_get_it(workspace: Workspace) -> None:
    plan = AdapterPlan(("attention",), config=AdapterConfig(method="lokr", rank=2, alpha=1.0))
    family, _, adapters = tiny.random_adapter("sd15", plan)
    write_adapter(tiny.state_of(family, adapters), workspace.library / "kron.safetensors")
    rows = [ROWS[0], ("library/kron.safetensors", 1.0, "")]
    assert recipe(workspace, rows, "linear", {}, model="builtin").base == "builtin"


def test_the_base_is_the_adapters_own_where_it_is_at_hand(workspace: Workspace, tmp_path: Path) -> None:
    ink = find(workspace, INK)
    silent, builtin, far = (replace(ink, source=source) for source in ("", "builtin", "someone/base"))
    here = replace(ink, source=str(tmp_path))
    assert blending.base_of([far, silent, builtin, here], "") == "builtin"
    assert blending.base_of([here, builtin], "") == str(tmp_path)
    assert blending.base_of([builtin], " other/base ") == "other/base"
    for adapters, said in (([silent], "do not say"), ([far], "someone/base, which is not here")):
        with pytest.raises(ConfigError, match=said):
            blending.base_of(adapters, "")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "two adapters"),
        ([ROWS[0]], "two adapters"),
        ([ROWS[0], ROWS[0]], "twice"),
        ([ROWS[0], ("library/../../etc/passwd", 1.0, "")], "no adapter"),
        ([ROWS[0], ("/etc/passwd", 1.0, "")], "no adapter"),
        ([ROWS[0], (WASH, 1.0, "text-encoder")], "PATTERN = NUMBER"),
        ([ROWS[0], (WASH, 1.0, "text-encoder = nan")], "PATTERN = NUMBER"),
        ([ROWS[0], (WASH, 99.0, "")], "strength"),
    ],
)
def test_wrong_choices_are_refused_with_words(workspace: Workspace, rows: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(workspace, rows, "linear", {})


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("ink.safetensors", "ink"),
        ("../../etc/pass wd", "pass wd"),
        ("..\\..\\evil", "evil"),
        (".hidden", "hidden"),
        ("-o", "o"),
        ("a\0b\n<script>", "a-b-script"),
        ("水墨 風", "水墨 風"),
        ("x" * 300, "x" * 50),
    ],
)
def test_names_become_safe(given: str, name: str) -> None:
    assert safe_name(given) == name


@pytest.mark.parametrize("given", ["", "..", "/", "///..", "<>"])
def test_what_is_no_name_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="no name"):
        safe_name(given)


# -- what comes of it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "cut", "jobs_of_preview"),
    [("linear", {}, 1), ("linear", {"rank": 2}, 2), ("ties", {}, 2), ("slerp", {"energy": 0.9}, 2)],
)
def test_the_saved_file_reproduces_the_preview(
    workspace: Workspace, scene: Scene, method: str, cut: dict[str, Any], jobs_of_preview: int
) -> None:
    asked = recipe(workspace, ROWS, method, {}, cut, scene.model)
    shown = blending.preview(workspace, asked, scene)
    assert len(shown) == jobs_of_preview
    saved, alone = blending.save(workspace, asked, scene, "my mix", "kohya", "fp32")
    work(workspace)
    assert made(saved) == workspace.library / "my mix.safetensors"
    assert blending.difference(made(shown[-1]), made(alone)) <= 2
    plain = recipe(workspace, [(INK, 0.1, ""), (WASH, 0.1, "")], "linear", {})
    other = blending.preview(workspace, plain, scene)
    work(workspace)
    assert blending.difference(made(other[-1]), made(alone)) > 2, "the picture shows what was blended"
    context = Context(workspace)
    assert "reproduces the preview" in html.same_html(shown[-1], alone)
    assert "differs" in html.same_html(other[-1], alone)
    told = html.file_html(context, saved)
    assert 'download="my mix.safetensors"' in told and "Energy kept" in told and "Sign conflicts" in told
    blending.add_picture(saved, alone)
    assert blending.difference(workspace.library / "my mix.png", made(alone)) == 0
    with pytest.raises(ConfigError, match="already"):
        free_name(workspace, "my mix")


def test_an_analysis_has_words_a_heat_map_and_strengths(workspace: Workspace) -> None:
    folder = blending.analyze(workspace, recipe(workspace, ROWS, "linear", {}))
    work(workspace)
    told = html.analysis_html(Context(workspace), folder)
    assert "heatmap.png" in told and "<b>ink</b> and <b>wash</b>" in told and "Strengths to try" in told


def test_a_preview_of_other_settings_or_other_files_is_another(workspace: Workspace, scene: Scene) -> None:
    def of(rows: Any = ROWS, method: str = "linear", scene: Scene = scene) -> str:
        return blending.digest(recipe(workspace, rows, method, {}), scene)

    first = of()
    assert first == of()
    others = {of([ROWS[0], (WASH, 0.6, "")]), of(method="ties"), of(scene=Scene(scene.model, "a cat"))}
    write_adapter(read_adapter(workspace.library / "wash.safetensors"), workspace.library / "wash.safetensors")
    assert len({first, of(), *others}) == 5


def test_progress_says_where_a_job_is_and_why_it_failed(workspace: Workspace) -> None:
    (workspace.library / "hurt.safetensors").write_bytes(b"no tensors")
    folder = blending.analyze(
        workspace, recipe(workspace, [ROWS[0], ("library/hurt.safetensors", 1, "")], "linear", {})
    )
    assert "Waiting" in html.progress_html(html.views([folder]))
    (entry,) = queue.waiting(workspace)
    queue.take(workspace, entry)
    with pytest.raises(ConfigError):
        jobs.run_job(folder)
    assert "failed" in html.progress_html(html.views([folder])) and html.ended(look(folder))
    assert html.analysis_html(Context(workspace), folder) == ""


# -- tools -----------------------------------------------------------------------------------


def test_a_command_answers_or_says_why_not(workspace: Workspace) -> None:
    found = checking.answer("check", find(workspace, INK).path, "--base", tiny.folder("sd15"))
    table = checking.check_html(found)
    assert table.count("<tr>") == 1 + len(found["consumers"]) and "✓ loads: diffusers" in table
    with pytest.raises(ConfigError, match="there is no adapter at .*nowhere.safetensors; give"):
        checking.answer("check", "/nowhere.safetensors")


def test_adapters_are_those_of_the_library_and_of_finished_runs(workspace: Workspace) -> None:
    run = workspace.runs / "20260101-120000-fox"
    run.mkdir()
    (run / "status.json").write_text('{"state": "running"}')
    (run / "fox.safetensors").write_bytes((workspace.library / "ink.safetensors").read_bytes())
    jobs.save_result(run, jobs.Result([run / "fox.safetensors"]))
    assert [one.key for one in adapters_of(workspace)] == [INK, WASH]
    (run / "status.json").write_text('{"state": "finished"}')
    ink, _, fox = adapters_of(workspace)
    assert (ink.base, ink.method, ink.rank) == ("SD 1.5", "lora", "2") and ink.in_library
    assert fox.key == "runs/20260101-120000-fox/fox.safetensors" and not fox.in_library
    (workspace.library / "broken.safetensors").write_bytes(b"\xff" * 64)
    assert find(workspace, "library/broken.safetensors").facts == ""
