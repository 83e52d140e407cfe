"""The pieces of HTML of the screen of runs: the list, a run's state, samples in rows and columns, a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from studio.runs import RunView
from studio.ui.context import Context, empty
from studio.ui.run_view import Row, Samples, Words
from studio.units import duration

THUMBNAIL = 256  # pixels
EMPTY = empty(
    "No runs yet",
    "Start one in <b>Train</b>: it shows here, live, as does one of <code>studio train-sd</code> in a terminal.",
)
TABLE_CSS = """
div { max-height: 19rem; overflow: auto; border: 1px solid var(--border-color-primary); border-radius: 8px; }
table { display: table !important; width: 100%; border: 0; border-collapse: collapse; margin: 0; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .6rem; border: 0; border-bottom: 1px solid var(--border-color-primary);
  white-space: nowrap; color: var(--body-text-color); }
th { position: sticky; top: 0; background: var(--background-fill-secondary); z-index: 1; }
td:nth-child(n+3), th:nth-child(n+3) { text-align: right; font-variant-numeric: tabular-nums; }
td:first-child { width: 100%; white-space: normal; min-width: 8.5rem; }
tr { border: 0; }
tr.chosen td { background: color-mix(in srgb, var(--color-accent) 16%, transparent); }
button { display: block; width: 100%; text-align: left; padding: .15rem 0; background: none; border: 0; font: inherit;
  font-weight: 600; color: var(--body-text-color); cursor: pointer; overflow-wrap: anywhere; }
button:hover { text-decoration: underline; }
small { color: var(--body-text-color-subdued); font-weight: 400; }
@media (max-width: 600px) { th, td { padding: .3rem .35rem; font-size: .8rem; } td:first-child { min-width: 5.5rem; } }
"""
TABLE_JS = """
element.addEventListener('click', (event) => {
  const row = event.target.closest('tr[data-id]');
  if (row) trigger('choose', {id: row.dataset.id});
});
"""
STATE_CSS = """
h3 { margin: .2rem 0; overflow-wrap: anywhere; }
p { margin: .3rem 0; overflow-wrap: anywhere; }
.track { margin: .5rem 0; }
pre.log { display: flex; flex-direction: column-reverse; max-height: 8rem; margin: .3rem 0; }
"""
SAMPLES_CSS = """
div { overflow-x: auto; }
table { display: table !important; width: auto; border: 0; border-collapse: collapse; margin: 0; }
th, td { border: 0; padding: 2px 8px 2px 0; text-align: left; font-weight: 400; font-size: .85rem; vertical-align: top;
  color: var(--body-text-color); }
th[colspan] { font-weight: 600; padding-top: .5rem; }
th[colspan] span { position: sticky; left: 0; }
tr, thead { border: 0; }
img { display: block; width: 128px; height: 128px; margin: 0 !important; object-fit: contain; border-radius: 6px;
  background: var(--background-fill-secondary); }
@media (max-width: 600px) { img { width: 88px; height: 88px; } }
"""
COLUMNS_CSS = """
div { overflow-x: auto; }
table { display: table !important; border-collapse: collapse; margin: 0; }
th, td { text-align: left; padding: .3rem .6rem; border: 1px solid var(--border-color-primary); font-size: .9rem;
  color: var(--body-text-color); overflow-wrap: normal; min-width: 6rem; }
th[scope=row] { white-space: nowrap; }
"""


def table_html(rows: Sequence[Row], chosen: str) -> str:
    """The list, its titles buttons."""
    if not rows:
        return EMPTY
    lines = "".join(_line(row, row.id == chosen) for row in rows)
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("Run", "State", "Step", "Left", "Loss"))
    return f"<div><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"


def _line(row: Row, chosen: bool) -> str:
    status = row.status
    state = f"{status.state} ({row.ahead + 1})" if row.ahead is not None else status.state
    left = duration(status.eta_s) if status.eta_s else ""
    loss = f"{status.loss:.4f}" if status.loss is not None else ""
    step = f"{status.step}/{status.total}" if status.total else ""
    cells = "".join(f"<td>{cell}</td>" for cell in (state, step, left, loss))
    mark = ' class="chosen" aria-selected="true"' if chosen else ""
    kind = "" if row.trains else f"{row.kind}, "
    about = f"<small>{escape(kind)}{_when(row.id)}</small>"
    title = f"<button>{escape(row.title)}<br>{about}</button>"
    return f'<tr data-id="{escape(row.id)}" data-state="{status.state}"{mark}><td>{title}</td>{cells}</tr>'


def _when(id: str) -> str:
    """ "2026-11-24 16:09", from a folder's name that begins with it."""
    day, time = id[:8], id[9:13]
    known = day.isdigit() and time.isdigit()
    return f"{day[:4]}-{day[4:6]}-{day[6:]} {time[:2]}:{time[2:]}" if known else ""


