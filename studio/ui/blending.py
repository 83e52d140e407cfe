"""What the blend screen asks for, as jobs: a preview, an analysis, and a file that draws the same as the preview."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from studio import jobs
from studio.errors import ConfigError
from studio.jobs.blend import AnalyzeConfig, BlendConfig
from studio.jobs.draw import AdapterUse, DrawConfig
from studio.outputs import adapter_file
from studio.settings import explain
from studio.ui.adapters import AdapterFile, find
from studio.workspace import Workspace

PREVIEW = "preview"


class Method(NamedTuple):
    """How a way to blend is explained, and its settings with their defaults: those of `studio.algebra.BLENDS`."""

    label: str
    effect: str
    settings: Mapping[str, Any]


METHODS = {
    "linear": Method(
        "Add (linear)",
        "Each adapter at its strength, added up: what they do when they are used together. Exact.",
        {"normalise": False},
    ),
    "slerp": Method("In between (slerp)", "From the first to the second of two, along an arc: the strength stays.", {}),
    "ties": Method(
        "Settle conflicts (TIES)",
        "Small changes go; where adapters pull in opposite directions, the majority wins.",
        {"density": 0.5, "scale": 1.0},
    ),
    "dare": Method("Thin out (DARE)", "Drops changes at random and makes the rest stronger.", {"density": 0.5}),
    "dare-ties": Method(
        "Thin out, then settle (DARE-TIES)",
        "Drops at random, then the majority wins.",
        {"density": 0.5, "scale": 1.0},
    ),
    "della": Method(
        "Thin out the small (DELLA)",
        "Drops small changes more often than large ones, then the majority wins.",
        {"density": 0.5, "epsilon": 0.2, "scale": 1.0},
    ),
    "magnitude-prune": Method(
        "Keep the largest (pruning)", "Keeps the largest changes of each and adds them up.", {"density": 0.5}
    ),
    "breadcrumbs": Method(
        "Without extremes (breadcrumbs)",
        "Leaves out the smallest changes and the few largest ones.",
        {"density": 0.5, "gamma": 0.01},
    ),
}


class Setting(NamedTuple):
    """A setting of some methods, as a slider; without a range, a check box."""

    label: str
    info: str
    minimum: float = 0.0
    maximum: float = 0.0


SETTINGS = {
    "normalise": Setting("Divide by the sum of strengths", "An average instead of a sum."),
    "density": Setting("Share kept (density)", "Of each adapter's changes, this share stays.", 0.05, 1.0),
    "scale": Setting("Scale (lambda)", "The whole result times this.", 0.1, 3.0),
    "epsilon": Setting("Spread (epsilon)", "How much likelier large changes stay than small ones.", 0.0, 0.9),
    "gamma": Setting("Largest left out (gamma)", "This share of the largest changes goes.", 0.0, 0.5),
}


@dataclass(frozen=True)
class Scene:
    """What a preview shows: the same prompt and seed, so that only the adapters make the difference."""

    model: str = "builtin"
    prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 7.0

    def draw(self, adapters: Sequence[AdapterUse]) -> DrawConfig:
        """Raises ConfigError for what cannot be drawn."""
        request = {**vars(self), "adapters": [use.model_dump() for use in adapters]}
        return checked(DrawConfig, {"model": {"source": request.pop("model")}, "requests": [request]})


def uses(workspace: Workspace, rows: Sequence[tuple[str | None, float, str]]) -> list[AdapterUse]:
    """Adapters from (key, strength, factors of blocks), less rows without a key. Raises ConfigError."""
    found = []
    for key, strength, blocks in rows:
        if key:
            use = {"source": str(find(workspace, key).path), "strength": strength, "blocks": factors(blocks)}
            found.append(checked(AdapterUse, use))
    sources = [use.source for use in found]
    if twice := [source for source in sources if sources.count(source) > 1]:
        raise ConfigError(
            f"'{Path(twice[0]).stem}' is chosen twice: choose it once, with the strength that it should have"
        )
    return found


def factors(text: str) -> dict[str, float]:
    """{"*up_blocks.1*": 0.5} from lines of PATTERN = NUMBER. Raises ConfigError for any other line."""
    found = {}
    for line in filter(None, map(str.strip, (text or "").splitlines())):
        pattern, _, number = line.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not pattern.strip() or not math.isfinite(factor):
            raise ConfigError(f"'{line}' is not a strength of a part: write PATTERN = NUMBER, as in text-encoder = 0.5")
        found[pattern.strip()] = factor
    return found


def recipe(
    workspace: Workspace,
    rows: Sequence[tuple[str | None, float, str]],
    method: str,
    settings: Mapping[str, Any],
    cut: Mapping[str, Any] | None = None,
    model: str = "",
) -> BlendConfig:
    """The job that makes the blend; `settings` may hold those of other methods too, `cut` is {"rank": 8} or
    {"energy": 0.95}. Raises ConfigError for fewer than two adapters, and for what the job refuses.
    """
    chosen = uses(workspace, rows)
    if len(chosen) < 2:
        raise ConfigError("choose two adapters or more to blend")
    own = {name: settings.get(name, default) for name, default in METHODS[method].settings.items()}
    known = {str(one.path): one for key, _, _ in rows if key for one in [find(workspace, key)]}
    config = {
        "adapters": [use.model_dump() for use in chosen],
        "file": {"name": PREVIEW, "place": "job"},
        "method": method,
        "settings": own,
        "base": base_for(list(known.values()), model),
        **(cut or {}),
    }
    return checked(BlendConfig, config)


def base_of(adapters: Sequence[AdapterFile], given: str) -> str:
    """The base to draw with: the given one, or the first that an adapter says it was trained on, where it is at hand.

    Raises ConfigError where there is none: what a file names is not fetched from anywhere unasked.
    """
    if given.strip():
        return given.strip()
    sources = list(filter(None, (one.source for one in adapters)))
    for source in sources:
        if source == "builtin" or (Path(source).is_absolute() and Path(source).exists()):
            return source
    where = f"the adapters name {sources[0]}, which is not here" if sources else "the adapters do not say"
    raise ConfigError(f"which base are they for? Name it under “How the preview is drawn”: {where}")


def base_for(adapters: Sequence[AdapterFile], model: str) -> str:
    """The base, where an adapter's file alone does not tell what it changes; "" where all are LoRA."""
    return "" if all(one.method == "lora" for one in adapters) else model


