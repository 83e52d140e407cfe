"""What the tabs share: the workspace, and the components that one tab may set in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any
from urllib.parse import quote

from studio.workspace import Workspace

PRIVATE = {"api_visibility": "private"}
"""Options of an event that belongs to the page: it is no public endpoint."""


@dataclass
class Context:
    """`page` is the Blocks, `tabs` the row of tabs, chosen by the module's name ("runs"); `shared` holds components
    under names such as "generate.adapters", put there by `build` and read by `wire`, when all tabs are built."""

    workspace: Workspace
    page: Any = None
    tabs: Any = None
    shared: dict[str, Any] = field(default_factory=dict)

    def url(self, place: Any, width: int | None = None) -> str:
        """The address of a file of the workspace, as a picture of at most `width` pixels where given."""
        relative = quote(str(place.relative_to(self.workspace.root)))
        return f"/files/{relative}" + (f"?width={width}" if width else "")

    def picture(self, place: Any, alt: str, width: int) -> str:
        """HTML of a picture's thumbnail, which opens the whole."""
        image = f'<img src="{self.url(place, width)}" alt="{escape(alt)}" loading="lazy">'
        return f'<a href="{self.url(place)}" target="_blank">{image}</a>'


def empty(title: str, next_step: str) -> str:
    """The HTML of a screen with nothing on it yet: what will be here, and what to do now."""
    return f'<div class="empty"><h3>{title}</h3><p>{next_step}</p></div>'


def tiles(pictures: Sequence[tuple[str, str, str]]) -> str:
    """HTML of pictures with captions under them: (address of the thumbnail, of the whole, caption)."""
    figures = (
        f'<figure><a href="{whole}" target="_blank"><img src="{thumbnail}" alt="{escape(caption)}" loading="lazy"></a>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for thumbnail, whole, caption in pictures
    )
    return f'<div class="tiles">{"".join(figures)}</div>'