def state_html(row: Row, words: Words, rates: Mapping[str, float], log: Sequence[str]) -> str:
    """A run's title, what it does or why it ended, its bar and figures."""
    status = row.status
    share = min(status.step / status.total, 1) if status.total else 0
    bar = (
        f'<div class="track" role="progressbar" aria-label="Steps done" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{100 * share:.0f}"><div style="width:{share:.1%}"></div></div>'
    )
    facts = {"Step": f"{status.step} of {status.total}" if status.total else ""}
    facts["Loss"] = f"{status.loss:.4f}" if status.loss is not None else ""
    facts["Learning rate"] = ", ".join(_rate(name, value) for name, value in rates.items())
    facts["Folder"] = escape(f"{row.folder.parent.name}/{row.id}")
    figures = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items() if value)
    return (
        f'<h3 id="runs-title">{escape(row.title)}</h3>{_words(row, words, log)}{bar if status.total else ""}'
        f'<dl class="facts">{figures}</dl>'
    )


def _words(row: Row, words: Words, log: Sequence[str]) -> str:
    state = row.status.state
    detail = escape(words.detail).replace("\n", "<br>")
    head = f'<p id="runs-state" data-state="{state}"><b>{words.headline}</b>{": " if detail else ""}{detail}</p>'
    next_step = f'<p id="runs-next">{escape(words.next_step)}</p>' if words.next_step else ""
    if state not in ("failed", "crashed"):
        return f'<div class="{"good" if state == "finished" else ""}">{head}{next_step}</div>'
    lines = escape("\n".join(log[-10:]))
    told = f'<pre class="log" aria-label="End of the log" tabindex="0">{lines}</pre>' if lines else ""
    return f'<div class="problem">{head}{told}{next_step}</div>'


def _rate(name: str, value: float) -> str:
    return f"{value:.3g}" if name == "lr" else f"{value:.3g} ({escape(name)})"


def samples_html(context: Context, found: Samples) -> str:
    """Rows by prompt, columns by step."""
    steps = found.spread()
    heads = ["before" if step == 0 else f"step {step}" for step in steps]
    rows = [
        (prompt, [_at(found.pictures[step], place) for step in steps]) for place, prompt in enumerate(found.prompts)
    ]
    return pictures_html(context, heads, rows)


def _at(pictures: Sequence[Path], place: int) -> Path | None:
    return pictures[place] if place < len(pictures) else None


def pictures_html(context: Context, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Path | None]]]) -> str:
    """Pictures under their headings, a line with a prompt above each row of them."""
    if not rows or not heads:
        return ""
    lines = []
    for prompt, pictures in rows:
        cells = "".join(_cell(context, one, f"{prompt}, {head}") for one, head in zip(pictures, heads, strict=True))
        lines.append(f'<tr><th colspan="{len(heads)}"><span>{escape(prompt)}</span></th></tr><tr>{cells}</tr>')
    titles = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return f'<div tabindex="0"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cell(context: Context, picture: Path | None, caption: str) -> str:
    if picture is None:
        return "<td>none</td>"
    return f"<td>{context.picture(picture, caption, THUMBNAIL)}</td>"


def differences_html(heads: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> str:
    """A table of settings that differ, a column for each run."""
    if not rows:
        return '<p id="runs-same">Their settings are the same.</p>'
    titles = "".join(f'<th scope="col">{escape(head)}</th>' for head in ("Setting", *heads))
    lines = "".join(
        f'<tr><th scope="row">{escape(key)}</th>{"".join(f"<td>{_setting(value)}</td>" for value in values)}</tr>'
        for key, values in rows.items()
    )
    return f'<div tabindex="0"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def _setting(value: Any) -> str:
    if value in (None, "", [], {}):
        return "not set"
    return escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def log_html(view: RunView) -> str:
    """The end of a log."""
    lines = escape("\n".join(view.log_tail)) or "nothing yet"
    return f'<pre class="log" tabindex="0" aria-label="Log">{lines}</pre>'
