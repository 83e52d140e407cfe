"""The generate screen's own pieces of HTML: the list of adapters, a job's pictures, grids, and the history."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from studio.jobs.draw import DrawRequest
from studio.ui.context import Context, empty, tiles
from studio.ui.drawing import View

THUMBNAIL = 320  # pixels
EMPTY = empty("No pictures yet", "Write what to draw and press Draw. The built-in base takes a few seconds.")
NO_HISTORY = empty("Nothing drawn yet", "Every picture stays here, with the settings that it was made with.")

ADAPTERS_TEMPLATE = r"""
<div class="uses">${(() => {
  const safe = (text) => String(text).replace(/[&<>"'`]/g, (sign) => `&#${sign.charCodeAt(0)};`);
  const uses = value || [], known = choices.map((one) => one[1]);
  const option = (use, label, key) =>
    `<option value="${safe(key)}" ${key === use.source ? 'selected' : ''}>${safe(label)}</option>`;
  const bar = (row, use, pattern, name) => `<label><span>${safe(name)}</span>
    <input type="range" min="-1" max="2" step="0.05" value="${use.blocks[pattern] ?? 1}" data-row="${row}"
      data-block="${safe(pattern)}"><output>${(use.blocks[pattern] ?? 1).toFixed(2)}</output></label>`;
  return uses.map((use, row) => `<article>
    <div class="line">
      <select id="generate-adapter-${row}" data-row="${row}" data-part="source" aria-label="Adapter ${row + 1}">
        <option value="" ${use.source ? '' : 'selected'}>Choose an adapter</option>
        ${!use.source || known.includes(use.source) ? '' : option(use, use.source, use.source)}
        ${choices.map(([label, key]) => option(use, label, key)).join('')}
      </select>
      <button class="remove" data-row="${row}" aria-label="Remove adapter ${row + 1}" title="Remove">✕</button>
    </div>
    <div class="line">
      <input type="range" id="generate-strength-${row}" min="-1" max="2" step="0.05" value="${use.strength}"
        data-row="${row}" data-part="strength" aria-label="Strength of adapter ${row + 1}">
      <input type="number" id="generate-number-${row}" min="-10" max="10" step="0.05" value="${use.strength}"
        data-row="${row}" data-part="strength" aria-label="Strength of adapter ${row + 1} as a number">
    </div>
    <details id="generate-blocks-${row}" data-row="${row}" ${use.open ? 'open' : ''}>
      <summary>Strength of each block</summary>
      <p>Times the strength above: 1 as it is, 0 leaves the block out.</p>
      <div class="bars">${Object.entries(use.names || use.blocks).map(([pattern, name]) =>
        bar(row, use, pattern, use.names ? name : pattern)).join('')}</div>
    </details>
  </article>`).join('');
})()}</div>
<p class="hint">${(value || []).length ? 'Strength: 1 as it was trained, 0 off, below 0 the opposite.'
  : choices.length ? '' : 'None here yet: train one in Train, or take a .safetensors file with the button below.'}</p>
<button class="add" id="generate-add">Add an adapter</button>
"""
ADAPTERS_CSS = """
.uses { display: grid; grid-template-columns: minmax(0, 1fr); gap: 8px; }
article { padding: 8px 10px; border: 1px solid var(--border-color-primary); border-radius: 8px; }
.line { display: flex; gap: 8px; align-items: center; margin-bottom: 6px; }
select { flex: 1; min-width: 0; }
select, input[type=number] { padding: 6px; border-radius: 6px; color: var(--body-text-color);
  background: var(--input-background-fill); border: 1px solid var(--border-color-primary); }
input[type=range] { flex: 1; min-width: 0; accent-color: var(--color-accent); }
input[type=number] { width: 5.2rem; }
.remove { width: 32px; height: 32px; flex: none; padding: 0; font-size: 1rem; line-height: 1; }
.add { padding: .35rem .9rem; }
button { border: 1px solid var(--border-color-primary); border-radius: 6px; cursor: pointer;
  color: var(--body-text-color); background: var(--button-secondary-background-fill); }
summary { cursor: pointer; font-size: .9rem; }
details p, .hint { font-size: .85rem; margin: .3rem 0; color: var(--body-text-color-subdued); }
.bars { display: grid; gap: 2px 14px; grid-template-columns: repeat(auto-fill, minmax(min(220px, 100%), 1fr)); }
label { display: flex; gap: 8px; align-items: center; font-size: .85rem; }
label span { width: 6.5rem; overflow-wrap: anywhere; }
output { width: 2.6rem; text-align: right; font-variant-numeric: tabular-nums; }
"""
ADAPTERS_JS = """
const uses = () => props.value || [];
const put = (list) => { props.value = list; trigger('change'); requestAnimationFrame(show); };
const change = (row, own) => put(uses().map((use, place) => (place === row ? {...use, ...own} : use)));
const show = () => element.querySelectorAll('[data-row]').forEach((part) => {
  const use = uses()[+part.dataset.row];
  if (!use || part === document.activeElement && part.type === 'number') return;
  if (part.dataset.block) part.value = use.blocks[part.dataset.block] ?? 1;
  else if (part.dataset.part) part.value = use[part.dataset.part];
});
const name = async (row) => {
  const {source, open, names} = uses()[row] || {};
  if (!source || !open || names) return;
  const found = await server.names_of_blocks(source);
  if (uses()[row]?.source === source) change(row, {names: found});
};
element.addEventListener('input', ({target}) => {
  const row = +target.dataset.row, number = Number(target.value);
  if (target.dataset.block) change(row, {blocks: {...uses()[row].blocks, [target.dataset.block]: number}});
  else if (target.dataset.part === 'source') {
    change(row, {source: target.value, blocks: {}, names: null});
    name(row);
  } else if (target.dataset.part && target.value !== '') change(row, {strength: number});
});
element.addEventListener('click', ({target}) => {
  const unused = props.choices.map((one) => one[1]).find((key) => !uses().some((use) => use.source === key));
  if (target.matches('.add')) put([...uses(), {source: unused || '', strength: 1, blocks: {}}]);
  if (target.matches('.remove')) put(uses().filter((_, place) => place !== +target.dataset.row));
});
element.addEventListener('toggle', ({target}) => {
  const row = +target.dataset.row;
  if (!uses()[row] || !!uses()[row].open === target.open) return;
  change(row, {open: target.open});
  name(row);
}, true);
watch('value', () => {
  show();
  uses().forEach((_, row) => name(row));
});
"""
"""The value is the list of adapters itself, so that it goes wherever a value goes. The page keeps what was typed into
its boxes when it draws them anew, hence `show`; blocks are named when somebody looks at them."""

HISTORY_CSS = """
figure button { padding: 0; border: 0; background: none; cursor: pointer; width: 100%; display: block; }
figure a { text-decoration: underline; }
figcaption { display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden; }
"""
HISTORY_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button) trigger('restore', {name: button.dataset.name});
});
"""
GRID_CSS = """
table { border-collapse: separate; border-spacing: 4px; border: 0; margin: 0; }
th { font-weight: 600; font-size: .85rem; text-align: left; max-width: 11rem; overflow-wrap: anywhere; padding: 2px 6px;
  color: var(--body-text-color); background: none; border: 0; }
td { padding: 0; border: 0; background: var(--background-fill-secondary); }
td a { display: block; }
td img, td .waits { width: 128px; height: 128px; max-width: none; margin: 0 !important; }
td img { display: block; object-fit: contain; }
td .waits { display: grid; place-items: center; color: var(--body-text-color-subdued); }
"""


def pictures_html(context: Context, view: View) -> str:
    """The pictures of a job that are there."""
    differ = any(asked.adapters for asked in view.requests)
    shown = [
        (context.url(file, THUMBNAIL), context.url(file), f"seed {asked.seed}{_without(asked, differ)}")
        for file, asked in zip(view.pictures, view.requests, strict=True)
        if file
    ]
    return tiles(shown) if shown else ""


def _without(asked: DrawRequest, differ: bool) -> str:
    return ", the base alone" if differ and not asked.adapters else ""


def grid_html(context: Context, view: View, rows: Sequence[str], columns: Sequence[str]) -> str:
    """A labelled table, with a sign where a picture is still to come."""
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in columns)
    body = []
    for place, label in enumerate(rows):
        files = view.pictures[place * len(columns) : (place + 1) * len(columns)]
        cells = "".join(_cell(context, file, f"{label} {name}") for file, name in zip(files, columns, strict=False))
        body.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _cell(context: Context, file: Path | None, label: str) -> str:
    if file is None:
        return '<td><div class="waits" aria-label="not drawn yet">…</div></td>'
    return f"<td>{context.picture(file, label.strip(), THUMBNAIL)}</td>"


def history_html(context: Context, pictures: Iterable[tuple[Path, str]]) -> str:
    """Pictures to click on, with what they tell."""
    figures = [
        f'<figure><button data-name="{escape(file.name)}" title="Use its settings">'
        f'<img src="{context.url(file, THUMBNAIL)}" alt="{escape(told)}" loading="lazy"></button>'
        f'<figcaption>{escape(told)}</figcaption><a href="{context.url(file)}" target="_blank">open</a></figure>'
        for file, told in pictures
    ]
    return f'<div class="tiles">{"".join(figures)}</div>' if figures else NO_HISTORY


def progress_html(view: View) -> str:
    """How far a job is; nothing once all is drawn."""
    count = f"{view.done} of {len(view.pictures)} pictures"
    if view.state == "finished":
        return f"<p>{count}, done.</p>"
    if view.state == "queued":
        return f"<p>Waiting: {view.before or 'no'} job{'s' * (view.before != 1)} before it.</p>"
    if view.over:
        kind = "problem" if view.state in ("failed", "crashed") else "note"
        message = view.message.removeprefix("ConfigError: ")
        return (
            f'<div class="{kind}">{count}. {view.state.capitalize()}{f": {escape(message)}" if message else "."}</div>'
        )
    words = "Stopping" if view.state == "stopping" else "Drawing"
    track = f'<div class="track"><div style="width:{view.share:.0%}"></div></div>'
    loading = f", {escape(view.message)}" if not view.share else ""
    return f"<p>{words}: {count}, {view.share:.0%}{loading}</p>{track}"


def problem_html(problem: object) -> str:
    """What is wrong, as the library says it."""
    return f'<div class="problem">{escape(str(problem)).replace(chr(10), "<br>")}</div>'


def notes_html(notes: Sequence[str]) -> str:
    """What of a picture's settings could not be had."""
    if not notes:
        return '<div class="good">Its settings are in the fields.</div>'
    return f'<div class="problem">{escape("; ".join(notes).capitalize())}. The rest is in the fields.</div>'
