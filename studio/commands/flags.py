"""Command-line flags made from a schema: type, help and range are written once, in `studio.config`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from studio.settings import fields

Command = Callable[..., None]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def with_flags(schema: type[BaseModel], keys: Mapping[str, str]) -> Callable[[Command], Command]:
    """Gives a command one flag for each entry of `keys`, parameter name -> dotted key of `schema`.

    The command's first parameter receives them together: dotted key -> value, None where not given.
    """
    known = fields(schema)

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            settings = {key: values.pop(name) for name, key in keys.items()}
            command(settings, **values)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        added = [_parameter(name, known[key]) for name, key in keys.items()]
        run.__signature__ = inspect.Signature([*added, *own])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*added, *own]}
        return run

    return decorate


def settings_help(schema: type[BaseModel]) -> str:
    """Every setting of a schema on a line of its own."""
    return "\n".join(f"{key:<30}{field_help(field)}" for key, field in fields(schema).items())


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kinds = {field.annotation, *get_args(field.annotation)}  # float | None is a float
    base = next((kind for kind in (bool, int, float) if kind in kinds), str)
    option = typer.Option(help=field_help(field), show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=Annotated[base | None, option]
    )


def field_help(field: FieldInfo, with_default: bool = True) -> str:
    """The description with choices, range and default: "Sampler steps. (1 or more; default 20)"."""
    notes = []
    if choices := [choice for choice in get_args(field.annotation) if isinstance(choice, str)]:
        notes.append(", ".join(choices))
    notes += _range(field)
    default = field.get_default(call_default_factory=True)
    if with_default and default not in (None, "", [], {}, False, PydanticUndefined):
        notes.append(f"default {default}")
    return f"{field.description} ({'; '.join(notes)})" if notes else field.description or ""


def _range(field: FieldInfo) -> list[str]:
    words = {"ge": "{} or more", "gt": "above {}", "le": "{} or less", "lt": "below {}"}
    limits = {sign: getattr(rule, sign) for rule in field.metadata for sign in words if hasattr(rule, sign)}
    return [words[sign].format(limit) for sign, limit in limits.items()]
