"""Below the blend: another layout of a file, a smaller one, one out of two checkpoints, and who can load it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from studio import jobs
from studio.errors import ConfigError, StudioError
from studio.jobs.blend import ExtractConfig, ResizeConfig
from studio.ui import api
from studio.ui import blend_html as html
from studio.ui.adapters import adapters_of, choices, find
from studio.ui.blending import checked, free_name
from studio.ui.checking import answer, check_html
from studio.ui.context import PRIVATE, Context

LAYOUTS = ["comfyui", "diffusers", "peft", "kohya", "lycoris", "onetrainer"]
BAKES = [("As it is", ""), ("Plain LoRA", "lora"), ("Full differences", "diff")]
QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}


class Tools:
    """Four small forms over one adapter; the jobs among them go through the queue."""

    def __init__(self, context: Context) -> None:
        self.context = context
        with gr.Accordion("Convert, resize, extract, check", open=False, elem_id="blend-tools"):
            known = choices(adapters_of(context.workspace))
            self.file = gr.Dropdown(
                [("none", ""), *known], value="", label="Adapter", elem_id="tools-file",
                info="The one to convert, resize or check; it stays as it is.",
            )  # fmt: skip
            self.name = gr.Textbox(label="Name of the new file", elem_id="tools-name", placeholder="my adapter small")
            with gr.Tabs(elem_id="tools-tabs"):
                self._convert()
                self._resize()
                self._extract()
                with gr.Tab("Check", elem_id="tools-tab-check"):
                    check = gr.Button("Which tools load it?", elem_id="tools-check")
            self.result = gr.HTML(elem_id="tools-result")
            self.job = gr.State("")
            self.timer = gr.Timer(0.5, active=False)
        shown = [self.result, self.job, self.timer]
        check.click(self.check, self.file, self.result, **PRIVATE)
        self.timer.tick(self.tick, self.job, [self.result, self.timer], **QUIET, concurrency_limit=None)
        self.convert_go.click(
            self.convert,
            [self.file, self.name, self.layout, self.bake, self.bake_rank, self.base],
            self.result,
            **PRIVATE,
        )
        self.resize_go.click(
            self.resize, [self.file, self.name, self.by, self.rank, self.energy, self.base], shown, **QUIET
        )
        self.extract_go.click(self.extract, [self.name, self.untuned, self.tuned, self.extract_rank], shown, **QUIET)
        gr.on([context.page.load, context.tabs.change], self.lists, None, self.file, **QUIET)

    def _convert(self) -> None:
        with gr.Tab("Convert", elem_id="tools-tab-convert"):
            self.layout = gr.Dropdown(LAYOUTS, value="comfyui", label="Layout", elem_id="tools-layout")
            self.bake = gr.Radio(
                BAKES, value="", label="Method", elem_id="tools-bake",
                info="A plain LoRA loads in tools that do not know the adapter's own method.",
            )  # fmt: skip
            self.bake_rank = gr.Slider(1, 128, 32, step=1, label="Rank of the plain LoRA", elem_id="tools-bake-rank")
            self.base = gr.Textbox(
                label="Base", value="", elem_id="tools-base", placeholder="builtin",
                info="Only for methods whose file does not tell what it changes (LoKr, DoRA, OFT, ...).",
            )  # fmt: skip
            self.convert_go = gr.Button("Convert into the library", elem_id="tools-convert")

    def _resize(self) -> None:
        with gr.Tab("Resize", elem_id="tools-tab-resize"):
            by = [("To a rank", "rank"), ("Keep a share of the change", "energy")]
            self.by = gr.Radio(by, value="rank", label="How", elem_id="tools-by")
            self.rank = gr.Slider(1, 128, 8, step=1, label="Rank at most", elem_id="tools-rank")
            self.energy = gr.Slider(0.5, 1, 0.95, step=0.01, label="Share kept (energy)", elem_id="tools-energy")
            self.resize_go = gr.Button("Resize into the library", elem_id="tools-resize")

    def _extract(self) -> None:
        with gr.Tab("Extract", elem_id="tools-tab-extract"):
            gr.Markdown("An adapter out of two checkpoints: what the tuned one has and the other has not.")
            self.untuned = gr.Textbox(
                label="Trained from", elem_id="tools-untuned", placeholder="/models/base.safetensors"
            )
            self.tuned = gr.Textbox(label="Tuned", elem_id="tools-tuned", placeholder="/models/tuned.safetensors")
            self.extract_rank = gr.Slider(1, 128, 32, step=1, label="Rank", elem_id="tools-extract-rank")
            self.extract_go = gr.Button("Extract into the library", elem_id="tools-extract")

    def lists(self) -> Any:
        return gr.update(choices=[("none", ""), *choices(adapters_of(self.context.workspace))])

    def check(self, key: str) -> str:
        return _told(lambda: check_html(answer("check", find(self.context.workspace, key).path)))

    def convert(self, key: str, name: str, layout: str, bake: str, rank: float, base: str) -> str:
        def do() -> str:
            workspace = self.context.workspace
            one = find(workspace, key)
            target = workspace.library / free_name(workspace, name or f"{_plain(one.path)}-{layout}")
            options = ["--bake", bake] if bake else []
            options += ["--rank", str(int(rank))] if bake == "lora" else []
            options += ["--base", base.strip()] if bake and base.strip() else []
            made = answer("convert", one.path, "--to", layout, "-o", target, *options)
            if not bake:
                exact = "Its numbers are the same."
            elif error := made["largest_error"]:
                exact = f"It is off by {error:.1e} of what a layer changes, at most."
            else:
                exact = "It is exact."
            file = Path(made["file"])
            return html.good_html(f"{file.name} is in the library. {exact}") + html.download_html(self.context, file)

        return _told(do)

    def resize(self, key: str, name: str, by: str, rank: float, energy: float, base: str) -> list[Any]:
        def do() -> Path:
            one = find(self.context.workspace, key)
            amount = {"rank": int(rank)} if by == "rank" else {"energy": energy}
            given = base.strip() or ("builtin" if one.method != "lora" and one.source == "builtin" else "")
            suffix = f"rank{int(rank)}" if by == "rank" else f"energy{energy:g}"
            file = {"name": free_name(self.context.workspace, name or f"{_plain(one.path)}-{suffix}")}
            config = {"source": str(one.path), "file": file, "base": given, **amount}
            return jobs.submit(self.context.workspace, "resize", checked(ResizeConfig, config), file["name"])

        return self._start(do)

    def extract(self, name: str, untuned: str, tuned: str, rank: float) -> list[Any]:
        def do() -> Path:
            if not untuned.strip() or not tuned.strip():
                raise ConfigError("name two checkpoints: the one trained from, and the tuned one")
            file = {"name": free_name(self.context.workspace, name or f"{_plain(Path(tuned))}-extracted")}
            config = {"base": untuned.strip(), "tuned": tuned.strip(), "rank": int(rank), "file": file}
            return jobs.submit(self.context.workspace, "extract", checked(ExtractConfig, config), file["name"])

        return self._start(do)

    def tick(self, job: str) -> list[Any]:
        """How far the job is, and then the file with its report."""
        if not job:
            return ["", gr.Timer(active=False)]
        views = html.views([api.find(self.context.workspace, job)])
        text = html.progress_html(views) or html.file_html(self.context, views[0].folder)
        return [text, gr.Timer(active=not html.ended(views[0]))]

    def _start(self, do: Callable[[], Path]) -> list[Any]:
        try:
            job = do().name
        except StudioError as problem:
            return [html.problem_html(problem), gr.skip(), gr.skip()]
        text, timer = self.tick(job)
        return [text, job, timer]


def _plain(path: Path) -> str:
    return path.name.removesuffix(".safetensors")


def _told(do: Callable[[], str]) -> str:
    """What it says, or why it could not be done."""
    try:
        return do()
    except StudioError as problem:
        return html.problem_html(problem)
