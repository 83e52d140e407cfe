"""The end of the train screen: the check before the start, what makes the run lighter, and Start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from studio.config import TrainSDConfig
from studio.errors import StudioError
from studio.jobs import TRAIN_SD, submit
from studio.lighter import lighter
from studio.ui import form, train_preflight
from studio.ui import train_html as html
from studio.ui import train_pictures as pictures
from studio.ui import train_settings as settings
from studio.ui.context import PRIVATE, Context
from studio.ui.train_dataset import Sources
from studio.ui.train_fields import Fields

QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}
FIXES = 5  # as many as `lighter` has at most


@dataclass(frozen=True)
class Probe:
    """The check on the screen: the job that measures, what is counted, and the memory of the check before."""

    folder: Path
    counts: train_preflight.Counts
    before: int | None

    @property
    def memory(self) -> int | None:
        """Measured bytes; those of the check before until they are."""
        plan, _, _ = train_preflight.measured(self.folder)
        return plan["memory_bytes"] if plan else self.before


class Check:
    """Buttons, the card, and the fixes; `wire` when all screens are there."""

    def __init__(self, context: Context, sources: Sources, fields: Fields) -> None:
        self.context, self.fields = context, fields
        self.run = [sources.choice, sources.name, *fields.all]
        with gr.Row():
            self.check = gr.Button("Check before starting", elem_id="train-preflight")
            self.start = gr.Button("Start training", variant="primary", elem_id="train-start")
        self.card = gr.HTML(elem_id="train-plan")
        with gr.Accordion("Make it lighter", open=False, visible=False, elem_id="train-fixes") as self.box:
            self.fixes = [gr.Button(visible=False, size="sm", elem_id=f"train-fix-{place}") for place in range(FIXES)]
        self.probe = gr.State(None)  # a `Probe`
        self.timer = gr.Timer(1, active=False)
        self._events()

    def _events(self) -> None:
        checked = [self.card, self.timer, self.box, self.probe, *self.fixes]
        self.check.click(self._on_check, [self.probe, *self.run], checked, **PRIVATE)
        self.timer.tick(self._on_tick, self.probe, [self.card, self.timer, self.box], **QUIET)
        for place, button in enumerate(self.fixes):
            fixed = button.click(self._fixer(place), self.fields.all, self.fields.all, **QUIET)
            fixed.then(self._on_check, [self.probe, *self.run], checked, **PRIVATE)

    def wire(self) -> None:
        """Start opens the run on the screen of runs, which shares the component that holds the chosen one's id."""
        selected = self.context.shared.get("runs.selected")
        outputs = [self.card, self.context.tabs, *([selected] if selected else [])]

        def start(*given: Any) -> list[Any]:
            try:
                config = self._config(*given)
                train_preflight.count(config)
                folder = submit(self.context.workspace, TRAIN_SD, config, config.output.name)
            except StudioError as problem:
                return [html.problem_html(problem), *[gr.skip()] * (len(outputs) - 1)]
            return ["", gr.Tabs(selected="runs"), folder.name][: len(outputs)]

        self.start.click(start, self.run, outputs, **PRIVATE)

    def _config(self, dataset: str, name: str, *given: Any) -> TrainSDConfig:
        folder = pictures.folder_of(self.context.workspace, dataset)
        return settings.make_config(self.fields.read(given), folder, name, self.context.workspace.runs)

    def _on_check(self, former: Probe | None, *given: Any) -> list[Any]:
        workspace = self.context.workspace
        try:
            config = self._config(*given)
            counts = train_preflight.count(config)
            folder = train_preflight.probe(workspace, config)
        except StudioError as problem:
            hidden = [gr.update(visible=False)] * FIXES
            return [html.problem_html(problem), gr.Timer(active=False), gr.update(visible=False), former, *hidden]
        if former and former.folder != folder:
            train_preflight.forget(workspace, former.folder)
        probe = Probe(folder, counts, former.memory if former else None)
        return [*self._look(probe), probe, *_buttons(config)]

    def _on_tick(self, probe: Probe | None) -> list[Any]:
        return self._look(probe) if probe else [gr.skip(), gr.Timer(active=False), gr.skip()]

    def _look(self, probe: Probe) -> list[Any]:
        plan, state, more = train_preflight.measured(probe.folder)
        card = train_preflight.card(probe.counts, plan, state, more, probe.before)
        box = gr.update(visible=True, open=not plan["fits"]) if plan else gr.update(visible=False)
        return [card, gr.Timer(active=more), box]

    def _fixer(self, place: int) -> Any:
        def fix(*given: Any) -> list[Any]:
            values = self.fields.read(given)
            config = TrainSDConfig.model_validate(form.nested({**values, "data.folder": "."}))
            return self.fields.updates(dict(lighter(config)[place].settings))

        return fix


def _buttons(config: TrainSDConfig) -> list[Any]:
    """An update for each button; those that have nothing to offer are hidden."""
    shown = [gr.update(visible=True, value=f"{fix.name}: {fix.effect}, {fix.cost}") for fix in lighter(config)[:FIXES]]
    return shown + [gr.update(visible=False)] * (FIXES - len(shown))
