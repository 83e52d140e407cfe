"""The app's screens. A new one is its file and one line in `TABS`."""

from __future__ import annotations

from typing import Any

TABS = ("train", "runs", "generate", "blend", "library")
"""Modules of this package with a `TITLE`, `build(context)` and, where it sets components of others, `wire(context)`."""


def blocks(workspace: Any) -> Any:
    """The page of a workspace."""
    from importlib import import_module

    import gradio as gr

    from studio.ui.context import Context

    context = Context(workspace)
    modules = [import_module(f"studio.ui.{name}") for name in TABS]
    with gr.Blocks(title="Adapter studio", analytics_enabled=False, delete_cache=(3600, 86400)) as context.page:
        gr.Markdown("# Adapter studio")
        with gr.Tabs(elem_id="tabs") as context.tabs:
            for name, module in zip(TABS, modules, strict=True):
                with gr.Tab(module.TITLE, id=name, elem_id=f"tab-{name}"):
                    module.build(context)
        for module in modules:
            if hasattr(module, "wire"):
                module.wire(context)
    return context.page
