"""The train screen: a goal, pictures, settings, what they will cost, start.

What is chosen and typed is a draft that the browser keeps: a reload loses nothing, and two people do not see each
other's.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from studio.errors import StudioError
from studio.ui import train_html as html
from studio.ui import train_settings as settings
from studio.ui.context import PRIVATE, Context
from studio.ui.train_check import Check
from studio.ui.train_dataset import Dataset, Sources, choices
from studio.ui.train_fields import Fields, Goal

TITLE = "Train"
QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}


def build(context: Context) -> None:
    """The screen, inside its tab."""
    goal = Goal()
    above = gr.Column()  # pictures come before settings, and are examined by three of them
    with gr.Accordion("Settings", elem_id="train-settings"):
        fields = Fields(goal)
    with above:
        sources = Sources(context, fields.buckets, fields.by_key["samples.prompts"])
        dataset = Dataset(sources)
    context.shared["train.check"] = Check(context, sources, fields)
    _keep_draft(context, fields, sources, dataset)


def wire(context: Context) -> None:
    """What needs the other screens."""
    context.shared["train.check"].wire()


def _keep_draft(context: Context, fields: Fields, sources: Sources, dataset: Dataset) -> None:
    draft = gr.BrowserState({}, storage_key="adapter-studio-train", secret="adapter-studio")
    words = [sources.choice, sources.name, sources.trigger]

    def edited(goal: str, preset: str, dataset: str, name: str, trigger: str, *given: Any) -> list[Any]:
        try:
            values = fields.read(given)
        except StudioError as problem:  # half typed
            return [html.problem_html(problem), gr.skip()]
        changed = settings.differences(values, preset)
        own = {key: values[key] for key in (*changed, *settings.CONTENT)}
        about = {"goal": goal, "preset": preset, "dataset": dataset, "name": name, "trigger": trigger}
        return [settings.difference_html(changed, preset), {**about, "settings": own}]

    def restore(kept: dict[str, Any]) -> list[Any]:
        if kept.get("goal") not in settings.GOALS or kept.get("preset") not in settings.presets():
            return [gr.skip(), choices(context, ""), *[gr.skip()] * (2 + len(fields.chosen))]
        own = {key: value for key, value in kept["settings"].items() if key in fields.keys}
        texts = [choices(context, kept["dataset"]), kept["name"], kept["trigger"]]
        return [kept["goal"], *texts, *fields.values_of(kept["goal"], kept["preset"], own)]

    everything = [fields.goal.choice, fields.preset, *words, *fields.all]
    changes = [component.change for component in everything]
    # a preset changes many fields, each of which says so: one call at a time, so that the last one wins
    in_order = {"trigger_mode": "always_last", "concurrency_limit": 1}
    gr.on(changes, edited, everything, [fields.difference, draft], **QUIET, **in_order)
    restored = context.page.load(restore, draft, [fields.goal.choice, *words, *fields.chosen], **QUIET)
    dataset.show_after(fields.show_after(restored))
