"""The library screen: adapters as tiles, and for the chosen one what it is, where it loads, and what to do with it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from studio.errors import StudioError
from studio.ui import shelf
from studio.ui.adapters import AdapterFile, adapters_of, choices, find
from studio.ui.blend_html import download_html, good_html, problem_html, size_text
from studio.ui.checking import answer, check_html
from studio.ui.context import PRIVATE, Context, empty

TITLE = "Library"
QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}
EMPTY = empty(
    "No adapters yet",
    "Drop .safetensors files above, or train one in Train: what runs make appears here by itself.",
)
ON_CLICK = """
element.addEventListener('click', event => {
  const tile = event.target.closest('[data-key]');
  if (tile) trigger('click', {key: tile.dataset.key});
});
"""

CSS = """
.tile { display: flex; flex-direction: column; gap: 4px; padding: 6px; text-align: left; cursor: pointer;
  font-weight: normal;
  color: var(--body-text-color); background: var(--block-background-fill); overflow-wrap: anywhere;
  border: 2px solid var(--border-color-primary); border-radius: 8px; }
.tile:hover, .tile:focus-visible, .tile[aria-pressed="true"] { border-color: var(--color-accent); }
.tile small { color: var(--body-text-color-subdued); }
.blank { display: grid; place-items: center; aspect-ratio: 1; border-radius: 6px; font-size: .85rem;
  color: var(--body-text-color-subdued); background: var(--background-fill-secondary); }
