"""The dataset half of the train screen: pictures come in, captions are edited, the clinic finds and mends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from studio.config import DEMO_PROMPTS
from studio.data import collection
from studio.data.caption_edits import EDITS, edited, put_first, replace, tag_counts
from studio.errors import StudioError
from studio.ui import train_html as html
from studio.ui import train_pictures as pictures
from studio.ui.context import PRIVATE, Context, empty

QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}
NEW = ("New dataset", "")
UPLOAD_FIRST = empty("No pictures yet", "Drop your pictures above, or take the demo's.")


@contextmanager
def told() -> Iterator[None]:
    """Shows a problem that the user can mend as a message on the page."""
    try:
        yield
    except (StudioError, OSError) as problem:
        raise gr.Error(str(problem), print_exception=False) from problem


def choices(context: Context, dataset: str) -> Any:
    """The list of datasets, with this one chosen where it is there."""
    known = pictures.names(context.workspace)
    return gr.update(choices=[NEW, *known], value=dataset if dataset in known else "")


@dataclass
class Sources:
    """Where pictures come from. `buckets` are the settings' fields of resolution, step and largest aspect, `prompts`
    that of the sample prompts."""

    context: Context
    buckets: Sequence[Any]
    prompts: Any

    def __post_init__(self) -> None:
        with gr.Row():
            self.choice = gr.Dropdown(
                [NEW, *pictures.names(self.context.workspace)],
                value="",
                label="Pictures",
                elem_id="train-dataset",
                info="A dataset of this workspace, or a new one.",
            )
            self.name = gr.Textbox(
                label="Name", elem_id="train-name", info="Of the dataset and of the adapter's file.", max_length=80
            )
            self.trigger = gr.Textbox(
                label="Trigger word",
                elem_id="train-trigger",
                info="A rare word that calls what was learnt, such as zkw. A style can do without.",
                max_length=60,
            )
        self.upload = gr.File(
            label="Pictures, and .txt captions of the same names",
            file_count="multiple",
            elem_id="train-upload",
            height=150,
        )
        self.demo = gr.Button("No pictures at hand? Take the demo's 32", elem_id="train-demo", size="sm")
        with gr.Accordion("A folder on this computer", open=False, visible=False, elem_id="train-folder-box") as box:
            self.folder = gr.Textbox(
                label="Folder", elem_id="train-folder", info="It is copied into the workspace and stays as it is."
            )
            self.take = gr.Button("Take its pictures", elem_id="train-folder-take", size="sm")
        self.status = gr.HTML(elem_id="train-upload-status", css_template=html.NOTE_CSS)
        self.context.page.load(self._on_load, None, box, **QUIET)

    def changes(self) -> list[Any]:
        """The events after which another dataset is chosen, or the chosen one has changed."""
        chosen = [self.choice, self.name, self.status]
        return [
            self.upload.upload(
                self._on_upload, [self.upload, self.choice, self.name], [self.upload, *chosen], **PRIVATE
            ),
            self.demo.click(self._on_demo, None, [*chosen, self.prompts], **PRIVATE),
            self.take.click(self._on_folder, [self.folder, self.name], chosen, **PRIVATE),
            self.choice.input(lambda dataset: (dataset, ""), self.choice, [self.name, self.status], **QUIET),
        ]

    def _chosen(self, dataset: str, name: str, note: str) -> list[Any]:
        return [choices(self.context, dataset), name, f"<p>{note}</p>"]

    def _on_load(self, request: gr.Request) -> Any:
        return gr.update(visible=pictures.is_local(request))

    def _on_upload(self, files: list[str] | None, dataset: str, name: str) -> list[Any]:
        with told():
            made, note = pictures.take_files(self.context.workspace, files or [], dataset, name)
        return [None, *self._chosen(made, name or made, note)]

    def _on_demo(self) -> list[Any]:
        with told():
            made = pictures.take_demo(self.context.workspace)
        note = "The demo's pictures share a style of drawing. The sample prompts ask for things that they don't show."
        return [*self._chosen(made, made, note), "\n".join(DEMO_PROMPTS)]

    def _on_folder(self, folder: str, name: str, request: gr.Request) -> list[Any]:
        if not pictures.is_local(request):
            raise gr.Error("Only a browser on the computer that runs the studio may name its folders")
        with told():
            made = pictures.take_folder(self.context.workspace, Path(folder.strip()), name)
        return self._chosen(made, name or made, "Copied; the folder stays as it is.")


@dataclass
class Dataset:
    """The chosen dataset: its captions, the edits of all of them, and the clinic."""

    sources: Sources

    def __post_init__(self) -> None:
        self.workspace = self.sources.context.workspace

        def save_caption(given: list[str]) -> str:  # Gradio marks it, which a method does not let it
            return pictures.save_caption(self.workspace, given)

        self.count = gr.HTML(elem_id="train-count", css_template=html.NOTE_CSS)
        self.grid = gr.HTML(
            UPLOAD_FIRST,
            elem_id="train-captions",
            css_template=html.CAPTIONS_CSS,
            js_on_load=html.CAPTIONS_JS,
            server_functions=[save_caption],
        )
        with gr.Column(visible=False, elem_id="train-tools") as self.tools:
            with gr.Accordion("Change many captions at once", open=False, elem_id="train-bulk"):
                self._bulk()
            with gr.Accordion("Check-up of the pictures", elem_id="train-clinic"):
                self.findings = gr.HTML(
                    elem_id="train-findings", css_template=html.FINDINGS_CSS, js_on_load=html.FINDINGS_JS
                )
                with gr.Row():
                    self.again = gr.Button("Look again", elem_id="train-examine", size="sm")
                    self.back = gr.Button("Put back", visible=False, elem_id="train-put-back", size="sm")
            with gr.Accordion("How each picture is cropped", open=False, elem_id="train-crops-box"):
                self.crops = gr.HTML(elem_id="train-crops", css_template=html.CROPS_CSS)
        for event in [*self.sources.changes(), *self._changes()]:
            self.show_after(event)

    def _bulk(self) -> None:
        with gr.Row():
            self.edit = gr.Dropdown(list(EDITS), value=next(iter(EDITS)), label="Change", elem_id="train-edit")
            self.text = gr.Textbox(label="Text", elem_id="train-edit-text")
            self.other = gr.Textbox(label="Replace it by", visible=False, elem_id="train-edit-other")
        with gr.Row():
            self.do = gr.Button("Change all captions", elem_id="train-edit-apply", size="sm")
            self.undo = gr.Button("Undo the last change", elem_id="train-edit-undo", size="sm")
        self.before = gr.State({})  # picture -> caption before the last change
        self.note = gr.HTML(elem_id="train-edit-note", css_template=html.NOTE_CSS)
        gr.Markdown("Tags, and how many captions have them")
        self.tags = gr.HTML(elem_id="train-tags", css_template=html.TAGS_CSS)

    def _changes(self) -> list[Any]:
        """The events that change the dataset on disk, or what the clinic looks for."""
        choice, trigger = self.sources.choice, self.sources.trigger
        self.edit.change(lambda edit: gr.update(visible=EDITS[edit] is replace), self.edit, self.other, **QUIET)
        trigger.change(self._on_trigger, [trigger, self.edit], self.text, **QUIET)
        return [
            self.grid.leave(self._on_leave, choice, None, **QUIET),
            self.do.click(self._on_edit, [choice, self.edit, self.text, self.other], [self.before, self.note], **QUIET),
            self.undo.click(self._on_undo, [choice, self.before], [self.before, self.note], **QUIET),
            self.findings.fix(self._on_fix, [choice, trigger, *self.sources.buckets], None, **QUIET),
            self.back.click(self._on_back, choice, None, **QUIET),
            self.again.click(lambda: None, None, None, **QUIET),
            trigger.blur(lambda: None, None, None, **QUIET),
        ]

    def show_after(self, event: Any) -> None:
        """Shows the dataset anew when an event is over: captions at once, then what the clinic finds."""
        sources = self.sources
        shown = event.then(self._captions, sources.choice, [self.count, self.grid, self.tags, self.tools], **QUIET)
        examined = [self.findings, self.crops, self.back]
        shown.then(self._examination, [sources.choice, sources.trigger, *sources.buckets], examined, **QUIET)

    def _captions(self, dataset: str | None) -> list[Any]:
        hidden = gr.update(visible=False)
        try:
            folder = pictures.folder_of(self.workspace, dataset) if dataset else None
            texts = collection.captions(folder) if folder else {}
        except StudioError as problem:
            return ["", html.problem_html(problem), "", hidden]
        if not folder or not (texts or collection.left_out(folder)):
            return ["", UPLOAD_FIRST, "", hidden]
        missing = sum(not text for text in texts.values())
        count = f"<p>{len(texts)} pictures, {f'{missing} without a caption' if missing else 'all with captions'}</p>"
        tags = html.tags_html(tag_counts(texts.values()))
        return [count, html.captions_html(self.sources.context, folder, texts), tags, gr.update(visible=True)]

    def _examination(self, dataset: str | None, trigger: str, *buckets: Any) -> list[Any]:
        from studio.data.clinic import examine

        if not dataset:
            return ["", "", gr.update(visible=False)]
        context = self.sources.context
        try:
            folder = pictures.folder_of(self.workspace, dataset)
            found = examine(folder, pictures.data_config(*buckets), trigger)
        except StudioError as problem:
            return [html.problem_html(problem), "", gr.update()]
        out = collection.left_out(folder)
        return [
            html.findings_html(context, folder, found.findings, found.pictures),
            html.crops_html(context, folder, found.crops),
            gr.update(visible=bool(out), value=f"Put back the {len(out)} left out"),
        ]

    # -- what is done to it -----------------------------------------------------------------------

    def _on_trigger(self, trigger: str, edit: str) -> Any:
        return trigger if EDITS[edit] is put_first else gr.skip()

    def _on_leave(self, event: gr.EventData, dataset: str) -> None:
        with told():
            collection.leave_out(pictures.folder_of(self.workspace, dataset), [event.name])

    def _on_edit(self, dataset: str, edit: str, text: str, other: str) -> tuple[dict[str, str], str]:
        with told():
            folder = pictures.folder_of(self.workspace, dataset)
            old = collection.captions(folder)
            new = edited(old, EDITS[edit], text, other)
            collection.write_captions(folder, new)
        return {name: old[name] for name in new}, f"<p>{len(new)} captions changed.</p>"

    def _on_undo(self, dataset: str, before: dict[str, str]) -> tuple[dict[str, str], str]:
        with told():
            folder = pictures.folder_of(self.workspace, dataset)
            there = collection.captions(folder)
            collection.write_captions(folder, {name: text for name, text in before.items() if name in there})
        return {}, f"<p>{len(before)} captions are as they were.</p>"

    def _on_fix(self, event: gr.EventData, dataset: str, trigger: str, *buckets: Any) -> None:
        with told():
            folder = pictures.folder_of(self.workspace, dataset)
            pictures.fix(folder, str(event.kind), pictures.data_config(*buckets), trigger)

    def _on_back(self, dataset: str) -> None:
        with told():
            pictures.put_all_back(pictures.folder_of(self.workspace, dataset))
