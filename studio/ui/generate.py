"""The generate screen: a base, adapters, a prompt; pictures appear as they are drawn, and tell how they were made.

What is typed and which job is watched are the browser's own (`gr.BrowserState`). Other screens set these of
`context.shared`: "generate.adapters", a list of `drawing.use(workspace, file)`; "generate.base" and "generate.prompt",
texts.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import gradio as gr

from studio import jobs
from studio.diffusion.samplers import SAMPLERS
from studio.errors import StudioError
from studio.jobs.draw import DrawRequest
from studio.ui import drawing, form, restoring
from studio.ui import generate_html as html
from studio.ui.adapters import adapters_of, choices
from studio.ui.context import PRIVATE, Context
from studio.ui.drawing import AXES, CHECKPOINT, NONE, PROMPT, SEED, STRENGTH
from studio.ui.shelf import take_file
from studio.ui.train_settings import BASES

TITLE = "Generate"
QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}
MAIN = ("steps", "guidance", "seed", "count")
MORE = ("width", "height", "clip_skip")
NUMBERS = (*MAIN, *MORE, "denoising")
LABELS = {"count": "Pictures", "clip_skip": "Clip skip", "denoising": "How much may change"}
PAGE = 24  # pictures of the history
HINTS = {
    NONE: "",
    STRENGTH: "Numbers, as in 0, 0.5, 1: the strength of the first adapter.",
    CHECKPOINT: "They take the place of the first adapter.",
    PROMPT: "One prompt a line.",
    SEED: "Numbers, as in 1, 2, 3 or 1-4.",
}


class Screen:
    """The components of the screen, and what happens between them."""

    def __init__(self, context: Context) -> None:
        self.context, self.workspace = context, context.workspace
        self._prompt()
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                self._settings()
            with gr.Column(scale=6, min_width=320, elem_classes="beside"):
                self._results()
        self._history()
        self.seen = gr.State(None)
        self.ready = gr.State(False)  # fields change while a page opens, before they have what was typed last time
        self.timer = gr.Timer(0.7, active=False)

    # -- layout -----------------------------------------------------------------------------------

    def _prompt(self) -> None:
        self.prompt = gr.Textbox(
            label="Prompt", lines=3, elem_id="generate-prompt", placeholder="a red fox in the snow",
            info="(word:1.2) weighs a word; <lora:name:0.8> names an adapter.",
        )  # fmt: skip
        self.negative = gr.Textbox(label="Negative prompt", elem_id="generate-negative", info="What to keep out.")
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", elem_id="generate-draw")
            self.compare = gr.Button("Compare with the base", elem_id="generate-compare")

    def _settings(self) -> None:
        def names_of_blocks(source: str) -> dict[str, str]:  # a method cannot be called from the page
            try:
                return drawing.blocks(self.workspace, source)
            except StudioError:
                return {}  # drawing with it says what is wrong

        gr.Markdown("### Adapters")
        self.adapters = gr.HTML(
            [], elem_id="generate-adapters", choices=choices(adapters_of(self.workspace)),
            html_template=html.ADAPTERS_TEMPLATE, css_template=html.ADAPTERS_CSS, js_on_load=html.ADAPTERS_JS,
            server_functions=[names_of_blocks],
        )  # fmt: skip
        self.upload = gr.UploadButton(
            "Take a file into the library", file_types=[".safetensors"], size="sm", elem_id="generate-upload"
        )
        self.base = gr.Dropdown(
            self._bases(), value="builtin", label="Base", allow_custom_value=True, elem_id="generate-base",
            info="What the adapters were trained on. A hub id, a folder or a .safetensors file can be typed.",
        )  # fmt: skip
        start = DrawRequest().model_dump()
        with gr.Row(elem_classes="fields"):
            self.sampler = gr.Dropdown(
                list(SAMPLERS), value=start["sampler"], label="Sampler", elem_id="generate-sampler",
                info="How noise becomes a picture.",
            )  # fmt: skip
            self.fields = form.form(DrawRequest, MAIN, start)
        self.random = gr.Button("Another seed", size="sm", elem_id="generate-random")
        with gr.Accordion("Size and more", open=False, elem_id="generate-more"), gr.Row(elem_classes="fields"):
            self.fields |= form.form(DrawRequest, MORE, start)
        with gr.Accordion("Start from a picture", open=False, elem_id="generate-start-box"):
            self.start = gr.Image(label="Picture", type="pil", sources=["upload", "clipboard"], height=220,
                                  elem_id="generate-start")  # fmt: skip
            self.fields |= form.form(DrawRequest, ["denoising"], start)
        for key, field in self.fields.items():
            field.elem_id, field.label = f"generate-{key}", LABELS.get(key, key.capitalize())
        self.fields["width"].placeholder = self.fields["height"].placeholder = "the base's own"
        self._grid()

    def _grid(self) -> None:
        self.axes = []
        with gr.Accordion("Grid", open=False, elem_id="generate-grid-box"):
            gr.Markdown("A picture for each pair of values. Those that are drawn already are not drawn again.")
            for name, kind in (("columns", STRENGTH), ("rows", NONE)):
                with gr.Group():
                    choice = gr.Dropdown(list(AXES), value=kind, label=name.capitalize(), elem_id=f"generate-{name}")
                    text = gr.Textbox(
                        "0, 0.5, 1" if kind == STRENGTH else "", label="Values", info=HINTS[kind] or None, lines=2,
                        visible=kind != NONE, elem_id=f"generate-{name}-values",
                    )  # fmt: skip
                    files = gr.Dropdown(
                        [], value=[], multiselect=True, label="Checkpoints", info=HINTS[CHECKPOINT], visible=False,
                        elem_id=f"generate-{name}-checkpoints",
                    )  # fmt: skip
                choice.change(self._on_axis, choice, [text, files], **QUIET)
                self.axes += [choice, text, files]
            self.grid = gr.Button("Draw the grid", elem_id="generate-grid")

    def _results(self) -> None:
        self.problem = gr.HTML(elem_id="generate-problem")
        self.progress = gr.HTML(elem_id="generate-progress")
        self.stop = gr.Button("Stop", variant="stop", size="sm", visible=False, elem_id="generate-stop")
        self.slider = gr.ImageSlider(
            label="Left: the base. Right: with the adapters.", visible=False, interactive=False, height=420,
            buttons=["fullscreen"], elem_id="generate-slider",
        )  # fmt: skip
        self.result = gr.HTML(html.EMPTY, elem_id="generate-result", css_template=html.GRID_CSS)

    def _history(self) -> None:
        with gr.Accordion("History", open=True, elem_id="generate-history-box"):
            gr.Markdown("Click a picture to have its settings again, or drop any PNG that tells them, A1111's too.")
            self.drop = gr.File(
                label="PNG", file_types=[".png"], height=140, elem_id="generate-drop", file_count="single"
            )
            self.restored = gr.HTML(elem_id="generate-restored")
            self.history = gr.HTML(
                html.NO_HISTORY, elem_id="generate-history", css_template=html.HISTORY_CSS, js_on_load=html.HISTORY_JS
            )
            self.most = gr.State(PAGE)
            self.older = gr.Button("Show more", size="sm", visible=False, elem_id="generate-older")

    def _bases(self) -> list[tuple[str, str]]:
        own = [(f"Merged: {Path(source).stem}", source) for source in drawing.bases(self.workspace)]
        return [*BASES.items(), *own]

    # -- events -----------------------------------------------------------------------------------

    @property
    def scene(self) -> list[Any]:
        """The fields that a picture sets, in the order of `_filled`."""
        numbers = [self.fields[key] for key in NUMBERS]
        return [self.base, self.adapters, self.prompt, self.negative, self.sampler, *numbers]

    def wire(self) -> None:
        """What happens between the components, and what the browser keeps: outside of the tab, which is not there for
        the browser before somebody opens it."""
        browser = {"secret": "adapter-studio"}
        self.draft = gr.BrowserState({}, storage_key="adapter-studio-generate", **browser)
        self.watched = gr.BrowserState({}, storage_key="adapter-studio-generate-job", **browser)
        everything = [*self.scene, self.start]
        shown = [self.problem, self.watched, self.seen, self.timer, self.stop]
        live = [self.progress, self.result, self.slider, self.stop, self.timer, self.seen, self.history, self.older]
        self.draw.click(self._on_draw, everything, shown, **PRIVATE)
        self.prompt.submit(self._on_draw, everything, shown, **PRIVATE)
        self.compare.click(self._on_compare, everything, shown, **PRIVATE)
        self.grid.click(self._on_grid, [*everything, *self.axes], shown, **PRIVATE)
        self.stop.click(self._on_stop, self.watched, self.stop, **QUIET)
        self.timer.tick(self._on_tick, [self.watched, self.seen, self.most], live, **QUIET)
        self.random.click(lambda: secrets.randbelow(1 << 32), None, self.fields["seed"], **QUIET)
        self.upload.upload(self._on_upload, [self.upload, self.adapters], [self.adapters, self.problem], **PRIVATE)
        self.history.restore(self._on_restore, None, [*everything, self.restored], **QUIET)
        self.drop.upload(self._on_dropped, self.drop, [*everything, self.restored, self.drop], **PRIVATE)
        self.older.click(lambda most: most + PAGE, self.most, self.most, **QUIET).then(
            self._pictures, self.most, [self.history, self.older], **QUIET
        )
        edits = [field.change for field in self.scene]
        typed = [self.ready, *self.scene]
        gr.on(edits, self._on_edit, typed, self.draft, **QUIET, trigger_mode="always_last")
        page = self.context.page
        self.context.tabs.change(self._known, None, [self.adapters, self.base], **QUIET)
        page.load(self._on_load, self.draft, typed, **QUIET)
        page.load(self._on_tick, [self.watched, self.seen, self.most], live, **QUIET)
        page.load(self._pictures, self.most, [self.history, self.older], **QUIET)

    def _known(self) -> list[Any]:
        """Other screens may have made adapters and bases since."""
        return [gr.HTML(choices=choices(adapters_of(self.workspace))), gr.Dropdown(choices=self._bases())]

    def _asked(self, given: tuple[Any, ...]) -> tuple[str, DrawRequest]:
        base, uses, prompt, negative, sampler, *rest = given
        *numbers, start = rest
        values = form.read(DrawRequest, dict(zip(NUMBERS, numbers, strict=True)))
        defaults = DrawRequest().model_dump()
        kept = {key: defaults[key] if value is None else value for key, value in values.items()}
        kept |= {"prompt": prompt or "", "negative_prompt": negative or "", "sampler": sampler}
        kept["image"] = drawing.keep_start(self.workspace, start) if start is not None else ""
        return base, drawing.request(self.workspace, uses or [], kept)

    def _submit(self, base: str, requests: list[DrawRequest], title: str, **mode: Any) -> list[Any]:
        folder = jobs.submit(self.workspace, "draw", drawing.config(self.workspace, base, requests), title)
        return ["", {"job": folder.name, **mode}, None, gr.Timer(active=True), gr.Button(visible=True)]

    def _on_draw(self, *given: Any) -> list[Any]:
        return self._shown(self._draw, given)

    def _on_compare(self, *given: Any) -> list[Any]:
        return self._shown(self._compare, given)

    def _on_grid(self, *given: Any) -> list[Any]:
        return self._shown(self._draw_grid, given)

    def _shown(self, action: Any, given: tuple[Any, ...]) -> list[Any]:
        try:
            return action(given)
        except StudioError as problem:
            return [html.problem_html(problem), *[gr.skip()] * 4]

    def _draw(self, given: tuple[Any, ...]) -> list[Any]:
        base, asked = self._asked(given)
        return self._submit(base, [asked], asked.prompt, mode="pictures")

    def _compare(self, given: tuple[Any, ...]) -> list[Any]:
        base, asked = self._asked(given)
        return self._submit(base, drawing.compared(asked), f"compare {asked.prompt}", mode="compare")

    def _draw_grid(self, given: tuple[Any, ...]) -> list[Any]:
        axes = [self.axes[place : place + 3] for place in (0, 3)]
        scene, chosen = given[: -len(self.axes)], given[-len(self.axes) :]
        columns, rows = (drawing.axis(self.workspace, *chosen[place : place + 3]) for place in (0, len(axes[0])))
        base, asked = self._asked(scene)
        cells = drawing.grid(self.workspace, asked, rows, columns)
        return self._submit(base, cells, f"grid {asked.prompt}", mode="grid", rows=rows.labels, columns=columns.labels)

    def _on_stop(self, watched: dict[str, Any]) -> Any:
        if drawing.view(self.workspace, watched.get("job", "")):
            jobs.stop(self.workspace.jobs / watched["job"])
        return gr.Button(interactive=False)

    def _on_tick(self, watched: dict[str, Any] | None, seen: Any, most: int) -> list[Any]:
        """What is new of the watched job: nothing where nothing is."""
        watched = watched or {}
        view = drawing.view(self.workspace, watched.get("job", ""))
        if view is None:
            return [gr.skip()] * 4 + [gr.Timer(active=False)] + [gr.skip()] * 3
        now = [watched["job"], view.state, view.done, view.before, round(view.share, 2), view.message]
        if now == seen:
            return [gr.skip()] * 8
        compared = watched.get("mode") == "compare" and view.done == 2
        slider = gr.ImageSlider(self._pair(view), visible=True) if compared else gr.ImageSlider(visible=False)
        new = seen is None or seen[:3] != now[:3]
        return [
            html.progress_html(view),
            self._result(view, watched) if new else gr.skip(),
            slider if new else gr.skip(),
            gr.Button(visible=not view.over, interactive=view.state != "stopping"),
            gr.Timer(active=not view.over),
            now,
            *(self._pictures(most) if new and view.done else [gr.skip()] * 2),
        ]

    def _result(self, view: drawing.View, watched: dict[str, Any]) -> str:
        if watched.get("mode") == "grid":
            return html.grid_html(self.context, view, watched["rows"], watched["columns"])
        return html.pictures_html(self.context, view) or ("" if not view.over else html.EMPTY)

    def _pair(self, view: drawing.View) -> tuple[Any, Any]:
        from PIL import Image

        before, after = (Image.open(file).convert("RGB") for file in view.pictures if file)
        return before, after

    def _pictures(self, most: int) -> list[Any]:
        pictures = restoring.history(self.workspace, most + 1)
        return [html.history_html(self.context, pictures[:most]), gr.Button(visible=len(pictures) > most)]

    def _on_axis(self, kind: str) -> list[Any]:
        known = [(label, source) for source, label in drawing.checkpoints(self.workspace).items()]
        return [
            gr.Textbox(visible=kind not in (NONE, CHECKPOINT), info=HINTS[kind]),
            gr.Dropdown(choices=known, visible=kind == CHECKPOINT),
        ]

    def _on_upload(self, file: str, uses: list[drawing.Use]) -> list[Any]:
        try:
            source = take_file(self.workspace, Path(file)).key
        except StudioError as problem:
            return [gr.skip(), html.problem_html(problem)]
        others = [one for one in uses or [] if one["source"] not in ("", source)]
        value = [*others, drawing.use(self.workspace, source)]
        return [gr.HTML(value=value, choices=choices(adapters_of(self.workspace))), ""]

    def _on_restore(self, event: gr.EventData) -> list[Any]:
        return self._restore(self.workspace.pictures / Path(event.name).name)

    def _on_dropped(self, file: str) -> list[Any]:
        return [*self._restore(Path(file)), None]

    def _restore(self, file: Path) -> list[Any]:
        try:
            told = restoring.restore(self.workspace, file)
        except StudioError as problem:
            return [gr.skip()] * (len(self.scene) + 1) + [html.problem_html(problem)]
        return [*self._filled(told), html.notes_html(told.notes)]

    def _filled(self, told: restoring.Restored) -> list[Any]:
        from PIL import Image

        values = {"negative_prompt": "", **told.values}
        numbers = [values.get(key, gr.skip()) for key in NUMBERS]
        start = Image.open(self.workspace.inside(values["image"])) if values.get("image") else None
        first = [told.base or gr.skip(), told.uses, values["prompt"], values["negative_prompt"]]
        return [*first, values.get("sampler", gr.skip()), *numbers, start]

    def _on_edit(self, ready: bool, *scene: Any) -> Any:
        return {"scene": list(scene)} if ready else gr.skip()

    def _on_load(self, draft: dict[str, Any] | None) -> list[Any]:
        scene = (draft or {}).get("scene") or []
        known = choices(adapters_of(self.workspace))
        if len(scene) != len(self.scene):
            return [True, *(gr.HTML(choices=known) if one is self.adapters else gr.skip() for one in self.scene)]
        pairs = zip(self.scene, scene, strict=True)
        return [True, *(gr.HTML(value=value, choices=known) if one is self.adapters else value for one, value in pairs)]


def build(context: Context) -> None:
    """The screen, inside its tab."""
    screen = Screen(context)
    context.shared["generate.screen"] = screen
    context.shared["generate.adapters"] = screen.adapters
    context.shared["generate.base"] = screen.base
    context.shared["generate.prompt"] = screen.prompt


def wire(context: Context) -> None:
    """Events, when all tabs are built."""
    context.shared["generate.screen"].wire()
