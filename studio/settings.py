"""From what the user gives to one checked config: defaults, then preset, file, flags, `--set a.b=c`."""

from __future__ import annotations

import difflib
import json
import logging
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from studio import paths
from studio.errors import ConfigError, nearest

Schema = TypeVar("Schema", bound=BaseModel)

log = logging.getLogger(__name__)


def fields(schema: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Dotted key ("adapter.rank") -> field, for every setting of a schema."""
    found: dict[str, FieldInfo] = {}
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= fields(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def presets() -> dict[str, Path]:
    """Name -> file of every shipped preset."""
    return {path.stem: path for path in sorted(paths.presets().glob("*.yaml"))}


def resolve(
    schema: type[Schema],
    preset: str | None = None,
    file: Path | Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
) -> Schema:
    """The config that these layers make; a later one wins.

    `preset` is a shipped name or a file, "" for none; `file` is .yaml, .toml or .json, or the settings
    that an adapter was trained with; `flags` maps dotted keys to values, None meaning not given; `sets`
    holds "a.b=c" with c in YAML, and "a.b.d=c" for one entry of a table a.b. Raises ConfigError for an
    unknown key (with the nearest known one), a value of the wrong type or range, a missing file.
    Logs the preset.
    """
    settings = file if isinstance(file, Mapping) else _read(file) if file else {}
    _check_keys(schema, settings, "the adapter's settings" if isinstance(file, Mapping) else f"'{file}'")
    flagged = [(key.split("."), value) for key, value in (flags or {}).items() if value is not None]
    entries = [*flagged, *(_parse_set(schema, entry) for entry in sets)]
    if preset is None:
        preset = getattr(schema, "default_preset", lambda settings: None)(_with_entries(settings, entries))
    base = _read(_preset_file(preset)) if preset else {}
    _check_keys(schema, base, f"preset '{preset}'")
    try:
        config = schema.model_validate(_with_entries(_merged([base, settings]), entries))
    except ValidationError as problem:
        raise ConfigError(explain(problem)) from problem
    if preset:
        log.info("preset: %s", preset)
    return config


def load(schema: type[Schema], file: Path) -> Schema:
    """A frozen config as it was saved. Raises ConfigError."""
    settings = _read(file)
    _check_keys(schema, settings, f"'{file}'")
    try:
        return schema.model_validate(settings)
    except ValidationError as problem:
        raise ConfigError(f"{file}: {explain(problem)}") from problem


def _preset_file(preset: str) -> Path:
    known = presets()
    if preset in known:
        return known[preset]
    if Path(preset).suffix and Path(preset).is_file():
        return Path(preset)
    raise ConfigError(f"there is no preset '{preset}'.{nearest(preset, known)} Presets: {', '.join(known)}.")


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
    ".toml": tomllib.loads,
    ".json": json.loads,
}


def _read(file: Path) -> dict[str, Any]:
    parser = _PARSERS.get(file.suffix.lower())
    if parser is None:
        raise ConfigError(f"'{file}' is no config file: its name must end in {', '.join(_PARSERS)}")
    try:
        settings = parser(file.read_text(encoding="utf-8")) or {}
    except OSError as problem:
        raise ConfigError(f"cannot read the config '{file}': {problem.strerror}") from problem
    except (yaml.YAMLError, ValueError) as problem:
        raise ConfigError(f"'{file}' is not valid {file.suffix[1:]}: {problem}") from problem
    if not isinstance(settings, dict):
        raise ConfigError(f"'{file}' must hold groups of settings, not {settings!r}")
    return settings


def _parse_set(schema: type[BaseModel], entry: str) -> tuple[list[str], Any]:
    """(path to the setting, its value) of "a.b=c"."""
    key, equals, text = entry.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(f"--set takes KEY=VALUE, such as adapter.rank=8, not '{entry}'")
    known = fields(schema)
    tables = [name for name, field in known.items() if get_origin(field.annotation) is dict]
    table = next((name for name in tables if key.startswith(f"{name}.")), None)
    if key not in known and table is None:
        raise ConfigError(f"--set: unknown key '{key}'.{_suggest(key, known)}")
    path = key.split(".") if table is None else [*table.split("."), key.removeprefix(f"{table}.")]
    try:
        return path, yaml.safe_load(text)
    except yaml.YAMLError as problem:
        raise ConfigError(f"--set {key}: '{text}' is not a YAML value: {problem}") from problem


def _with_entries(settings: Mapping[str, Any], entries: Iterable[tuple[list[str], Any]]) -> dict[str, Any]:
    """`settings` with the value at each path, the later over the earlier."""
    for path, value in entries:
        settings = _with(settings, path, value)
    return dict(settings)


def _with(settings: Any, path: list[str], value: Any) -> dict[str, Any]:
    """A copy of nested `settings` with another value at `path`; what is no table on the way is replaced."""
    name, *rest = path
    own = settings if isinstance(settings, Mapping) else {}
    return {**own, name: _with(own.get(name), rest, value) if rest else value}


def _merged(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Groups are merged; a value, list or table of a later layer replaces the earlier one."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for group, settings in layer.items():
            both = isinstance(settings, dict) and isinstance(merged.get(group), dict)
            merged[group] = {**merged[group], **settings} if both else settings
    return merged


def _check_keys(schema: type[BaseModel], settings: Mapping[str, Any], origin: str) -> None:
    known = fields(schema)
    for group, inner in settings.items():
        if group in known:  # a setting that is in no group
            continue
        if group not in schema.model_fields:
            raise ConfigError(f"{origin}: unknown key '{group}'.{_suggest(group, [*schema.model_fields, *known])}")
        if not isinstance(inner, dict):
            raise ConfigError(f"{origin}: '{group}' is a group of settings, not {inner!r}")
        for name in inner:
            if f"{group}.{name}" not in known:
                raise ConfigError(f"{origin}: unknown key '{group}.{name}'.{_suggest(f'{group}.{name}', known)}")


def _suggest(key: str, known: Iterable[str]) -> str:
    """The nearest known keys: by the last part of the name first, so that `rnak` finds `adapter.rank`."""
    by_name: dict[str, list[str]] = {}
    for full in known:
        by_name.setdefault(full.rpartition(".")[2], []).append(full)
    close = difflib.get_close_matches(key.rpartition(".")[2], by_name, n=2, cutoff=0.6)
    if not close:
        return nearest(key, known)
    matches = difflib.get_close_matches(key, [full for name in close for full in by_name[name]], n=3, cutoff=0)
    return f" Did you mean {', '.join(matches)}?"


def explain(problem: ValidationError) -> str:
    """One line for each bad value: key, value, and what it must be."""
    lines = []
    for error in problem.errors(include_url=False):
        key = ".".join(map(str, error["loc"]))
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "multiple_of":
            factor = error["ctx"]["multiple_of"]
            message += f"; the nearest is {round(error['input'] / factor) * factor}"
        is_value = key and error["type"] != "value_error"
        lines.append(f"{key} is {error['input']!r}: {message}" if is_value else f"{key}: {message}".lstrip(": "))
    return "\n".join(lines)
