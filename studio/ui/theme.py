"""How the app looks: one theme, fonts of the system, colours that are readable in light and dark."""

from __future__ import annotations

from typing import Any

CSS = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: auto; }
.html-container { padding: 2px 0 !important; }
.block:has(> .html-container > .prose:empty) { display: none; }
.fields > .form { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%), 1fr));
  background: var(--block-background-fill); }
.empty { padding: 2rem 1rem; text-align: center; border: 1px dashed var(--border-color-primary); border-radius: 8px; }
.empty h3 { margin: 0 0 .4rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 10px; }
.tiles figure { margin: 0; }
.tiles figure a { display: block; }
.tiles img { width: 100%; margin: 0 !important; aspect-ratio: 1; object-fit: contain; border-radius: 6px;
  background: var(--background-fill-secondary); }
.tiles figcaption { margin: 4px 0 0; font-size: .85rem; overflow-wrap: anywhere; color: var(--body-text-color); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .9rem; margin: 0; }
.facts dt { color: var(--body-text-color-subdued); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.track { height: 10px; border-radius: 5px; background: var(--background-fill-secondary); overflow: hidden; }
.track > div { height: 100%; background: var(--color-accent); }
.problem { border-left: 4px solid #b42318; padding: .4rem .8rem; }
.good { border-left: 4px solid #15803d; padding: .4rem .8rem; }
pre.log { max-height: 16rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; }
table { display: block; overflow-x: auto; max-width: 100%; }
button[role=tab].selected { color: var(--primary-700) !important; }
.dark button[role=tab].selected { color: var(--primary-300) !important; }
@media (min-width: 900px) { .beside { position: sticky; top: 12px; align-self: flex-start; } }
@media (max-width: 600px) { .tiles { grid-template-columns: repeat(2, 1fr); } .beside { order: -1; } }
"""


def theme() -> Any:
    """A Gradio theme that needs no font from anywhere; text on buttons and hints has a contrast above 4.5."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="white",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        link_text_color_dark="*primary_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )
