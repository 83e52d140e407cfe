"""Drawing and the algebra as jobs: pictures that tell how they were made, and files that do what their preview did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from studio import jobs
from studio.diffusion.generate import GenerateRequest, generate
from studio.diffusion.metadata import read_parameters
from studio.errors import ConfigError
from studio.families.loading import load_base
from studio.jobs import queue
from studio.jobs.draw import DrawConfig, draw, read_picture
from studio.jobs.result import Result
from studio.runs import Run, look
from studio.workspace import Workspace

FOX = {"prompt": "a red fox", "steps": 3, "seed": 5}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """With two adapters in its library, "ink" and "wash"."""
    workspace = Workspace(tmp_path / "home").create()
    tiny.write_two(workspace.library)
    return workspace


def uses(workspace: Workspace, **strengths: Any) -> list[dict[str, Any]]:
    return [{"source": str(workspace.library / f"{name}.safetensors"), **use} for name, use in strengths.items()]


def settings(*requests: Mapping[str, Any]) -> DrawConfig:
    return DrawConfig.model_validate({"model": {"source": str(tiny.folder("sd15"))}, "requests": list(requests)})


def done(workspace: Workspace, kind: str, config: Any) -> Result:
    folder = queue.add(workspace, kind, config)
    made = jobs.run_job(folder)
    assert jobs.result(folder) is not None and look(folder).status.state == "finished"
    return made


def drawn(workspace: Workspace, **changes: Any) -> np.ndarray:
    (file,) = done(workspace, "draw", settings(FOX | changes)).files
    return np.asarray(Image.open(file)).astype(int)


def test_pictures_are_those_of_generate_and_one_is_drawn_once(workspace: Workspace) -> None:
    config = settings(FOX | {"count": 2})
    folder = queue.add(workspace, "draw", config)
    made = jobs.run_job(folder)
    assert made.files == config.files(workspace) and len({*made.files}) == 2
    assert (look(folder).status.step, look(folder).status.total) == (6, 6)
    expected = generate(*load_base(str(tiny.folder("sd15"))), GenerateRequest("a red fox", seed=5, steps=3, batch=2))
    for file, image in zip(made.files, expected, strict=True):
        assert np.abs(np.asarray(Image.open(file)).astype(int) - np.asarray(image)).max() <= 1
    assert read_parameters(made.files[1])["Seed"] == "6"
    written = made.files[0].stat().st_mtime_ns
    more = done(workspace, "draw", settings(FOX | {"count": 3}))
    assert more.files[:2] == made.files and made.files[0].stat().st_mtime_ns == written
    assert not [file for file in workspace.pictures.iterdir() if file not in more.files]


def test_strengths_act_by_block_and_leave_nothing_behind(workspace: Workspace) -> None:
    plain = drawn(workspace)
    full = drawn(workspace, adapters=uses(workspace, ink={}))
    assert np.abs(full - plain).max() > 5
    assert np.array_equal(drawn(workspace, adapters=uses(workspace, ink={"strength": 0})), plain)
    assert np.array_equal(drawn(workspace, adapters=uses(workspace, ink={"blocks": {"*": 0}})), plain)
    doubled = uses(workspace, ink={"strength": 2, "blocks": {"attention": 0.5, "text-encoder": 0.5}})
    assert np.abs(drawn(workspace, adapters=doubled) - full).max() <= 1
    some = drawn(workspace, adapters=uses(workspace, ink={"blocks": {"text-encoder": 0}}))
    assert np.abs(some - plain).max() > 5 and np.abs(some - full).max() > 5
    with pytest.raises(ConfigError, match="attnetion"):
        drawn(workspace, adapters=uses(workspace, ink={"blocks": {"attnetion": 0}}))
    assert np.array_equal(drawn(workspace, clip_skip=0, negative_prompt=" "), drawn(workspace, negative_prompt="  "))
    for file in workspace.pictures.iterdir():
        file.unlink()
    assert np.array_equal(drawn(workspace), plain), "the base is what it was"


def test_a_stop_keeps_what_is_done_and_the_rest_is_drawn_later(workspace: Workspace) -> None:
    config = settings(FOX | {"count": 3})
    run = Run.open(queue.add(workspace, "draw", config))
    run.on_status.append(lambda status: status.step == 4 and (run.control / "stop").touch())
    with run.session():
        made = draw(config, run)
    assert run.status.state == "stopped" and made.files == config.files(workspace)[:1]
    assert list(workspace.pictures.iterdir()) == made.files, "and nothing half drawn"
    assert jobs.result(run.folder) == made, "each is told as soon as it is there"
    assert jobs.run_job(run.folder).files == config.files(workspace)


def test_a_picture_restores_its_settings_and_names_no_folders(workspace: Workspace, tmp_path: Path) -> None:
    (first,) = done(workspace, "draw", settings(FOX)).files
    request = FOX | {"adapters": uses(workspace, ink={"strength": 0.5, "blocks": {"attention": 0.5}})}
    config = settings(request | {"image": str(first), "denoising": 0.7, "prompt": "ein roter Füchs"})
    (file,) = done(workspace, "draw", config).files
    assert str(tmp_path).encode() not in file.read_bytes()
    assert str(tiny.ROOT.name).encode() not in file.read_bytes()
    told = read_picture(file, workspace)
    assert told is not None and told.requests == config.requests
    assert told.model.source == "sd15", "of a base that is elsewhere, the name"
    assert read_parameters(file)["Prompt"] == "ein roter Füchs <lora:ink:0.5>"
    moved = Workspace(workspace.root.rename(tmp_path / "moved"))
    again = read_picture(moved.pictures / file.name, moved)
    assert again is not None and again.requests[0].adapters[0].source == str(moved.library / "ink.safetensors")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    assert read_picture(tmp_path / "other.png", moved) is None


def test_a_picture_to_start_from_must_be_in_the_workspace(workspace: Workspace, tmp_path: Path) -> None:
    outside, link, text = tmp_path / "secret.png", workspace.datasets / "link.png", workspace.datasets / "text.png"
    Image.new("RGB", (64, 64), "red").save(outside)
    link.symlink_to(outside)
    text.write_text("no picture")
    for place, message in ((outside, "outside the workspace"), (link, "outside the workspace"), (text, "cannot read")):
        with pytest.raises(ConfigError, match=message):
            drawn(workspace, image=str(place))
    inside = workspace.datasets / "red.png"
    outside.rename(inside)
    near, far = (drawn(workspace, image=str(inside), denoising=share) for share in (0.01, 1))
    assert np.abs(near - far).mean() > 1
    assert np.abs(near - drawn(workspace)).mean() > 1


def test_a_blend_does_what_its_parts_do_together(workspace: Workspace) -> None:
    parts = uses(workspace, ink={"strength": 0.8, "blocks": {"text-encoder": 0.5}}, wash={"strength": -0.4})
    together = drawn(workspace, adapters=parts)
    preview = done(workspace, "blend", {"adapters": parts, "file": {"name": "mix", "place": "job"}})
    assert preview.files[0].parent.parent == workspace.jobs and not (workspace.library / "mix.safetensors").exists()
    alone = drawn(workspace, adapters=[{"source": str(preview.files[0])}])
    assert np.abs(alone - together).max() <= 2
    made = done(workspace, "blend", {"adapters": parts, "method": "ties", "file": {"name": "mix"}, "rank": 4})
    assert made.files == [workspace.library / "mix.safetensors"]
    assert 0 < made.facts["energy_kept"] < 1 and set(made.facts["ranks"].values()) == {4}
    with pytest.raises(ConfigError, match="exists already"):
        done(workspace, "blend", {"adapters": parts, "file": {"name": "mix"}})


def test_analysis_resizing_merging_and_extracting(workspace: Workspace) -> None:
    parts = uses(workspace, ink={}, wash={"strength": 0.5})
    found = done(workspace, "analyze", {"adapters": parts})
    assert Image.open(found.files[0]).width > 100 and found.facts["names"] == ["ink", "wash"]
    small = done(workspace, "resize", {"source": parts[1]["source"], "rank": 1, "file": {"name": "small"}})
    assert small.files == [workspace.library / "small.safetensors"] and small.facts["energy_kept"] < 1
    base = str(tiny.folder("sd15"))
    merged = done(workspace, "merge", {"base": base, "adapters": parts[:1], "name": "inked"})
    assert merged.files == [workspace.library / "bases" / "inked"]
    file = {"name": "back", "format": "diffusers"}
    back = done(workspace, "extract", {"base": base, "tuned": str(merged.files[0]), "rank": 2, "file": file})
    with_ink = drawn(workspace, adapters=parts[:1])
    assert np.abs(drawn(workspace, adapters=[{"source": str(back.files[0])}]) - with_ink).max() <= 3
