"""The screen of runs: the queue and all runs, one of them live, several compared.

All that it shows is on disk, so that who looks, and when, changes nothing. Which runs are chosen is the browser's.
Another screen opens a run here by its id in "runs.selected" of `context.shared`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from studio import jobs
from studio.errors import StudioError
from studio.jobs import queue
from studio.runs import look
from studio.ui import run_compare as compare
from studio.ui import run_view as view
from studio.ui import runs_html as html
from studio.ui.adapters import adapters_of, choices
from studio.ui.context import PRIVATE, Context
from studio.ui.drawing import use
from studio.ui.live import Series

TITLE = "Runs"
QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}
TICK_S = 1.5
LOG_LINES = 40
NAMES = ("stop", "save", "sample", "resume", "clone", "remove", "up", "download", "generate", "blend")
COLORS = {"each step": "#94a3b8", "smoothed": "#6366f1"}


class Seen:
    """What one page shows already: it is sent what is new."""

    def __init__(self) -> None:
        self.of: Any = None
        self.values: dict[str, Any] = {}
        self.series: dict[Path, Series] = {}

    def open(self, of: Any) -> None:
        """Begins again where the page shows something else now."""
        if of != self.of:
            self.of, self.values = of, {}

    def new(self, name: str, value: Any) -> bool:
        """Whether the page has another value under this name, or none; it is taken to have this one now."""
        if name in self.values and self.values[name] == value:
            return False
        self.values[name] = value
        return True

    def changed(self, name: str, value: Any) -> Any:
        """The value where it is new."""
        return value if self.new(name, value) else gr.skip()

    def read(self, folder: Path) -> Series:
        """The metrics of a run, with what is new in them."""
        series = self.series.setdefault(folder, Series(folder / "metrics.jsonl"))
        series.read()
        return series


class Screen:
    """The components of the screen, and what happens between them."""

    def __init__(self, context: Context) -> None:
        self.context, self.workspace = context, context.workspace
        self.table = gr.HTML(html.EMPTY, elem_id="runs-table", css_template=html.TABLE_CSS, js_on_load=html.TABLE_JS)
        with gr.Column(visible=False, elem_id="runs-view") as self.box:
            self._one()
        with gr.Accordion("Compare runs", open=False, visible=False, elem_id="runs-compare-box") as self.several:
            self._compared()
        browser = {"secret": "adapter-studio"}
        self.selected = gr.BrowserState("", storage_key="adapter-studio-run", **browser)
        self.kept = gr.BrowserState([], storage_key="adapter-studio-runs-compared", **browser)
        self.seen, self.seen_several = gr.State(Seen()), gr.State(Seen())
        self.acted = gr.State(0.0)  # when a button was pressed last
        self.timer = gr.Timer(TICK_S)
        context.shared["runs.selected"] = self.selected

    # -- layout -----------------------------------------------------------------------------------

    def _one(self) -> None:
        self.state = gr.HTML(elem_id="runs-status", css_template=html.STATE_CSS)
        looks: dict[str, dict[str, Any]] = {
            "stop": {"value": "Save and stop", "variant": "stop"},
            "save": {"value": "Save now"},
            "sample": {"value": "Sample now"},
            "resume": {"value": "Resume", "variant": "primary"},
            "clone": {"value": "Run a copy"},
            "remove": {"value": "Remove from the queue", "variant": "stop"},
            "up": {"value": "Move up"},
            "download": {"value": "Download", "link_target": "_blank"},
            "generate": {"value": "Generate with it", "variant": "primary"},
            "blend": {"value": "Open in Blend"},
        }
        with gr.Row(elem_id="runs-buttons"):
            self.buttons = {
                name: gr.Button(visible=False, size="md", min_width=140, elem_id=f"runs-{name}", **looks[name])
                for name in NAMES
            }
        self.loss = gr.LinePlot(
            x="step", y="loss", color="curve", title="Loss", color_map=COLORS, height=300, visible=False,
            elem_id="runs-loss", buttons=["fullscreen", "export"],
        )  # fmt: skip
        self.samples = gr.HTML(elem_id="runs-samples", css_template=html.SAMPLES_CSS)
        with gr.Accordion("Log", open=False, elem_id="runs-log-box"):
            self.log = gr.HTML(elem_id="runs-log", autoscroll=True)

    def _compared(self) -> None:
        self.choice = gr.Dropdown(
            [], value=[], multiselect=True, label="Runs", elem_id="runs-compare",
            info="Two or more: their loss, their samples of the last step that all have, and what differs.",
        )  # fmt: skip
        self.curves = gr.LinePlot(
            x="step", y="loss", color="curve", title="Loss, smoothed", height=320, visible=False,
            elem_id="runs-compare-loss", buttons=["fullscreen", "export"],
        )  # fmt: skip
        self.pictures = gr.HTML(elem_id="runs-compare-samples", css_template=html.SAMPLES_CSS)
        self.differences = gr.HTML(elem_id="runs-compare-settings", css_template=html.COLUMNS_CSS)

    # -- events -----------------------------------------------------------------------------------

    def listen(self) -> None:
        """What the page asks for, and what its buttons do.

        Whatever makes the page look again is one event, of which one is under way at a time: answers that came in
        another order than they were made would leave it with what another run had.
        """
        live = [self.table, self.box, self.several, self.state, self.loss, self.samples, self.log]
        shown = [*live, *self.buttons.values()]
        always = [self.timer.tick, self.context.page.load]
        one = [*always, self.selected.change, self.acted.change]
        gr.on(one, self.tick, [self.selected, self.seen], shown, **QUIET, trigger_mode="always_last")
        several = [self.choice, self.curves, self.pictures, self.differences]
        looks = [*always, self.kept.change]
        gr.on(looks, self.compare, [self.kept, self.seen_several], several, **QUIET, trigger_mode="always_last")
        self.table.choose(self._on_choose, None, self.selected, **QUIET)
        self.choice.input(lambda chosen: chosen, self.choice, self.kept, **QUIET)
        actions = {
            "stop": self._stop,
            "save": lambda folder: _ask(folder, "save", "A checkpoint is saved after this step."),
            "sample": lambda folder: _ask(folder, "sample", "Samples are drawn after this step."),
            "resume": self._resume,
            "clone": self._clone,
            "remove": self._remove,
            "up": lambda folder: queue.up(self.workspace, folder.name),
        }
        for name, action in actions.items():
            self.buttons[name].click(self._handler(action), self.seen, [self.selected, self.acted], **QUIET)

    def wire(self) -> None:
        """The buttons that open another screen, where it is there."""
        shared, tabs = self.context.shared, self.context.tabs
        adapters, base, prompt = (shared.get(f"generate.{name}") for name in ("adapters", "base", "prompt"))
        if adapters and base and prompt:
            self.buttons["generate"].click(
                self._on_generate, [self.seen, prompt], [adapters, base, prompt, tabs], **QUIET
            )
        if blend := shared.get("blend.adapters"):
            self.buttons["blend"].click(self._on_blend, [self.seen, *blend], [*blend, tabs], **QUIET)

    # -- looking ----------------------------------------------------------------------------------

    def _on_choose(self, event: gr.EventData) -> str:
        return str(event.id)

    def tick(self, selected: str | None, seen: Seen) -> list[Any]:
        """What is new of the list and of the chosen run."""
        rows = view.rows(self.workspace)
        row = view.choose(rows, selected)
        seen.open(row.folder if row else None)
        shown = seen.new("shown", row is not None)
        first = [
            seen.changed("table", html.table_html(rows, row.id if row else "")),
            gr.update(visible=row is not None) if shown else gr.skip(),
            gr.update(visible=row is not None) if shown else gr.skip(),
        ]
        return [*first, *(self._row(row, seen) if row else [gr.skip()] * (4 + len(NAMES)))]

    def _row(self, row: view.Row, seen: Seen) -> list[Any]:
        now = look(row.folder, LOG_LINES)
        series = seen.read(row.folder)
        pictures = view.samples(row.folder)
        words = view.words(row, now)
        return [
            seen.changed("state", html.state_html(row, words, view.rates(series), now.log_tail)),
            _plot(view.loss_points(series)) if seen.new("loss", series.offset) else gr.skip(),
            seen.changed("samples", html.samples_html(self.context, pictures)),
            seen.changed("log", html.log_html(now)),
            *self._buttons(row, seen),
        ]

    def _buttons(self, row: view.Row, seen: Seen) -> list[Any]:
        """Those that make sense now."""
        state = row.status.state
        file = view.adapter_of(row.folder) if row.trains else None
        use_in = self.context.shared
        shown: dict[str, Any] = {
            "stop": state in ("running", "stopping"),
            "save": row.trains and state == "running",
            "sample": row.trains and state == "running",
            "resume": state in view.ENDED_EARLY and row.ahead is None,
            "clone": row.trains,
            "remove": row.ahead is not None,
            "up": bool(row.ahead),
            "download": file is not None,
            "generate": file is not None and "generate.adapters" in use_in,
            "blend": file is not None and state == "finished" and "blend.adapters" in use_in,
        }
        updates = {name: gr.update(visible=shown[name]) for name in NAMES}
        if file is not None:
            updates["download"] = gr.update(visible=True, link=self.context.url(view.weights(file)))
        facts = [*shown.values(), file]
        return list(updates.values()) if seen.new("buttons", facts) else [gr.skip()] * len(NAMES)

    def compare(self, chosen: list[str] | None, seen: Seen) -> list[Any]:
        """What is new of the runs that are compared."""
        known = {row.id: row for row in view.rows(self.workspace) if row.trains and row.status.step}
        folders = [known[id].folder for id in chosen or [] if id in known]
        seen.open(folders)
        options = [(f"{row.title} ({row.id[:15]})", id) for id, row in known.items()]
        choice = gr.Dropdown(choices=options, value=[one.name for one in folders])
        first = choice if seen.new("options", options) else gr.skip()
        if len(folders) < 2:
            none = [gr.update(visible=False), "", ""]
            return [first, *(none if seen.new("none", True) else [gr.skip()] * 3)]
        names = compare.labels(folders)
        series = {names[folder]: seen.read(folder) for folder in folders}
        offsets = [one.offset for one in series.values()]
        step, rows = compare.beside(folders)
        pictures = html.pictures_html(self.context, list(names.values()), rows)
        title = f"<p>Samples at step {step}</p>" if rows else "<p>There is no step of which all have samples.</p>"
        return [
            first,
            _plot(compare.curves(series)) if seen.new("curves", offsets) else gr.skip(),
            seen.changed("pictures", title + pictures),
            seen.changed("settings", html.differences_html(list(names.values()), compare.differences(folders))),
        ]

    # -- acting -----------------------------------------------------------------------------------

    def _handler(self, action: Callable[[Path], Any]) -> Callable[[Seen], list[Any]]:
        """Acts on the run that the page shows, whatever came first on the disk since; the page stays with it."""

        def act(seen: Seen) -> list[Any]:
            try:
                action(seen.of)
            except StudioError as problem:
                gr.Warning(str(problem))
            return [seen.of.name, time.time()]

        return act

    def _stop(self, folder: Path) -> None:
        jobs.stop(folder)
        _tell("It finishes its step, saves and stops. If it does not answer in two minutes, it is made to.")

    def _resume(self, folder: Path) -> None:
        jobs.resume(self.workspace, folder)

    def _clone(self, folder: Path) -> None:
        made = view.clone(self.workspace, folder)
        _tell(f"A new run with the same settings is in the queue: {made.name}")

    def _remove(self, folder: Path) -> None:
        if not queue.cancel(self.workspace, folder.name):
            gr.Warning("It has begun already: stop it instead.")

    def _on_generate(self, seen: Seen, prompt: str) -> list[Any]:
        """Its adapter, its base, and its first prompt where none is written yet."""
        folder = seen.of
        file = view.adapter_of(folder)
        if file is None:
            return [gr.skip()] * 4
        one, config = use(self.workspace, file), view.settings(folder)
        known = choices(adapters_of(self.workspace))
        if one["source"] not in [key for _, key in known]:
            known.append((f"{file.stem} (run {folder.name})", one["source"]))
        prompts = config.get("samples", {}).get("prompts") or [""]
        source = config.get("model", {}).get("source", "builtin")
        return [gr.HTML(value=[one], choices=known), source, prompt or prompts[0], gr.Tabs(selected="generate")]

    def _on_blend(self, seen: Seen, *keys: str | None) -> list[Any]:
        """Its adapter in the first row that is free."""
        file = view.adapter_of(seen.of)
        known = adapters_of(self.workspace)
        key = next((one.key for one in known if one.path == file), None)
        if key is None or key in keys:
            return [*[gr.skip()] * len(keys), gr.Tabs(selected="blend")]
        place = next((place for place, one in enumerate(keys) if not one), 0)
        options = [("none", ""), *choices(known)]
        rows = [gr.update(choices=options, **({"value": key} if at == place else {})) for at in range(len(keys))]
        return [*rows, gr.Tabs(selected="blend")]


def _tell(text: str) -> None:
    gr.Info(text, duration=5)


def _ask(folder: Path, request: str, told: str) -> None:
    (folder / "control" / request).touch()
    _tell(told)


def _plot(points: list[view.Point]) -> Any:
    """A chart of points; hidden before there are two steps to connect."""
    import pandas

    return gr.LinePlot(
        pandas.DataFrame(points, columns=["step", "loss", "curve"]), visible=len({step for step, _, _ in points}) > 1
    )


def build(context: Context) -> None:
    """The screen, inside its tab."""
    screen = Screen(context)
    screen.listen()
    context.shared["runs.screen"] = screen


def wire(context: Context) -> None:
    """What needs the other screens."""
    context.shared["runs.screen"].wire()
