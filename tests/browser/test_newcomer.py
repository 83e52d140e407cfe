"""A newcomer's path: from an empty app to a blend of two adapters that other tools load, on the real thing."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from app_server import ENVIRONMENT, AppServer, draw_pictures, studio
from looks import faults, shoot

from studio.ui import TABS

EMPTY = {"train": "#train-captions", "runs": "#runs-table", "generate": "#generate-result", "library": "#library-tiles"}
SHORT = {
    "train-steps": "4",
    "train-batch_size": "2",
    "train-sample_every": "2",
    "train-checkpoint_every": "4",
    "samples-steps": "2",
}
JOB_MS = 90_000


def open_tab(page: Any, name: str) -> None:
    button = page.locator(f"#tab-{name}-button:visible")
    page.locator("#tab-train-button").wait_for()
    if not button.count():  # on a phone the last ones are in a menu
        page.locator("#tabs .overflow-menu > button").first.click()
        button = page.locator("#tabs .overflow-dropdown button", has_text=name.capitalize())
    button.first.click()
    page.locator(f"#tab-{name}").wait_for()


def fill(page: Any, id: str, value: str) -> None:
    """Writes into a field as somebody does, and leaves it."""
    field = page.locator(f"#{id}").locator("input[type=number], input[type=text], input:not([type]), textarea").first
    field.fill(value)
    field.blur()


def every_screen(page: Any, url: str, theme: str, width: int, name: str) -> list[str]:
    """The faults of all screens in a theme, at a width."""
    page.set_viewport_size({"width": width, "height": 844})
    page.goto(f"{url}?__theme={theme}")
    found = []
    for tab in TABS:
        open_tab(page, tab)
        page.wait_for_timeout(2000)  # what a tab asks for when it is opened comes in
        found += faults(page, f"{name}-{tab}")
    return found


@pytest.mark.parametrize(("theme", "width"), [("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)])
def test_an_empty_app_can_be_read_and_says_what_to_do(
    serve: Callable[..., AppServer], page: Any, theme: str, width: int
) -> None:
    server = serve()
    found = every_screen(page, server.url, theme, width, f"empty-{theme}-{width}")
    assert not found, "\n".join(found)
    for tab, place in EMPTY.items():
        open_tab(page, tab)
        assert page.locator(f"{place} .empty p").is_visible(), tab


def test_from_an_empty_app_to_a_file_that_other_tools_load(
    serve: Callable[..., AppServer], page: Any, tmp_path: Path
) -> None:
    server, broken = serve(), []
    page.on("pageerror", lambda problem: broken.append(str(problem)))
    page.goto(server.url)
    bring_pictures(page, draw_pictures(tmp_path / "mine", 8))
    train(page)
    generate(page, server.workspace)
    file = blend(page, tmp_path)
    done = subprocess.run(studio("check", file), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = []
    for theme, width in (("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)):
        found += every_screen(page, server.url, theme, width, f"full-{theme}-{width}")
    assert not found, "\n".join(found)
    assert not broken


def bring_pictures(page: Any, files: list[Path]) -> None:
    fill(page, "train-name", "shapes")
    page.locator("#train-upload input[type=file]").set_input_files([str(file) for file in files])
    boxes = page.locator("#train-captions article")
    boxes.nth(7).wait_for()
    assert boxes.count() == 8
    for place in range(8):
        boxes.nth(place).locator("textarea").fill(f"a {('round', 'square')[place % 2]} shape, number {place}")
    page.wait_for_function("document.querySelectorAll('#train-captions article.saved').length === 8")
    shoot(page, "path-1-captions")


def train(page: Any) -> None:
    page.locator("#train-settings-view").get_by_text("All settings").click()
    for id, value in SHORT.items():
        fill(page, id, value)
    fill(page, "samples-prompts", "a round shape")
    page.locator("#train-preflight").click()
    page.locator("#train-plan .good").wait_for(timeout=JOB_MS)
    assert "8" in page.locator("#train-plan").inner_text()
    shoot(page, "path-2-preflight")
    page.locator("#train-start").click()
    page.locator("#runs-state[data-state=running]").wait_for(timeout=JOB_MS)
    page.locator("#runs-samples img").first.wait_for(timeout=JOB_MS)
    shoot(page, "path-3-samples-arrive")
    page.locator("#runs-state[data-state=finished]").wait_for(timeout=JOB_MS)
    page.locator("#runs-clone").click()
    page.locator("#runs-table tr[data-state=finished]").nth(1).wait_for(timeout=JOB_MS)
    shoot(page, "path-4-two-runs")


def generate(page: Any, workspace: Path) -> None:
    page.locator("#runs-generate").click()
    page.locator("#generate-strength-0").wait_for()
    for id, value in {"generate-prompt": "a round shape", "generate-steps": "4", "generate-seed": "3"}.items():
        fill(page, id, value)
    page.locator("#generate-grid-box button").first.click()
    assert page.locator("#generate-columns-values textarea").input_value() == "0, 0.5, 1"
    page.locator("button#generate-grid").click()
    page.wait_for_function("document.querySelectorAll('#generate-result td img').length === 3", timeout=JOB_MS)
    page.wait_for_function("[...document.querySelectorAll('#generate-result td img')].every((one) => one.naturalWidth)")
    shoot(page, "path-5-strengths")
    drawn = {file.read_bytes() for file in workspace.glob("pictures/*.png")}
    assert len(drawn) == 3


def blend(page: Any, folder: Path) -> Path:
    open_tab(page, "blend")
    for place in range(2):
        page.locator(f"#blend-adapter-{place} input").click()
        page.locator("[role=option]").nth(place + 1).click()
    page.locator("#blend-scene button").first.click()
    fill(page, "blend-steps", "4")
    fill(page, "blend-name", "both shapes")
    page.locator("#blend-save").click()
    link = page.locator("#blend-saved a.download")
    link.wait_for(timeout=JOB_MS)
    page.locator("#blend-saved .good").wait_for(timeout=JOB_MS)
    shoot(page, "path-6-saved-blend")
    with page.expect_download() as download:
        link.click()
    file = folder / str(download.value.suggested_filename)
    download.value.save_as(file)
    return file
