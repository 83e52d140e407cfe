"""How a picture was made, in its PNG: the text chunk "parameters" in A1111's form, which other tools parse."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, PngImagePlugin

from studio.diffusion.generate import GenerateRequest
from studio.diffusion.lora import AppliedLora

CHUNK = "parameters"
_NEGATIVE = "Negative prompt:"
_SETTING = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def save_png(
    image: Image.Image,
    path: Path,
    request: GenerateRequest,
    applied: Sequence[AppliedLora] = (),
    index: int = 0,
    model: str = "",
    chunks: Mapping[str, str] | None = None,
) -> None:
    """Writes picture `index` of the request's batch as a PNG, with its parameters.

    `applied` holds the LoRAs that acted, and no others are named; `model` is the base's name; `chunks` are
    further text chunks.
    """
    info = PngImagePlugin.PngInfo()
    info.add_text(CHUNK, format_parameters(request, image.size, applied, index, model))
    for name, text in (chunks or {}).items():
        info.add_itxt(name, text)
    image.save(path, "PNG", pnginfo=info)


def format_parameters(
    request: GenerateRequest,
    size: tuple[int, int],
    applied: Sequence[AppliedLora] = (),
    index: int = 0,
    model: str = "",
) -> str:
    """The text of the chunk: prompt with `<lora:name:strength>`, negative prompt, and a line of settings."""
    applied = [lora for lora in applied if lora.layers]  # of a textual inversion, the word is in the prompt
    tags = [f"<lora:{lora.name}:{lora.strength:g}>" for lora in applied]
    lines = [" ".join([_one_field(request.prompt), *tags]).strip()]
    if request.negative_prompt:
        lines.append(f"{_NEGATIVE} {_one_field(request.negative_prompt)}")
    settings = {
        "Steps": request.steps,
        "Sampler": request.sampler,
        "CFG scale": f"{request.guidance:g}",
        "Seed": request.seed + index,
        "Size": f"{size[0]}x{size[1]}",
    }
    if model:
        settings["Model"] = model
    if request.clip_skip:
        settings["Clip skip"] = request.clip_skip + 1  # A1111 counts from 1
    if hashes := [f"{lora.name}: {lora.sha}" for lora in applied if lora.sha]:
        settings["Lora hashes"] = ", ".join(hashes)
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items()))
    return "\n".join(lines)


def parse_parameters(text: str) -> dict[str, str]:
    """ "Prompt", "Negative prompt" and the settings by A1111's names, of a chunk's text."""
    *lines, last = text.split("\n")
    settings = _SETTING.findall(last)
    if len(settings) < 3:  # A1111's own rule: fewer are a prompt that happens to look so
        lines, settings = [*lines, last], []
    prompt, _, negative = "\n".join(["", *lines]).partition(f"\n{_NEGATIVE}")
    found = {"Prompt": prompt[1:].strip(), "Negative prompt": negative.strip()}
    return found | {name: json.loads(value) if value.startswith('"') else value.strip() for name, value in settings}


def read_parameters(path: Path) -> dict[str, str]:
    """`parse_parameters` of a PNG; empty for a picture without the chunk."""
    with Image.open(path) as image:
        text = image.info.get(CHUNK)
    return parse_parameters(text) if text else {}


def _one_field(text: str) -> str:
    """The prompt with plain line ends, and no line that readers would take for the negative prompt."""
    return re.sub(rf"\s+(?={_NEGATIVE})", " ", text.replace("\r\n", "\n").strip())


def _quoted(value: str) -> str:
    """A value that holds separators goes between quotes, escaped as JSON."""
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value
