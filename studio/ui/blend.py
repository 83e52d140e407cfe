"""The blend screen: adapters and a way to blend them, a preview that follows, and the file that does the same.

What is chosen, and the ids of the jobs under way, are a draft that the browser keeps: a reload shows the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import gradio as gr

from studio import jobs
from studio.config import Layout
from studio.errors import StudioError
from studio.jobs.blend import BlendConfig
from studio.ui import api
from studio.ui import blend_html as html
from studio.ui.adapters import adapters_of, choices, find
from studio.ui.blend_tools import Tools
from studio.ui.blending import METHODS, SETTINGS, Scene, add_picture, analyze, base_of, digest, preview, recipe, save
from studio.ui.context import PRIVATE, Context, empty

TITLE = "Blend"
ROWS, SHOWN = 6, 2
QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}
EMPTY = empty(
    "Two adapters are needed",
    "Blending makes one adapter out of several. Train a second one in Train, or drop .safetensors files in Library.",
)
CUTS = [("Exact: nothing is cut", "exact"), ("At most this rank", "rank"), ("Keep this share (energy)", "energy")]
FORMATS = list(get_args(Layout))


def build(context: Context) -> None:
    """The screen, inside its tab."""
    bench = context.shared["blend.bench"] = Bench(context)
    context.shared["blend.adapters"] = bench.adapters
    Tools(context)


def wire(context: Context) -> None:
    """What needs to be outside of the tab: the draft, which a browser reads only where it is on the page."""
    bench = context.shared["blend.bench"]
    bench.draft.render()
    bench.listen()


class Bench:
    """The components of the screen, and what they do."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.empty = gr.HTML(EMPTY, elem_id="blend-empty")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                self._adapters()
                self._method()
            with gr.Column(scale=6, min_width=320):
                self._preview()
                self._save()
        with gr.Accordion("Will they fight?", open=True, elem_id="blend-analysis-box"):
            self.analysis = gr.HTML(html.EMPTY_ANALYSIS, css_template=html.CSS, elem_id="blend-analysis")
            with gr.Row():
                self.compare = gr.Button("Compare the adapters", elem_id="blend-analyze")
                self.use = gr.Button("Use these strengths", visible=False, elem_id="blend-use-suggested")
        self.draft = gr.BrowserState({}, storage_key="adapter-studio-blend", secret="adapter-studio", render=False)
        self._previews: dict[str, list[str]] = {}  # digest -> jobs, of whoever asked
        self.seen = gr.State("")
        self.timer = gr.Timer(0.7)

    def _adapters(self) -> None:
        known = choices(adapters_of(self.context.workspace))
        self.adapters, self.strengths, self.blocks, self.boxes = [], [], [], []
        for place in range(ROWS):
            with gr.Group(visible=place < SHOWN) as box:
                label = f"Adapter {place + 1}"
                one = gr.Dropdown([("none", ""), *known], value="", label=label, elem_id=f"blend-adapter-{place}")
                strength = gr.Slider(
                    -2, 2, 1.0, step=0.05, label="Strength", elem_id=f"blend-strength-{place}",
                    info="1 as trained, 0 off, below 0 takes its effect away.",
                )  # fmt: skip
                with gr.Accordion("Parts of the model", open=False, elem_id=f"blend-parts-{place}"):
                    blocks = gr.Textbox(
                        label="Strength of parts", lines=2, placeholder="text-encoder = 0.5\n*up_blocks.1* = 0",
                        info="PATTERN = FACTOR, one a line: a role, a block or a layer, times the strength above.",
                        elem_id=f"blend-blocks-{place}",
                    )  # fmt: skip
            self.boxes.append(box)
            self.adapters.append(one)
            self.strengths.append(strength)
            self.blocks.append(blocks)
        self.more = gr.Button("Add another adapter", size="sm", elem_id="blend-more")

    def _method(self) -> None:
        labels = [(one.label, name) for name, one in METHODS.items()]
        first = METHODS["linear"]
        self.method = gr.Dropdown(
            labels, value="linear", label="How to blend", info=first.effect, elem_id="blend-method"
        )
        self.settings = {}
        for name, one in SETTINGS.items():
            common: dict[str, Any] = {
                "label": one.label, "info": one.info, "visible": name in first.settings, "elem_id": f"blend-{name}",
            }  # fmt: skip
            value = next(method.settings[name] for method in METHODS.values() if name in method.settings)
            if one.maximum:
                self.settings[name] = gr.Slider(one.minimum, one.maximum, value, step=0.01, **common)
            else:
                self.settings[name] = gr.Checkbox(value, **common)
        self.cut = gr.Radio(CUTS, value="exact", label="Size", elem_id="blend-cut")
        self.rank = gr.Slider(1, 128, 16, step=1, label="Rank at most", visible=False, elem_id="blend-rank")
        self.energy = gr.Slider(
            0.5, 1, 0.95, step=0.01, label="Share of each layer's change", visible=False, elem_id="blend-energy"
        )

    def _preview(self) -> None:
        self.picture = gr.HTML(html.EMPTY_PREVIEW, css_template=html.CSS, elem_id="blend-preview")
        self.status = gr.HTML(elem_id="blend-status")
        self.problem = gr.HTML(elem_id="blend-problem")
        self.prompt = gr.Textbox(label="Prompt", value="a red fox in the snow", elem_id="blend-prompt")
        with gr.Row():
            self.go = gr.Button("Preview", variant="primary", elem_id="blend-preview-go")
            self.live = gr.Checkbox(True, label="Follow every change", elem_id="blend-live")
        with gr.Accordion("How the preview is drawn", open=False, elem_id="blend-scene"):
            self.model = gr.Textbox(
                label="Base", placeholder="the one that the adapters were trained on", elem_id="blend-model",
                info="builtin, a diffusers folder, a .safetensors checkpoint or a hub id; empty: the adapters' own.",
            )  # fmt: skip
            self.seed = gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="blend-seed")
            self.steps = gr.Slider(1, 100, 20, step=1, label="Steps", elem_id="blend-steps")
            self.guidance = gr.Slider(1, 20, 7, step=0.5, label="Guidance", elem_id="blend-guidance")

    def _save(self) -> None:
        with gr.Group():
            self.name = gr.Textbox(label="Name of the new adapter", placeholder="my blend", elem_id="blend-name")
            with gr.Accordion("Kind of file", open=False, elem_id="blend-kind"):
                self.format = gr.Dropdown(
                    FORMATS, value="kohya", label="Format", info="kohya loads in most tools.", elem_id="blend-format"
                )
                self.precision = gr.Dropdown(
                    ["fp32", "fp16", "bf16"], value="fp32", label="Numbers", elem_id="blend-precision",
                    info="fp32 rounds nothing; fp16 is half the size.",
                )  # fmt: skip
        self.save = gr.Button("Save exactly this", variant="primary", elem_id="blend-save")
        self.saved = gr.HTML(elem_id="blend-saved")

    # -- what happens ------------------------------------------------------------------------

    @property
    def recipe(self) -> list[Any]:
        """The components that say what to blend."""
        rows = [*self.adapters, *self.strengths, *self.blocks]
        return [*rows, self.method, *self.settings.values(), self.cut, self.rank, self.energy, *self.scene]

    @property
    def scene(self) -> list[Any]:
        return [self.model, self.prompt, self.seed, self.steps, self.guidance]

    @property
    def screen(self) -> list[Any]:
        """What the jobs change."""
        return [self.seen, self.picture, self.status, self.analysis, self.use, self.saved]

    def listen(self) -> None:
        """Connects the components."""
        load, choose = self.context.page.load, self.context.tabs.change
        gr.on([load, choose], self.lists, None, [self.empty, *self.adapters], **QUIET)
        restored = load(self.restore, self.draft, [*self.recipe, *self.boxes], **QUIET)
        restored.then(self.tick, [self.draft, self.seen], self.screen, **QUIET)
        self.more.click(self.add_row, self.adapters, self.boxes, **QUIET)
        self.method.change(self.show_settings, self.method, [self.method, *self.settings.values()], **QUIET)
        self.cut.change(
            lambda cut: [gr.update(visible=cut == "rank"), gr.update(visible=cut == "energy")],
            self.cut, [self.rank, self.energy], **QUIET,
        )  # fmt: skip
        jobs_of = [self.draft, self.problem, *self.screen]
        self.go.click(self.on_preview, [self.draft, *self.recipe], jobs_of, **QUIET)
        self.compare.click(self.on_compare, [self.draft, *self.recipe], jobs_of, **QUIET)
        self.save.click(
            self.on_save, [self.draft, self.name, self.format, self.precision, *self.recipe], jobs_of, **QUIET
        )
        self.use.click(self.on_use, [self.draft, *self.adapters], self.strengths, **QUIET).then(
            self.follow, [self.draft, self.live, *self.recipe], jobs_of, **QUIET
        )
        sliders = [one for one in self.recipe if isinstance(one, gr.Slider)]
        others = [one for one in self.recipe if not isinstance(one, gr.Slider)]
        typed = [one for one in others if isinstance(one, (gr.Textbox, gr.Number))]
        changes = [one.release for one in sliders] + [one.blur for one in typed]
        changes += [one.input for one in others if one not in typed]
        follow = [self.draft, self.live, *self.recipe]
        gr.on(changes, self.follow, follow, jobs_of, **QUIET, trigger_mode="always_last")
        self.timer.tick(self.tick, [self.draft, self.seen], self.screen, **QUIET, concurrency_limit=None)

    def lists(self) -> list[Any]:
        """The adapters that there are now."""
        found = adapters_of(self.context.workspace)
        known = [("none", ""), *choices(found)]
        return [gr.update(visible=len(found) < 2), *[gr.update(choices=known) for _ in self.adapters]]

    def add_row(self, *chosen: str) -> list[Any]:
        shown = _rows_shown(chosen) + 1
        return [gr.update(visible=place < shown) for place in range(ROWS)]

    def show_settings(self, method: str) -> list[Any]:
        own = METHODS[method].settings
        fields = [gr.update(visible=name in own, **({"value": own[name]} if name in own else {})) for name in SETTINGS]
        return [gr.update(info=METHODS[method].effect), *fields]

    def restore(self, draft: dict[str, Any] | None) -> list[Any]:
        """What the browser kept."""
        values = (draft or {}).get("values")
        if not values or len(values) != len(self.recipe):
            return [gr.skip()] * (len(self.recipe) + ROWS)
        known = {one.key for one in adapters_of(self.context.workspace)}
        values[:ROWS] = [key if key in known else "" for key in values[:ROWS]]
        shown = max(_rows_shown(values[:ROWS]), SHOWN)
        return [*values, *[gr.update(visible=place < shown) for place in range(ROWS)]]

    def read(self, values: tuple[Any, ...]) -> tuple[BlendConfig, Scene]:
        """What the components say. Raises ConfigError."""
        keys, strengths, blocks = values[:ROWS], values[ROWS : 2 * ROWS], values[2 * ROWS : 3 * ROWS]
        method, *rest = values[3 * ROWS :]
        settings = dict(zip(SETTINGS, rest, strict=False))
        cut, rank, energy, model, prompt, seed, steps, guidance = rest[len(SETTINGS) :]
        amount = {"rank": int(rank)} if cut == "rank" else {"energy": energy} if cut == "energy" else {}
        chosen = [find(self.context.workspace, key) for key in keys if key]
        base = base_of(chosen, model or "") if chosen else ""
        scene = Scene(base, prompt or "", int(seed or 0), int(steps), guidance)
        rows = list(zip(keys, strengths, blocks, strict=True))
        return recipe(self.context.workspace, rows, method, settings, amount, scene.model), scene

    def on_preview(self, draft: dict[str, Any], *values: Any) -> list[Any]:
        return self._start(draft, values, self._previewed)

    def follow(self, draft: dict[str, Any], live: bool, *values: Any) -> list[Any]:
        """Previews after a change, where there is something to preview and it is another thing."""
        if not live or len([key for key in values[:ROWS] if key]) < 2:
            return [{**draft, "values": list(values)}, "", *[gr.skip()] * len(self.screen)]
        return self.on_preview(draft, *values)

    def on_compare(self, draft: dict[str, Any], *values: Any) -> list[Any]:
        def compare(draft: dict[str, Any], config: BlendConfig, scene: Scene) -> None:
            self._stop(draft, "analysis")
            draft["analysis"] = [analyze(self.context.workspace, config).name]

        return self._start(draft, values, compare)

    def on_save(self, draft: dict[str, Any], name: str, format: str, precision: str, *values: Any) -> list[Any]:
        def keep(draft: dict[str, Any], config: BlendConfig, scene: Scene) -> None:
            name_or = name.strip() or "+".join(Path(use.source).stem for use in config.adapters)
            self._previewed(draft, config, scene)
            made = save(self.context.workspace, config, scene, name_or, format, precision)
            draft["save"], draft["save_of"] = [folder.name for folder in made], draft["preview"]

        return self._start(draft, values, keep)

    def on_use(self, draft: dict[str, Any], *keys: str) -> list[Any]:
        """The suggested strengths, each at the adapter that it is for."""
        folders = self.folders(draft, "analysis")
        made = jobs.result(folders[0]) if folders else None
        new = dict(zip(made.facts["names"], made.facts["suggested"], strict=True)) if made else {}
        names = [Path(key or "").name.removesuffix(".safetensors") for key in keys]
        return [round(new[name], 2) if name in new else gr.skip() for name in names]

    def tick(self, draft: dict[str, Any] | None, seen: str = "") -> list[Any]:
        """What the jobs have come to; nothing where the screen shows it, as `seen` says.

        The timer goes on for as long as the page does: a tick that was under way when jobs started cannot stop it.
        """
        draft = draft or {}
        shown = {what: html.views(self.folders(draft, what)) for what in ("preview", "analysis", "save")}
        now = repr([(view.id, view.status.state, view.status.step) for views in shown.values() for view in views])
        if now == seen:
            return [gr.skip()] * len(self.screen)
        drawn = [view.folder for view in shown["preview"][-1:] if view.status.state == "finished"]
        picture = html.picture_html(self.context, drawn[0], "Preview of the blend") if drawn else ""
        return [
            now,
            picture or gr.skip(),
            html.progress_html(shown["preview"]),
            *self._analysis(shown["analysis"]),
            self._saved(draft, shown["save"]),
        ]

    # -- behind ------------------------------------------------------------------------------

    def folders(self, draft: dict[str, Any], what: str) -> list[Path]:
        """The jobs that a draft names, as far as they are there."""
        found = []
        for id in draft.get(what, []):
            try:
                found.append(api.find(self.context.workspace, str(id)))
            except StudioError:
                return []
        return found

    def _start(self, draft: dict[str, Any], values: tuple[Any, ...], do: Any) -> list[Any]:
        """Starts jobs and shows them, or says why not."""
        draft = {**draft, "values": list(values)}
        try:
            do(draft, *self.read(values))
        except StudioError as problem:
            return [draft, html.problem_html(problem), *[gr.skip()] * len(self.screen)]
        return [draft, "", *self.tick(draft)]

    def _previewed(self, draft: dict[str, Any], config: BlendConfig, scene: Scene) -> None:
        """Draws a preview, unless one of the same was asked for: a list may say twice that it changed."""
        wanted = digest(config, scene)
        known = self._previews.get(wanted, [])
        states = [view.status.state for view in html.views(self.folders({"preview": known}, "preview"))]
        if draft.get("preview") != known:
            self._stop(draft, "preview")
        if not states or any(state not in ("queued", "running", "finished") for state in states):
            known = [folder.name for folder in preview(self.context.workspace, config, scene)]
            self._previews[wanted] = known
        draft["preview"] = known

    def _stop(self, draft: dict[str, Any], what: str) -> None:
        """Nobody waits for these jobs any more."""
        if draft.get("save_of") == draft.get(what):
            return  # a saved file is compared with it
        for view in html.views(self.folders(draft, what)):
            if not html.ended(view):
                jobs.stop(view.folder)

    def _analysis(self, views: list[Any]) -> list[Any]:
        if not views:
            return [gr.skip(), gr.skip()]
        done = views[0].status.state == "finished"
        text = html.analysis_html(self.context, views[0].folder) if done else html.progress_html(views)
        return [text, gr.update(visible=done)]

    def _saved(self, draft: dict[str, Any], views: list[Any]) -> Any:
        if not views:
            return gr.skip()
        before = self.folders({"preview": draft.get("save_of", [])}, "preview")
        parts = [html.file_html(self.context, views[0].folder), html.progress_html(views)]
        if views[-1].status.state == "finished":
            add_picture(views[0].folder, views[-1].folder)
            parts.append(html.same_html(before[-1] if before else None, views[-1].folder))
        return "".join(parts)


def _rows_shown(keys: Any) -> int:
    """As many rows as reach to the last one with an adapter, and two at least."""
    return max([SHOWN, *(place + 1 for place, key in enumerate(keys) if key)])
