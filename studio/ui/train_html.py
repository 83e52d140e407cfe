"""The train screen's own pieces of HTML: captions to edit, crops, findings, and the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from studio.data.clinic import Crop, Finding
from studio.ui.context import Context

THUMBNAIL = 240  # pixels
TAGS = 60  # different tags that are shown

NOTE_CSS = "p { color: var(--body-text-color-subdued); margin: .2rem 0; }"
CAPTIONS_CSS = """
.captions { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 10px;
  max-height: 560px; overflow-y: auto; padding: 2px; }
article { display: grid; grid-template-columns: 84px minmax(0, 1fr) 32px; gap: 8px; padding: 6px;
  border: 1px solid var(--border-color-primary); border-radius: 8px; }
img { width: 84px; height: 84px; object-fit: contain; border-radius: 4px;
  background: var(--background-fill-secondary); }
label { font-size: .8rem; overflow-wrap: anywhere; color: var(--body-text-color-subdued); }
textarea { display: block; width: 100%; min-height: 56px; resize: vertical; padding: 4px 6px; border-radius: 4px;
  font-size: .9rem; color: var(--body-text-color); background: var(--input-background-fill);
  border: 1px solid var(--border-color-primary); }
.saved textarea { border-color: #15803d; }
.failed textarea { border-color: #b42318; }
button { width: 32px; height: 32px; padding: 0; cursor: pointer; border-radius: 6px;
  border: 1px solid var(--border-color-primary);
  color: var(--body-text-color); background: var(--button-secondary-background-fill); }
"""
FINDINGS_CSS = """
.findings > div { border-left: 4px solid #b45309; padding: .4rem .8rem; margin-bottom: .8rem; }
.few { display: grid; grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)); gap: 8px; }
figure { margin: 0; font-size: .78rem; overflow-wrap: anywhere; }
img { width: 100%; height: 84px; object-fit: contain; }
button { padding: .3rem .8rem; margin-top: .4rem; border: 1px solid var(--border-color-primary); border-radius: 6px;
  cursor: pointer; color: var(--body-text-color); background: var(--button-secondary-background-fill); }
"""
CROPS_CSS = """
.crops { display: grid; grid-template-columns: repeat(auto-fill, minmax(124px, 1fr)); gap: 8px; max-height: 420px;
  overflow-y: auto; align-items: start; }
figure { margin: 0; font-size: .78rem; }
.picture { position: relative; overflow: hidden; border-radius: 4px; }
img { width: 100%; display: block; }
.frame { position: absolute; outline: 2px solid #fff; box-shadow: 0 0 0 999px rgb(0 0 0 / .6), inset 0 0 0 1px #000; }
"""
TAGS_CSS = """
.chips { display: flex; flex-wrap: wrap; gap: 6px; }
span { padding: .1rem .5rem; border-radius: 999px; border: 1px solid var(--border-color-primary); }
"""
CAPTIONS_JS = """
const unsaved = new Map();  // picture -> {set, text, timer}
const rowOf = (name) => element.querySelector(`article[data-name="${CSS.escape(name)}"]`);
const mark = (name, state, title) => {
  const row = rowOf(name);
  if (!row) return;
  row.classList.remove('saved', 'failed');
  if (state) row.classList.add(state);
  row.title = title;
};
const save = async (name) => {
  const {set, text} = unsaved.get(name);
  let problem;
  try {
    problem = await server.save_caption([set, name, text]);
  } catch (error) {
    problem = 'not saved: the studio does not answer';
  }
  if (!problem && unsaved.get(name)?.text === text) unsaved.delete(name);
  mark(name, problem ? 'failed' : 'saved', problem || 'saved');
};
element.addEventListener('input', (event) => {
  const {set, name} = event.target.closest('article').dataset;
  clearTimeout(unsaved.get(name)?.timer);
  unsaved.set(name, {set, text: event.target.value, timer: setTimeout(() => save(name), 400)});
});
element.addEventListener('click', (event) => {
  if (event.target.matches('button')) trigger('leave', {name: event.target.closest('article').dataset.name});
});
watch('value', () => element.querySelectorAll('article').forEach((row) => {
  const {set, name} = row.dataset, typed = unsaved.get(name), box = row.querySelector('textarea');
  box.value = typed?.set === set ? typed.text : box.defaultValue;
  mark(name, '', '');
}));
"""
"""Saves a caption while it is typed. The page keeps its boxes when the captions in them are replaced, typed text
included, hence the last rule."""

FINDINGS_JS = """
element.addEventListener('click', (event) => {
  if (event.target.matches('button')) trigger('fix', {kind: event.target.dataset.kind});
});
"""


def captions_html(context: Context, dataset: Path, captions: Mapping[str, str]) -> str:
    """A thumbnail, a box and a button for each picture."""
    rows = (
        f'<article data-set="{escape(dataset.name)}" data-name="{escape(name)}">'
        f'<a href="{context.url(dataset / name)}" target="_blank">{_image(context, dataset / name)}</a>'
        f'<label>{escape(name)}<textarea rows="2" placeholder="What does it show?">{escape(caption)}</textarea></label>'
        f'<button title="Leave out" aria-label="Leave out {escape(name)}">✕</button></article>'
        for name, caption in captions.items()
    )
    return f'<div class="captions">{"".join(rows)}</div>'


def tags_html(counts: Sequence[tuple[str, int]]) -> str:
    """Tags with how many captions have them."""
    chips = (f"<span>{escape(tag)} <b>{count}</b></span>" for tag, count in counts[:TAGS])
    more = f"<span>and {len(counts) - TAGS} more</span>" if len(counts) > TAGS else ""
    return f'<div class="chips">{"".join(chips)}{more}</div>'


def findings_html(context: Context, dataset: Path, findings: Iterable[Finding], pictures: int) -> str:
    """Each finding with its pictures and the button that fixes it."""
    parts = [_finding(context, dataset, finding) for finding in findings]
    if not parts:
        return f'<div class="good">{pictures} pictures looked at: nothing is wrong with them.</div>'
    return f'<div class="findings">{"".join(parts)}</div>'


def _finding(context: Context, dataset: Path, finding: Finding) -> str:
    few = "".join(
        f"<figure>{_image(context, dataset / name)}<figcaption>{escape(name)}</figcaption></figure>"
        for name in finding.pictures[:12]
    )
    more = f"<p>and {len(finding.pictures) - 12} more</p>" if len(finding.pictures) > 12 else ""
    label = f"Leave out {len(finding.leave_out)}" if finding.leave_out else f"Write {len(finding.captions)} captions"
    button = f'<button data-kind="{finding.kind}">{label}</button>' if finding.leave_out or finding.captions else ""
    words = f"<b>{escape(finding.title)}</b><p>{escape(finding.advice)}</p>"
    return f'<div>{words}<div class="few">{few}</div>{more}{button}</div>'


def crops_html(context: Context, dataset: Path, crops: Iterable[Crop]) -> str:
    """Every picture with the frame of what its bucket keeps."""
    figures = []
    for crop in crops:
        left, top, width, height = (f"{100 * part:.2f}%" for part in crop.frame)
        scaled = f"enlarged {crop.enlarged:.1f} times, " if crop.enlarged > 1 else ""
        figures.append(
            f'<figure><div class="picture">{_image(context, dataset / crop.name)}'
            f'<div class="frame" style="left:{left};top:{top};width:{width};height:{height}"></div></div>'
            f"<figcaption>{crop.bucket[0]}x{crop.bucket[1]}, {scaled}{1 - crop.kept:.0%} cut off</figcaption></figure>"
        )
    return f'<div class="crops">{"".join(figures)}</div>'


def _image(context: Context, place: Path) -> str:
    return f'<img src="{context.url(place, THUMBNAIL)}" alt="{escape(place.stem)}" loading="lazy">'


def facts_html(facts: Mapping[str, Any]) -> str:
    """Names and what they are; values are HTML."""
    return f'<dl class="facts">{"".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())}</dl>'


def problem_html(problem: object) -> str:
    """What is wrong, as the library says it."""
    return f'<div class="problem">{escape(str(problem)).replace(chr(10), "<br>")}</div>'
