"""Changing many captions at once: each edit is a function of a caption and one or two texts.

A caption is a sentence, or tags separated by commas; what adds or takes away a part minds the commas.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath

Edit = Callable[[str, str, str], str]


def tags(caption: str) -> list[str]:
    """The parts between commas; a sentence without commas is one."""
    return [part for part in (part.strip() for part in caption.split(",")) if part]


def join(*parts: str) -> str:
    """Parts with commas between them; empty ones vanish."""
    return ", ".join(part for part in (part.strip().strip(",").strip() for part in parts) if part)


def put_first(caption: str, word: str, _: str = "") -> str:
    """The word at the start, and not as a tag of its own anywhere else. A caption that starts with it stays."""
    if re.match(rf"{re.escape(word.strip())}\b", caption, re.IGNORECASE):
        return caption
    return join(word, *without(caption, word).split(","))


def without(caption: str, tag: str, _: str = "") -> str:
    """The caption less the tags that are this one, in upper or lower case."""
    gone = {one.casefold() for one in tags(tag)}
    kept = [one for one in tags(caption) if one.casefold() not in gone]
    return caption if len(kept) == len(tags(caption)) else ", ".join(kept)


def replace(caption: str, find: str, by: str) -> str:
    """Every `find`, as it is written, by another text; commas that are left with nothing between them go."""
    changed = caption.replace(find, by)
    return changed if changed == caption else ", ".join(tags(changed))


EDITS: dict[str, Edit] = {
    "Put a trigger word first": put_first,
    "Find and replace": replace,
    "Add at the start": lambda caption, text, _: join(text, caption),
    "Add at the end": lambda caption, text, _: join(caption, text),
    "Remove a tag": without,
}
"""What the user reads -> (caption, text, second text) -> caption; only find and replace has a second text."""


def edited(captions: Mapping[str, str], edit: Edit, text: str, other: str = "") -> dict[str, str]:
    """Name -> new caption, of those that the edit changes; nothing changes by an empty `text`."""
    new = {name: edit(caption, text, other) for name, caption in captions.items()} if text.strip() else {}
    return {name: caption for name, caption in new.items() if caption != captions[name]}


def tag_counts(captions: Iterable[str]) -> list[tuple[str, int]]:
    """How many captions have each tag, the most frequent first."""
    counts = Counter(tag for caption in captions for tag in dict.fromkeys(tags(caption)))
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))


def from_name(name: str) -> str:
    """A caption from a picture's file name: "red_panda-02.png" as "red panda"; "" for a number or a camera's name."""
    words = re.sub(r"[^\w]|_|\d", " ", PurePosixPath(name).stem).split()
    return " ".join(words) if any(len(word) > 2 for word in words) and words[0].upper() not in CAMERAS else ""


CAMERAS = {"IMG", "DSC", "DSCN", "DSCF", "PXL", "DCIM", "VID", "MVIMG", "SCREENSHOT", "IMAGE", "PHOTO", "PICTURE"}
