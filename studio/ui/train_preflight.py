"""Before Start: what a run would do, counted at once and measured on the real model by a job of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from studio.config import TrainSDConfig
from studio.errors import ConfigError
from studio.jobs import queue, result, submit
from studio.runs import look
from studio.ui.train_html import facts_html, problem_html
from studio.units import duration, size
from studio.workspace import Workspace

ENDED_BADLY = ("failed", "crashed", "stopped", "cancelled")


@dataclass(frozen=True)
class Counts:
    """What is known without the model: pictures by what becomes of them, buckets as lines, and epochs."""

    kept: int
    dropped: Mapping[str, str]
    notes: tuple[str, ...]
    buckets: str
    steps: int
    epochs: float


def count(config: TrainSDConfig) -> Counts:
    """Raises ConfigError and DatasetError where a run could not begin."""
    from studio.data.buckets import assign_buckets, bucket_batches, bucket_report
    from studio.data.images import scan_folder

    data, train = config.data, config.train
    images = scan_folder(data.folder)
    buckets = assign_buckets(images.items, data.resolution, data.bucket_step, data.max_aspect)
    batches = len(bucket_batches(buckets, train.batch_size, train.seed, 0))
    return Counts(
        kept=len(images.items),
        dropped={one.path.name: one.reason for one in images.left_out},
        notes=tuple(dict.fromkeys(note.text for note in images.notes)),
        buckets=bucket_report(buckets),
        steps=train.steps,
        epochs=train.steps * train.gradient_accumulation / batches,
    )


def probe(workspace: Workspace, config: TrainSDConfig) -> Path:
    """The folder of the job that measures this config on these pictures: one that has, does or will, or a new one."""
    title = f"check {fingerprint(config)}"
    for folder in sorted(workspace.jobs.glob(f"*-probe-{title.replace(' ', '-')}"), reverse=True):
        if result(folder) or look(folder).status.state not in (*ENDED_BADLY, "finished"):
            return folder
    folder = submit(workspace, "probe", config, title)
    with suppress(ConfigError):  # it is at work already, or even done
        for _ in queue.waiting(workspace):  # to the front: somebody looks at the page
            queue.up(workspace, folder.name)
    return folder


def forget(workspace: Workspace, folder: Path) -> None:
    """Takes a measurement that nobody wants any more out of the queue, where it still waits."""
    with suppress(ConfigError):
        queue.cancel(workspace, folder.name)


def fingerprint(config: TrainSDConfig) -> str:
    """Twelve signs that change with whatever a measurement depends on."""
    folder = Path(config.data.folder)
    files = sorted((str(one.relative_to(folder)), one.stat().st_size) for one in folder.rglob("*") if one.is_file())
    settings = config.model_dump(mode="json", exclude={"output"})
    return hashlib.sha256(json.dumps([settings, files], sort_keys=True).encode()).hexdigest()[:12]


def measured(folder: Path) -> tuple[Mapping[str, Any] | None, str, bool]:
    """(the plan, what is going on until there is one, whether it is worth looking again)."""
    if made := result(folder):
        return made.facts, "", False
    view = look(folder)
    status = view.status
    if status.state in ENDED_BADLY:
        return None, status.message.partition(": ")[2] or status.message or status.state, False
    if status.state == "queued":
        return None, "waiting for the job at work to end; you can start without the measurement", True
    return None, status.message or "starting", True


def card(counts: Counts, plan: Mapping[str, Any] | None, state: str, more: bool, before: int | None = None) -> str:
    """The pre-flight as HTML: `plan` is the measurement, `state` what stands in its place, `before` the memory of
    the settings before, in bytes."""
    dropped = "; ".join(f"{escape(name)}: {escape(reason)}" for name, reason in list(counts.dropped.items())[:5])
    facts = {
        "Pictures": f"<b>{counts.kept}</b> used"
        + (f", {len(counts.dropped)} left out ({dropped})" if dropped else ", none left out"),
        "Buckets": escape(counts.buckets).replace("\n", "<br>"),
        "Steps": f"<b>{counts.steps}</b>, which is {counts.epochs:.1f} times every picture",
    }
    if counts.notes:
        facts["Note"] = "<br>".join(escape(note) for note in counts.notes)
    if plan:
        kind = "good" if plan["fits"] else "problem"
        return f'<div class="{kind}">{facts_html({**facts, **_measures(plan, before)})}</div>'
    if more:
        return facts_html({**facts, "Measured": f'<span id="train-measuring">{escape(state)} …</span>'})
    return facts_html(facts) + problem_html(state)


def _measures(plan: Mapping[str, Any], before: int | None) -> dict[str, str]:
    adapter, memory, free = plan["adapter"], size(plan["memory_bytes"]), size(plan["memory_free_bytes"])
    layers = f"{adapter['layers']} layers, {adapter['parameters']:,} parameters, {size(adapter['adapter_bytes'])}"
    changed = f" (before: {size(before)})" if before and before != plan["memory_bytes"] else ""
    verdict = "" if plan["fits"] else "<br><b>It does not fit. What makes it lighter stands below.</b>"
    return {
        "Adapter": layers,
        "Time": f"about <b>{duration(plan['seconds'])}</b> of training on {escape(plan['device'])}, and "
        f"{duration(plan['sample_seconds'])} of drawing samples",
        "Memory": f"<b>{memory}</b> at the peak{changed}, {free} are free",
        "Disk": f"<b>{size(plan['disk_bytes'])}</b>, {size(plan['disk_free_bytes'])} are free{verdict}",
    }
