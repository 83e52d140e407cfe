"""The settings half of the train screen: goal, base and preset choose the values, and which fields are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from studio.config import TrainSDConfig
from studio.errors import StudioError
from studio.ui import form
from studio.ui import train_html as html
from studio.ui import train_settings as settings
from studio.ui.context import PRIVATE
from studio.ui.train_settings import ALL, BASES, CHANGED, GOALS, MATTERS, Values

QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}
GOAL, PRESET = "style", "builtin-style"


class Goal:
    """The row of goals, with the advice of the chosen one."""

    def __init__(self) -> None:
        self.choice = gr.Radio(
            [(goal.title, name) for name, goal in GOALS.items()],
            value=GOAL,
            label="What should it learn?",
            elem_id="train-goal",
        )
        self.advice = gr.HTML(advice_html(GOAL), elem_id="train-advice", css_template=html.NOTE_CSS)


class Fields:
    """One component for each setting, of which the goal's, the changed ones or those found are shown."""

    def __init__(self, goal: Goal) -> None:
        self.goal = goal
        self.keys = settings.form_keys()
        values = settings.preset_values(PRESET)
        with gr.Row():
            base, self.preset = _base(), _preset()
        self.difference = gr.HTML(
            settings.difference_html({}, PRESET), elem_id="train-difference", css_template=html.NOTE_CSS
        )
        with gr.Row():
            self.view = gr.Radio([MATTERS, CHANGED, ALL], value=MATTERS, label="Show", elem_id="train-settings-view")
            self.search = gr.Textbox(
                label="Search all settings", elem_id="train-settings-search", placeholder="text encoder, seed, ..."
            )
        visible = settings.shown(MATTERS, "", GOAL, values, PRESET)
        with gr.Row(elem_id="train-fields", elem_classes="fields"):
            fields = form.form(TrainSDConfig, self.keys[1:], values)
        for key, field in fields.items():
            field.label, field.visible = settings.label(key), key in visible
        self.by_key = {"model.source": base, **fields}
        self._events()

    @property
    def all(self) -> list[Any]:
        """The components, in the order of `keys`."""
        return list(self.by_key.values())

    @property
    def buckets(self) -> list[Any]:
        """What the crops depend on."""
        return [self.by_key[key] for key in ("data.resolution", "data.bucket_step", "data.max_aspect")]

    @property
    def chosen(self) -> list[Any]:
        """The components that `values_of` fills."""
        return [self.preset, self.goal.advice, self.difference, *self.all]

    def _events(self) -> None:
        goal, given = self.goal.choice, self.all
        by_goal = gr.on(
            [goal.input, self.by_key["model.source"].input], self._on_goal, [goal, *given], self.chosen, **QUIET
        )
        by_preset = self.preset.input(self._on_preset, [goal, self.preset, *given], self.chosen, **QUIET)
        for event in (by_goal, by_preset):
            self.show_after(event)
        gr.on([self.view.input, self.search.input], *self._visibility(), **QUIET, trigger_mode="always_last")

    def show_after(self, event: Any) -> Any:
        """Shows and hides fields when an event is over."""
        return event.then(*self._visibility(), **QUIET)

    def _visibility(self) -> tuple[Any, list[Any], list[Any]]:
        return self._visible, [self.view, self.search, self.goal.choice, self.preset, *self.all], self.all

    def read(self, given: Sequence[Any]) -> Values:
        """The settings that the components show. Raises ConfigError."""
        return form.read(TrainSDConfig, dict(zip(self.keys, given, strict=True)))

    def updates(self, values: Values) -> list[Any]:
        """For each component its value; those without one stay."""
        return [form.show(TrainSDConfig, key, values[key]) if key in values else gr.skip() for key in self.keys]

    def values_of(self, goal: str, preset: str, values: Values) -> list[Any]:
        """For each of `chosen` its value: a preset with other values over it."""
        new = {**settings.preset_values(preset), **values}
        difference = settings.difference_html(settings.differences(new, preset), preset)
        return [preset, advice_html(goal), difference, *self.updates(new)]

    def _on_goal(self, goal: str, *given: Any) -> list[Any]:
        source = given[0] or "builtin"
        try:
            preset = settings.preset_for(goal, source)
        except StudioError:
            preset = settings.preset_for(goal, "builtin")  # what is wrong with the base is said by the check
        return self.values_of(goal, preset, {**self._content(given), "model.source": source})

    def _on_preset(self, goal: str, preset: str, *given: Any) -> list[Any]:
        return self.values_of(goal, preset, self._content(given))

    def _content(self, given: Sequence[Any]) -> Values:
        values = dict(zip(self.keys, given, strict=True))
        return form.read(TrainSDConfig, {key: values[key] for key in settings.CONTENT})

    def _visible(self, view: str, search: str, goal: str, preset: str, *given: Any) -> list[Any]:
        shown = settings.shown(view, search, goal, self.read(given), preset) | {"model.source"}
        return [gr.update(visible=key in shown) for key in self.keys]


def advice_html(goal: str) -> str:
    """What a goal wants of the pictures."""
    return f"<p>{GOALS[goal].advice}</p>"


def _base() -> Any:
    return gr.Dropdown(
        list(BASES.items()),
        value="builtin",
        label="Base",
        info="What is trained on. A hub id, a diffusers folder or a .safetensors file can be typed.",
        allow_custom_value=True,
        elem_id="model-source",
        scale=2,
    )


def _preset() -> Any:
    return gr.Dropdown(
        list(settings.presets()),
        value=PRESET,
        label="Preset",
        elem_id="train-preset",
        info="What the settings begin with.",
    )
