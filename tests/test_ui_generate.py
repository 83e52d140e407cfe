"""The generate screen without a browser: what its fields ask for, grids, and pictures that give their settings back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image, PngImagePlugin

from studio import jobs
from studio.adapters import AdapterConfig, AdapterPlan
from studio.adapters.targets import select
from studio.errors import ConfigError
from studio.formats import read_adapter, write_adapter
from studio.jobs import queue
from studio.jobs.draw import DrawRequest
from studio.ui import drawing, restoring
from studio.ui.drawing import CHECKPOINT, NONE, PROMPT, SEED, STRENGTH, Axis
from studio.workspace import Workspace

FOX = {**DrawRequest().model_dump(exclude={"adapters"}), "prompt": "a red fox", "steps": 2, "seed": 5}
A1111 = """a castle, (fog:1.2) <lora:ink:0.7> <lora:gone:1>
Negative prompt: blurry
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 77, Size: 512x768, Clip skip: 2"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """With the adapters "ink" in its library, and "wash" made by a run that saved two checkpoints on its way."""
    workspace = Workspace(tmp_path / "home").create()
    run = workspace.runs / "20260101-120000-wash"
    places = [
        workspace.library / "ink.safetensors",
        *(run / "checkpoints" / f"step-{step:06}" / "wash.safetensors" for step in (10, 20)),
        run / "wash.safetensors",
    ]
    family, _, adapters = tiny.random_adapter(
        "sd15", AdapterPlan(("attention", "text-encoder"), config=AdapterConfig(rank=1))
    )
    state = tiny.state_of(family, adapters)
    adapters.detach()
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_adapter(state, place)
    return workspace


def ask(workspace: Workspace, *uses: drawing.Use, **changes: Any) -> DrawRequest:
    return drawing.request(workspace, list(uses), FOX | changes)


def ink(workspace: Workspace, **changes: Any) -> drawing.Use:
    return drawing.use(workspace, workspace.library / "ink.safetensors") | changes


def test_fields_become_a_request(workspace: Workspace) -> None:
    chosen = ink(workspace, strength=0.5, blocks={"unet.mid_block.*": 1, "text_encoder.*": 0}, names={"shown": "only"})
    (one,) = ask(workspace, chosen, drawing.use(workspace, "")).adapters
    assert (one.source, one.strength) == (str(workspace.library / "ink.safetensors"), 0.5)
    assert one.blocks == {"text_encoder.*": 0}, "a factor of 1 says nothing"
    with pytest.raises(ConfigError, match="steps is 0"):
        ask(workspace, steps=0)


def test_a_tag_in_the_prompt_is_an_adapter(workspace: Workspace) -> None:
    asked = ask(workspace, ink(workspace), prompt="a fox <lora:ink:0.3>")
    assert asked.prompt == "a fox" and [one.strength for one in asked.adapters] == [0.3], "the tag's strength counts"
    with pytest.raises(ConfigError, match="'inc'"):
        ask(workspace, prompt="a fox <lora:inc:0.3>")


def test_blocks_have_every_layer_once(workspace: Workspace) -> None:
    patterns = drawing.blocks(workspace, "library/ink.safetensors")
    layers = read_adapter(workspace.library / "ink.safetensors").tensors
    found = [select(pattern, layers, {}) for pattern in patterns]
    assert sum(map(len, found)) == len(set().union(*found)) == len(layers)
    assert next(iter(patterns)) == "text_encoder.*" and "middle" in patterns.values()
    for source in drawing.checkpoints(workspace):
        assert drawing.blocks(workspace, source) == patterns
    for source in (
        "",
        "some/repository",
        str(workspace.library / "ink.safetensors"),
        "library/../library/ink.safetensors",
    ):
        with pytest.raises(ConfigError):
            drawing.blocks(workspace, source)


def test_the_base_is_drawn_once_for_all_adapters(workspace: Workspace) -> None:
    asked = ask(workspace, ink(workspace), count=3)
    before, after = drawing.config(workspace, "builtin", drawing.compared(asked)).pictures()
    assert (before.adapters, before.seed) == ([], after.seed) and after.adapters == asked.adapters
    cells = drawing.grid(workspace, asked, Axis(NONE, [""], [""]), drawing.axis(workspace, STRENGTH, "0, 0.5", []))
    base, half = drawing.config(workspace, "builtin", cells).pictures()
    assert base == before and half.adapters[0].strength == 0.5
    with pytest.raises(ConfigError, match="nothing to compare"):
        drawing.compared(ask(workspace, ink(workspace, strength=0)))


def test_a_grid_changes_what_its_axes_say(workspace: Workspace) -> None:
    files = list(drawing.checkpoints(workspace))
    assert [Path(file).parent.name for file in files] == ["step-000010", "step-000020", "20260101-120000-wash"]
    rows = drawing.axis(workspace, CHECKPOINT, "", files[:2])
    columns = drawing.axis(workspace, STRENGTH, "-0.5 1\n1.5", [])
    assert rows.labels == ["wash 10", "wash 20"] and columns.labels == ["-0.5", "1", "1.5"]
    cells = drawing.grid(workspace, ask(workspace, count=4), rows, columns)
    assert [(Path(cell.adapters[0].source).parent.name[-2:], cell.adapters[0].strength) for cell in cells] == [
        (step, strength) for step in ("10", "20") for strength in (-0.5, 1, 1.5)
    ]
    seeds, prompts = drawing.axis(workspace, SEED, "3-5, 9", []), drawing.axis(workspace, PROMPT, "fox\n\n owl ", [])
    cells = drawing.grid(workspace, ask(workspace), seeds, prompts)
    assert [(cell.seed, cell.prompt) for cell in cells] == [
        (seed, name) for seed in (3, 4, 5, 9) for name in ("fox", "owl")
    ]
    assert {cell.count for cell in cells} == {1}


def test_a_grid_that_cannot_be_says_why(workspace: Workspace) -> None:
    none, strengths = Axis(NONE, [""], [""]), drawing.axis(workspace, STRENGTH, "0,1", [])
    for rows, columns, message in (
        (none, none, "choose two different"),
        (strengths, strengths, "both axes are Strength"),
        (none, strengths, "add the adapter"),
        (none, drawing.axis(workspace, SEED, "0-999999", []), "400 are the most"),
    ):
        with pytest.raises(ConfigError, match=message):
            drawing.grid(workspace, ask(workspace), rows, columns)
    for kind, text in ((STRENGTH, "a lot"), (SEED, "-1"), (PROMPT, "\n"), (CHECKPOINT, "")):
        with pytest.raises(ConfigError):
            drawing.axis(workspace, kind, text, [])


def test_a_job_is_seen_and_its_picture_restores_it(workspace: Workspace) -> None:
    start = drawing.keep_start(workspace, Image.new("RGB", (64, 64), "red"))
    asked = ask(workspace, ink(workspace, strength=0.5, blocks={"text_encoder.*": 0.0}), image=start, denoising=0.9)
    folder = queue.add(workspace, "draw", drawing.config(workspace, str(tiny.folder("sd15")), [asked]))
    view = drawing.view(workspace, folder.name)
    assert view is not None and not view.over and view.pictures == [None] and view.before == 0
    jobs.run_job(folder)
    view = drawing.view(workspace, folder.name)
    assert view is not None and view.over and view.done == 1 and view.share == 1
    ((file, told),) = restoring.history(workspace, 9)
    assert [file] == view.pictures and told.startswith("a red fox <lora:ink:0.5>, seed 5, steps 2")
    restored = restoring.restore(workspace, file)
    assert drawing.request(workspace, restored.uses, restored.values) == asked and not restored.notes
    (workspace.library / "ink.safetensors").rename(workspace.library / "other.safetensors")
    assert "ink.safetensors is not in this workspace" in restoring.restore(workspace, file).notes[0]
    for id in ("", "../jobs", "none", f"../jobs/{folder.name}"):
        assert drawing.view(workspace, id) is None


def png(file: Path, text: str = "") -> Path:
    info = PngImagePlugin.PngInfo()
    if text:
        info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)
    return file


def test_a_picture_of_another_tool_restores_what_it_tells(workspace: Workspace, tmp_path: Path) -> None:
    told = restoring.restore(workspace, png(tmp_path / "other.png", A1111))
    assert told.uses == [ink(workspace, strength=0.7)] and told.base is None
    expected = {"prompt": "a castle, (fog:1.2)", "negative_prompt": "blurry", "steps": 20, "guidance": 6.5, "seed": 77}
    expected |= {"sampler": "DPM++ 2M Karras", "width": 512, "height": 768, "clip_skip": 1}
    assert expected.items() <= told.values.items()
    assert told.notes == ["the adapter gone is not in this workspace"]
    plain = tmp_path / "text.png"
    plain.write_text("no picture")
    for file, message in ((png(tmp_path / "plain.png"), "does not say how"), (plain, "is no picture")):
        with pytest.raises(ConfigError, match=message):
            restoring.restore(workspace, file)