table.check { border: 0; }
.thumbnail { max-width: 256px; width: 100%; border-radius: 8px; margin: 0 0 .6rem; }
"""


def build(context: Context) -> None:
    """The screen, inside its tab."""
    context.shared["library.screen"] = Screen(context)


def wire(context: Context) -> None:
    """What needs the other screens."""
    context.shared["library.screen"].wire()


class Screen:
    """The components, and what they do."""

    def __init__(self, context: Context) -> None:
        self.context = context
        known = adapters_of(context.workspace)
        with gr.Row():
            self.drop = gr.File(
                label="Drop adapters here (.safetensors)", file_count="multiple", file_types=[".safetensors"],
                height=150, elem_id="library-drop",
            )  # fmt: skip
        self.note = gr.HTML(elem_id="library-note")
        self.tiles = gr.HTML(
            tiles_html(context, known, ""), js_on_load=ON_CLICK, css_template=CSS, elem_id="library-tiles"
        )
        self.file = gr.Dropdown(
            [("none", ""), *choices(known)], value="", label="Adapter", elem_id="library-file",
            info="Choose one here or click its tile.",
        )  # fmt: skip
        with gr.Column(visible=False, elem_id="library-details") as self.details:
            self._details()
        with gr.Row(visible=bool(shelf.deleted(context.workspace))) as self.bin:
            self.undo = gr.Button("Bring back the last deleted", size="sm", elem_id="library-undo")
        self._listen()

    def _details(self) -> None:
        with gr.Row():
            with gr.Column(min_width=300):
                self.facts = gr.HTML(css_template=CSS, elem_id="library-facts")
                self.generate = gr.Button("Generate with it", variant="primary", elem_id="library-generate")
                self.blend = gr.Button("Blend it", elem_id="library-blend")
                self.keep = gr.Button("Keep in the library", visible=False, elem_id="library-keep")
            with gr.Column(min_width=300, visible=False) as self.editor:
                self.title = gr.Textbox(label="Title", elem_id="library-title")
                self.triggers = gr.Textbox(
                    label="Trigger words", elem_id="library-triggers", info="Words that call what it learnt."
                )
                self.description = gr.Textbox(label="Description", lines=3, elem_id="library-description")
                self.licence = gr.Textbox(label="Licence", elem_id="library-licence", placeholder="CC-BY-4.0")
                self.picture = gr.File(
                    label="Thumbnail (a picture)", file_types=["image"], height=140, elem_id="library-thumbnail"
                )
                self.write = gr.Button("Write into the file", elem_id="library-write")
                with gr.Row():
                    self.name = gr.Textbox(label="File name", elem_id="library-name")
                    self.rename = gr.Button("Rename", elem_id="library-rename")
                self.delete = gr.Button("Delete", variant="stop", size="sm", elem_id="library-delete")
        with gr.Accordion("Where it loads", open=True, elem_id="library-loads"):
            self.check = gr.Button("Check all tools", elem_id="library-check")
            self.loads = gr.HTML(css_template=CSS, elem_id="library-check-result")

    @property
    def fields(self) -> list[Any]:
        return [self.title, self.triggers, self.description, self.licence]

    @property
    def whole(self) -> list[Any]:
        """What a change of the folder, or of the choice, changes."""
        chosen = [self.details, self.facts, self.editor, self.keep, *self.fields, self.name, self.picture, self.loads]
        return [self.note, self.tiles, self.file, self.bin, *chosen]

    def _listen(self) -> None:
        gr.on([self.context.page.load, self.context.tabs.change], self.lists, self.file, self.whole[1:4], **QUIET)
        self.tiles.click(self.on_tile, None, self.whole, **QUIET)
        self.file.input(self.choose, self.file, self.whole, **QUIET)
        self.drop.upload(
            self.take, [self.drop, self.file], [self.drop, *self.whole], **PRIVATE, show_progress_on=self.drop
        )
        self.keep.click(self.on_keep, self.file, self.whole, **QUIET)
        self.write.click(self.on_write, [self.file, self.picture, *self.fields], self.whole, **QUIET)
        self.rename.click(self.on_rename, [self.file, self.name], self.whole, **QUIET)
        self.delete.click(self.on_delete, self.file, self.whole, **QUIET)
        self.undo.click(self.on_undo, self.file, self.whole, **QUIET)
        self.check.click(self.on_check, self.file, self.loads, **PRIVATE)

    def wire(self) -> None:
        """Buttons that lead to other screens."""
        tabs, shared = self.context.tabs, self.context.shared
        if rows := shared.get("blend.adapters"):
            self.blend.click(self.on_blend, [self.file, *rows], [tabs, *rows], **QUIET)
        if adapters := shared.get("generate.adapters"):
            outputs = [tabs, adapters, shared["generate.base"], shared["generate.prompt"]]
            self.generate.click(self.on_generate, self.file, outputs, **QUIET)

    # -- what happens ------------------------------------------------------------------------

    def lists(self, key: str) -> list[Any]:
        """Tiles, choices, and whether there is something to bring back."""
        known = adapters_of(self.context.workspace)
        return [
            tiles_html(self.context, known, key),
            gr.update(choices=[("none", ""), *choices(known)], value=key if key in [one.key for one in known] else ""),
            gr.update(visible=bool(shelf.deleted(self.context.workspace))),
        ]

    def on_tile(self, event: gr.EventData) -> list[Any]:
        return self.choose(str(event.key))

    def choose(self, key: str, note: str = "") -> list[Any]:
        """The chosen adapter's details."""
        try:
            one = find(self.context.workspace, key)
        except StudioError as problem:
            hidden: list[Any] = [gr.update(visible=False), *[gr.skip()] * (len(self.whole) - 5)]
            return [note or (problem_html(problem) if key else ""), *self.lists(""), *hidden]
        fields = shelf.describe(one)
        return [
            note,
            *self.lists(key),
            gr.update(visible=True),
            facts_html(self.context, one),
            gr.update(visible=one.in_library and one.path.is_file()),
            gr.update(visible=not one.in_library),
            *[fields[name] for name in ("title", "triggers", "description", "licence")],
            one.path.name.removesuffix(".safetensors"),
            None,
            "",
        ]

    def take(self, uploads: Sequence[str] | None, key: str) -> list[Any]:
        """Dropped files: which came in, and why others did not."""
        notes = []
        for upload in uploads or []:
            try:
                key = shelf.take_file(self.context.workspace, Path(upload)).key
                notes.append(good_html(f"{Path(key).name} came in."))
            except StudioError as problem:
                notes.append(problem_html(problem))
        return [None, *self.choose(key, "".join(notes))]

    def on_keep(self, key: str) -> list[Any]:
        return self._done(key, lambda: shelf.keep(self.context.workspace, key).key, "It is in the library now.")

    def on_write(self, key: str, picture: str | None, *fields: str) -> list[Any]:
        named = dict(zip(("title", "triggers", "description", "licence"), fields, strict=True))

        def write() -> str:
            shelf.edit(self.context.workspace, key, named, Path(picture) if picture else None)
            return key

        return self._done(key, write, "Written into the file; its tensors are untouched.")

    def on_rename(self, key: str, name: str) -> list[Any]:
        return self._done(key, lambda: shelf.rename(self.context.workspace, key, name), "Renamed.")

    def on_delete(self, key: str) -> list[Any]:
        def delete() -> str:
            shelf.delete(self.context.workspace, key)
            return ""

        return self._done(key, delete, "Deleted. The button at the end of the page brings it back.")

    def on_undo(self, key: str) -> list[Any]:
        def undo() -> str:
            return shelf.restore(self.context.workspace, next(iter(shelf.deleted(self.context.workspace)), ""))

        return self._done(key, undo, "It is back.")

    def on_check(self, key: str) -> str:
        try:
            return check_html(answer("check", find(self.context.workspace, key).path))
        except StudioError as problem:
            return problem_html(problem)

    def on_generate(self, key: str) -> list[Any]:
        """The adapter alone, on its own base, and its trigger words as the prompt, where the file names them."""
        from studio.ui import drawing

        one = find(self.context.workspace, key)
        adapters = [drawing.use(self.context.workspace, str(one.path))]
        return [gr.Tabs(selected="generate"), adapters, one.source or gr.skip(), one.triggers or gr.skip()]

    def on_blend(self, key: str, *rows: str) -> list[Any]:
        """Puts it into the first free row of the blend screen, if it is in none."""
        free = next((place for place, row in enumerate(rows) if not row), 0)
        known = [("none", ""), *choices(adapters_of(self.context.workspace))]
        place = None if key in rows else free
        updates = [gr.update(choices=known, value=key) if one == place else gr.skip() for one in range(len(rows))]
        return [gr.Tabs(selected="blend"), *updates]

    def _done(self, key: str, do: Any, note: str) -> list[Any]:
        try:
            return self.choose(do(), good_html(note))
        except StudioError as problem:
            return [problem_html(problem), *[gr.skip()] * (len(self.whole) - 1)]