def together(config: BlendConfig) -> bool:
    """Whether the adapters used at the same time do what the blend does: then nothing has to be made first."""
    plain = config.method == "linear" and not config.settings.get("normalise")
    return plain and config.rank is None and config.energy is None


def digest(config: BlendConfig, scene: Scene) -> str:
    """Tells whether a preview is of these settings, and of the same versions of the files."""
    made = config.model_dump(exclude={"file"})
    versions = [Path(use.source).stat().st_mtime_ns for use in config.adapters]
    return hashlib.sha256(json.dumps([made, versions, vars(scene)], sort_keys=True).encode()).hexdigest()


def preview(workspace: Workspace, config: BlendConfig, scene: Scene) -> list[Path]:
    """Jobs, of which the last draws the picture."""
    if together(config):
        return [jobs.submit(workspace, "draw", scene.draw(config.adapters), "blend preview")]
    scene.draw([])  # a wrong scene costs no blend
    folder = jobs.submit(workspace, "blend", config, PREVIEW)
    drawn = scene.draw([AdapterUse(source=str(folder / f"{PREVIEW}.safetensors"))])
    return [folder, jobs.submit(workspace, "draw", drawn, "blend preview")]


def save(workspace: Workspace, config: BlendConfig, scene: Scene, name: str, format: str, precision: str) -> list[Path]:
    """Two jobs: the file in the library, and the picture that it draws alone. Raises ConfigError for a taken name."""
    name = free_name(workspace, name)
    file = {"name": name, "place": "library", "format": format, "precision": precision}
    whole = checked(BlendConfig, {**config.model_dump(), "file": file})
    drawn = scene.draw([AdapterUse(source=str(adapter_file(workspace.library / name, format)))])
    return [jobs.submit(workspace, "blend", whole, name), jobs.submit(workspace, "draw", drawn, f"{name} alone")]


def add_picture(made: Path, alone: Path) -> None:
    """Puts what the saved file draws beside it in the library; nothing where it has a picture. Both are jobs."""
    files, drawn = (found.files if (found := jobs.result(folder)) else [] for folder in (made, alone))
    if files and drawn:
        target = files[0].with_name(f"{files[0].name.removesuffix('.safetensors')}.png")
        if not target.exists():
            shutil.copyfile(drawn[0], target)


def analyze(workspace: Workspace, config: BlendConfig) -> Path:
    """The job that says whether the adapters will fight."""
    asked = {"adapters": [use.model_dump() for use in config.adapters], "base": config.base}
    return jobs.submit(workspace, "analyze", checked(AnalyzeConfig, asked), "analysis")


def safe_name(name: str) -> str:
    """A file name without its ending, of what somebody typed or dropped: letters, digits, spaces and -_.()+ of any
    script. Raises ConfigError where nothing is left."""
    stem = Path(name.replace("\\", "/")).name.removesuffix(".safetensors")
    cleaned = re.sub(r"[^\w\-.()+ ]+", "-", stem).strip(" .-")[:50].rstrip(" .")
    if not cleaned:
        raise ConfigError(f"'{name[:40]}' is no name for a file: use letters and digits")
    return cleaned


def free_name(workspace: Workspace, name: str) -> str:
    """`safe_name`, which must be free in the library. Raises ConfigError."""
    name = safe_name(name)
    if (workspace.library / name).exists() or (workspace.library / f"{name}.safetensors").exists():
        raise ConfigError(f"the library has a '{name}' already: choose another name")
    return name


def difference(first: Path, second: Path) -> int:
    """The largest difference of two pictures of one size, in steps of 255."""
    from PIL import Image, ImageChops

    with Image.open(first) as one, Image.open(second) as other:
        extremes = ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getextrema()
    return max(high for _, high in extremes)  # type: ignore[misc]


def checked(schema: Any, settings: Mapping[str, Any]) -> Any:
    """The settings of a job. Raises ConfigError for what its schema refuses."""
    try:
        return schema.model_validate(dict(settings))
    except ValidationError as problem:
        raise ConfigError(explain(problem)) from problem
