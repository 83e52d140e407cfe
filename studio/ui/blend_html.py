"""What the blend screen says of its jobs: how far they are, the picture, the analysis, and the file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from studio import jobs
from studio.runs import look
from studio.status import ACTIVE, RunView
from studio.ui.blending import difference
from studio.ui.context import Context, empty

EMPTY_PREVIEW = empty("No preview yet", "Choose two adapters and press Preview: the same prompt and seed every time.")
EMPTY_ANALYSIS = empty(
    "Will they fight?", "Press Compare: it shows, part by part, where adapters double or cancel each other."
)

CSS = """
.preview { width: 100%; max-height: 560px; object-fit: contain; border-radius: 8px; image-rendering: auto;
  background: var(--background-fill-secondary); }
.heatmap { max-width: 100%; border-radius: 8px; background: white; }
"""


def problem_html(problem: Exception | str) -> str:
    return f'<div class="problem" role="alert">{escape(str(problem))}</div>'


def good_html(text: str) -> str:
    return f'<div class="good" role="status">{escape(text)}</div>'


def ended(view: RunView) -> bool:
    return view.status.state not in ("queued", *ACTIVE)


def progress_html(views: Sequence[RunView]) -> str:
    """The first job that is not finished: how far it is, or why it ended; "" where all are."""
    view = next((view for view in views if view.status.state != "finished"), None)
    if view is None:
        return ""
    status, kind = view.status, jobs.kind_of(view.folder)
    if ended(view):
        return problem_html(f"{kind}: {status.state}. {status.message}")
    if status.state == "queued":
        return "<div role='status'>Waiting for its turn…</div>"
    share = 100 * status.step / status.total if status.total else 0
    return (
        f'<div role="status">{escape(status.message or kind)}… {status.step or ""}</div>'
        f'<div class="track"><div style="width:{share:.0f}%"></div></div>'
    )


def picture_html(context: Context, folder: Path, alt: str) -> str:
    """The picture that a drawing job made; "" where there is none yet."""
    made = jobs.result(folder)
    if not made or not made.files:
        return ""
    address = context.url(made.files[0])
    return (
        f'<a href="{address}" target="_blank"><img class="preview" src="{context.url(made.files[0], 768)}" '
        f'alt="{escape(alt, quote=True)}"></a>'
    )


def analysis_html(context: Context, folder: Path) -> str:
    """Every pair in words, strengths to try, and the heat map."""
    made = jobs.result(folder)
    if not made:
        return ""
    facts = made.facts
    lines = [_pair(pair) for pair in facts["pairs"]]
    tried = ", ".join(
        f"{escape(name)} <b>{new:.2f}</b> (now {old:g})"
        for name, old, new in zip(facts["names"], facts["weights"], facts["suggested"], strict=True)
    )
    changed = any(abs(new - old) > 0.005 for old, new in zip(facts["weights"], facts["suggested"], strict=True))
    advice = f"Strengths to try: {tried}." if changed else "These strengths are balanced: nothing to change."
    pictures = "".join(
        f'<a href="{context.url(file)}" target="_blank"><img class="heatmap" src="{context.url(file)}" '
        'alt="Heat map: how much two adapters get in each other\'s way, block by block"></a>'
        for file in made.files
    )
    return f"<ul>{''.join(lines)}</ul><p>{advice}</p>{pictures}"


def _pair(pair: Mapping[str, Any]) -> str:
    whole, worst = pair["whole"], max(pair["blocks"], key=lambda one: one["score"])
    how = ("hardly touch each other", "somewhat touch each other", "get in each other's way")
    words = how[(whole["score"] >= 0.1) + (whole["score"] >= 0.4)]
    effect = "double" if whole["cosine"] >= 0 else "cancel"
    conflict = whole["sign_conflict"]
    signs = f"; opposite signs in {conflict:.0%} of the weights" if conflict is not None else ""
    names = f"<b>{escape(pair['first'])}</b> and <b>{escape(pair['second'])}</b>"
    if whole["score"] < 0.005:
        return f"<li>{names} leave each other alone{signs}.</li>"
    return (
        f"<li>{names} {words}: they {effect} {whole['score']:.0%} of the weaker one's effect, most in "
        f"<code>{escape(worst['block'])}</code> ({worst['score']:.0%}){signs}.</li>"
    )


def file_html(context: Context, folder: Path) -> str:
    """A file that a job made: where it is, the figures of its report, and the link to download it."""
    made = jobs.result(folder)
    if not made or not made.files:
        return ""
    file, facts = made.files[0], made.facts
    figures = {
        "Layers": facts["layers"],
        "Rank": _ranks(facts["ranks"].values(), facts["layers"]),
        "Energy kept": f"{facts['energy_kept']:.2%}",
        "Residual": f"{facts['residual']:.2%} off the exact change" if facts["residual"] else "0: nothing was cut",
        "Sign conflicts": f"{facts['sign_conflict']:.0%} of the weights" if facts["sign_conflicts"] else "none counted",
        "Rounding": f"{facts['rounding']:.2%}" if facts["rounding"] else "",
        "Not in all": f"{len(facts['partial'])} layers" if facts["partial"] else "",
        "Left out": ", ".join(facts["left_out"][:3]),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in figures.items() if value != "")
    return f'<h4>{escape(file.name)}</h4><dl class="facts">{rows}</dl>{download_html(context, file)}'


def download_html(context: Context, file: Path) -> str:
    """A link for each file of an adapter: one, or those of a peft folder."""
    files = [file] if file.is_file() else sorted(one for one in file.rglob("*") if one.is_file())
    links = (
        f'<a class="download" href="{context.url(one)}" download="{escape(one.name, quote=True)}">Download '
        f"{escape(one.name)} ({size_text(one.stat().st_size)})</a>"
        for one in files
    )
    return f"<p>{' '.join(links)}</p>"


def size_text(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.0f} kB"


def same_html(preview: Path | None, alone: Path) -> str:
    """Whether the saved file draws the preview's picture; `preview` is the job of the same settings, or None."""
    drawn = jobs.result(alone)
    before = jobs.result(preview) if preview else None
    if not drawn or not drawn.files:
        return ""
    if not before or not before.files:
        return good_html("Saved. Its picture at strength 1 is drawn.")
    most = difference(before.files[0], drawn.files[0])
    if most == 0:
        return good_html("The file at strength 1 reproduces the preview, pixel by pixel.")
    if most <= 2:
        return good_html(f"The file at strength 1 reproduces the preview: no pixel is off by more than {most} of 255.")
    return problem_html(
        f"The file at strength 1 differs from the preview by up to {most} of 255 shades: a cut or a rounding shows."
    )


def views(folders: Sequence[Path]) -> list[RunView]:
    return [look(folder, log_lines=1) for folder in folders]


def _ranks(ranks: Collection[int], layers: int) -> str:
    """ "8", "4 to 8", and how many layers have none: those are as large as the model's own."""
    found = sorted(set(ranks))
    parts = [f"{found[0]} to {found[-1]}" if len(found) > 1 else str(found[0])] if found else []
    if full := layers - len(ranks):
        parts.append(f"{full} layers as full differences; a size of “at most this rank” makes the file smaller")
    return ", ".join(parts)
