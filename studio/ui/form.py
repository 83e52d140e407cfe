"""Form fields from a settings schema: label, help, range, choices and default are written once, in `studio.config`."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from studio.commands.flags import field_help
from studio.errors import ConfigError
from studio.settings import fields


def form(schema: type[BaseModel], keys: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> a Gradio component inside the block under way, in the order of `keys`.

    `values` holds what the fields show; a key that it lacks shows the schema's default. Each component's
    `elem_id` is its key with dashes: "train-steps". Raises KeyError for an unknown key.
    """
    known = fields(schema)
    return {key: component(key, known[key], values.get(key, _default(known[key]))) for key in keys}


def component(key: str, field: FieldInfo, value: Any) -> Any:
    """The component for one setting."""
    import gradio as gr

    kind, optional = _kind(field)
    common: dict[str, Any] = {
        "label": key.rpartition(".")[2].replace("_", " "),
        "info": field_help(field, with_default=False),
        "elem_id": key.replace(".", "-"),
    }
    if get_origin(kind) is Literal:
        return gr.Dropdown(list(get_args(kind)), value=value, **common)
    if kind is bool:
        return gr.Checkbox(value=bool(value), **common)
    if kind in (int, float) and optional:  # a Number that is shown for the first time makes 0 of None
        return gr.Textbox(_text(kind, value), placeholder="not set", max_lines=1, **common)
    if kind in (int, float):  # without bounds: the schema's message names the field, Gradio's does not
        return gr.Number(value, precision=0 if kind is int else None, **common)
    if get_origin(kind) is list:
        return gr.Textbox(_text(kind, value), lines=2, **{**common, "info": f"{common['info']} One a line."})
    return gr.Textbox(_text(kind, value), **common)


def show(schema: type[BaseModel], key: str, value: Any) -> Any:
    """A setting as its component takes it: the inverse of `read`."""
    kind, optional = _kind(fields(schema)[key])
    as_it_is = get_origin(kind) is Literal or kind is bool or (kind in (int, float) and not optional)
    return value if as_it_is else _text(kind, value)


def read(schema: type[BaseModel], given: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> setting, from what the components of these keys show; an empty number is None.

    Raises ConfigError for a table that is not YAML, and for text in place of a number that may be left open.
    """
    known = fields(schema)
    found = {}
    for key, value in given.items():
        kind, optional = _kind(known[key])
        if get_origin(kind) is list:
            value = [line.strip() for line in str(value or "").splitlines() if line.strip()]
        elif get_origin(kind) in (dict, tuple):
            value = _from_yaml(key, value)
        elif kind in (int, float) and optional:
            value = _number(key, value)
        if kind is int and value is not None:
            value = int(value)  # Gradio's numbers are floats
        found[key] = value
    return found


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"train.steps": 5} as {"train": {"steps": 5}}."""
    groups: dict[str, Any] = {}
    for key, value in settings.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = value
    return groups


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `nested`."""
    return {f"{group}.{name}": value for group, inner in settings.items() for name, value in inner.items()}


def _text(kind: Any, value: Any) -> str:
    """A list as lines, a table or a pair as YAML on one line ("{init: pissa}"), anything else as it is."""
    if get_origin(kind) is list:
        return "\n".join(map(str, value or []))
    if get_origin(kind) in (dict, tuple) and value:
        plain = list(value) if isinstance(value, tuple) else value
        return yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=1000).strip()
    if kind in (int, float):
        return "" if value is None else f"{value:.15g}"
    return str(value) if value else ""


def _number(key: str, text: str | float | None) -> float | None:
    plain = "" if text is None else str(text).strip()
    try:
        return float(plain) if plain else None
    except ValueError:
        raise ConfigError(f"{key}: '{text}' is no number; leave it empty for none") from None


def _from_yaml(key: str, text: str | None) -> Any:
    try:
        return yaml.safe_load(text or "") or {}
    except yaml.YAMLError as problem:
        raise ConfigError(f"{key}: '{text}' is not a YAML value: {problem}") from problem


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _kind(field: FieldInfo) -> tuple[Any, bool]:
    """(the type of a setting's value, whether it may be left open)."""
    kind = field.annotation
    if isinstance(kind, types.UnionType):
        rest = [one for one in get_args(kind) if one is not type(None)]
        return rest[0], len(rest) < len(get_args(kind))
    return kind, False