def tiles_html(context: Context, adapters: Sequence[AdapterFile], chosen: str) -> str:
    """A button for each adapter, with its picture."""
    if not adapters:
        return EMPTY
    return f'<div class="tiles">{"".join(_tile(context, one, one.key == chosen) for one in adapters)}</div>'


def _tile(context: Context, one: AdapterFile, chosen: bool) -> str:
    address = picture_of(context, one)
    picture = f'<img src="{address}" alt="" loading="lazy">' if address else '<span class="blank">no picture</span>'
    facts = f"<small>{escape(one.facts or 'unknown kind')}</small>"
    return (
        f'<button type="button" class="tile" data-key="{escape(one.key, quote=True)}" '
        f'aria-pressed="{str(chosen).lower()}">'
        f"{picture}<b>{escape(one.label)}</b>{facts}</button>"
    )


def picture_of(context: Context, one: AdapterFile) -> str:
    """The address of an adapter's picture: the one beside it, its run's sample, or its metadata's; "" for none."""
    beside = shelf.picture(one)
    return f"{context.url(beside, 256)}&v={beside.stat().st_mtime_ns}" if beside else one.thumbnail


def facts_html(context: Context, one: AdapterFile) -> str:
    """What is known of an adapter, and the link to download it."""
    address = picture_of(context, one)
    facts = {
        "Title": one.title,
        "Base": " ".join(filter(None, (one.base, f"(trained on {Path(one.source).name})" if one.source else ""))),
        "Method": one.method,
        "Rank": one.rank,
        "Trigger words": one.triggers,
        "Licence": one.metadata.get("modelspec.license", ""),
        "Made of": one.metadata.get("modelspec.merged_from", ""),
        "Steps": one.metadata.get("ss_steps", ""),
        "Size": size_text(one.size),
        "Place": one.key,
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value)
    picture = (
        f'<img class="thumbnail" src="{address}" alt="Picture of {escape(one.label, quote=True)}">' if address else ""
    )
    return f'<h3>{escape(one.label)}</h3>{picture}<dl class="facts">{rows}</dl>{download_html(context, one.path)}'
