"""LoRAs for generation: named on the command line or in the prompt, found, applied, and taken off again.

Trained tokens come with them, in the same file or in one of their own: while it is applied, they stand in prompts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from studio.adapters import AdapterSet, attach_adapters
from studio.diffusion.prompts import extract_loras, finite_number
from studio.diffusion.words import any_of
from studio.errors import ConfigError, nearest
from studio.families.base import DiffusionFamily, Models
from studio.formats import adapter_path, read_adapter


@dataclass(frozen=True)
class AppliedLora:
    """A LoRA that acts on a model: `sha` is the hash that A1111 prints, 12 digits of
    `sshs_model_hash` (empty for a PEFT folder or a pickle), `layers` the number of layers it changes, `words` its
    trained tokens, which no strength changes."""

    name: str
    source: str
    strength: float
    sha: str
    layers: int
    adapters: AdapterSet = field(repr=False, compare=False)
    words: tuple[str, ...] = ()


def parse_lora(text: str) -> tuple[str, float]:
    """(source, strength) of `FILE[:strength]`; the strength is 1 where none is given.

    A colon that is part of a path ("C:/loras/ink.safetensors") is not a strength. Raises
    ConfigError for a strength that is not a number.
    """
    source, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    strength = finite_number(tail)
    if strength is not None:
        return source, strength
    if Path(source).exists() or source.endswith(".safetensors"):
        raise ConfigError(f"'{tail}' in '{text}' is not a strength: write a number, as in '{source}:0.8'")
    return text, 1.0


def wanted_loras(prompt: str, given: Sequence[str], folders: Sequence[Path]) -> tuple[str, list[tuple[str, float]]]:
    """The prompt without tags, and the (source, strength) of every LoRA to apply.

    `given` holds `FILE[:strength]` texts. A tag names a given LoRA, and then sets its strength, or a
    `.safetensors` file below one of `folders`, by its name without the ending. Raises ConfigError
    for a name that is not found, that two files have, or that comes twice.
    """
    text, named = extract_loras(prompt)
    pairs = [parse_lora(one) for one in given]
    for names in ([source for source, _ in pairs], [name for name, _ in named]):
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"LoRA '{twice[0]}' is named twice: name it once, with the strength that it should have")
    sources = [source for source, _ in pairs]
    found = {_find(name, sources, folders): strength for name, strength in named}
    return text, list((dict(pairs) | found).items())


def _find(name: str, given: Sequence[str], folders: Sequence[Path]) -> str:
    """The one source called `name`: a given one, or else a file below `folders`."""
    files = [path for folder in folders for path in sorted(folder.rglob("*.safetensors"))]
    found = [source for source in given if lora_name(source) == name]
    found = found or [str(path) for path in files if path.stem == name]
    if len(found) > 1:
        raise ConfigError(f"LoRA '{name}' in the prompt could be any of: {', '.join(found)}. Give the file with --lora")
    if not found:
        places = ", ".join(map(str, folders)) or "no folder"
        suggestion = nearest(name, {*map(lora_name, given), *(path.stem for path in files)})
        raise ConfigError(f"LoRA '{name}' in the prompt is not among the given files nor in {places}.{suggestion}")
    return found[0]


def lora_name(source: str) -> str:
    """The name of a LoRA: its file's without the ending, or the last part of a folder or hub id."""
    return Path(source).name.removesuffix(".safetensors")


def apply_loras(family: DiffusionFamily, models: Models, wanted: Sequence[tuple[str, float]]) -> list[AppliedLora]:
    """Attaches each (source, strength) to the models; a strength of 0 attaches nothing.

    Raises ConfigError, with nothing attached, for a source that cannot be read or is for another base.
    """
    applied: list[AppliedLora] = []
    try:
        for source, strength in wanted:
            if strength:
                applied.append(_apply(family, models, source, strength))
    except BaseException:
        take_off(models, applied)
        raise
    return applied


@contextmanager
def loras(family: DiffusionFamily, models: Models, wanted: Sequence[tuple[str, float]]) -> Iterator[list[AppliedLora]]:
    """`apply_loras` for the length of a `with` block; the models are afterwards what they were."""
    applied = apply_loras(family, models, wanted)
    try:
        yield applied
    finally:
        take_off(models, applied)


def _apply(family: DiffusionFamily, models: Models, source: str, strength: float) -> AppliedLora:
    state = read_adapter(source)
    if state.family != family.name:
        raise ConfigError(f"{source}: the file is for {state.family}, the base is {family.name}")
    if strength != 1 and not state.tensors:
        weighed = f"({next(iter(state.embeddings))}:{strength:g})"
        raise ConfigError(f"{source}: a textual inversion has no strength; weigh its word in the prompt, {weighed}")
    try:
        _check_words(models, state.embeddings)
        adapters = attach_adapters(family.prefixes(models), state.tensors, strength)
    except ConfigError as problem:
        raise ConfigError(f"{source}: {problem}") from problem
    sha = state.metadata.get("sshs_model_hash") or _tensor_hash(adapter_path(source))
    name, words = lora_name(source), tuple(state.embeddings)
    models.words.update(state.embeddings)
    return AppliedLora(name, source, strength, sha[:12], len(state.tensors), adapters, words)


def _check_words(models: Models, embeddings: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raises ConfigError for a word that is there already, and for vectors that the encoders cannot take."""
    known = {word.casefold() for word in models.words}
    for word, parts in embeddings.items():
        if word.casefold() in known:
            raise ConfigError(f"there are two tokens '{word}': rename the file, or apply one of them")
        known.add(word.casefold())
        for encoder, vectors in parts.items():
            width = models.parts[encoder].get_input_embeddings().embedding_dim  # type: ignore[operator]
            room = models.tokenizers[encoder].model_max_length - 2
            if vectors.shape[1] != width or len(vectors) > room:
                raise ConfigError(
                    f"token '{word}' is {tuple(vectors.shape)}; this base's {encoder} takes up to {room} vectors of "
                    f"{width}: the file is for another base"
                )


def check_mentioned(applied: Sequence[AppliedLora], prompts: Sequence[str]) -> None:
    """Raises ConfigError for a textual inversion whose word is in none of the prompts: it would do nothing."""
    for lora in applied:
        pattern = any_of(lora.words)
        if not lora.layers and not any(re.search(pattern, prompt, re.IGNORECASE) for prompt in prompts):
            raise ConfigError(f"{lora.source}: '{lora.words[0]}' is not in the prompt, so the file would do nothing")


def take_off(models: Models, applied: Sequence[AppliedLora]) -> None:
    """Undoes `apply_loras`."""
    for lora in applied:
        lora.adapters.detach()
        for word in lora.words:
            del models.words[word]


def _tensor_hash(path: Path) -> str:
    """sha256 of a safetensors file without its header, what kohya stores as `sshs_model_hash`; empty for others."""
    if path.suffix != ".safetensors":
        return ""
    with path.open("rb") as file:
        file.seek(int.from_bytes(file.read(8), "little") + 8)
        return hashlib.file_digest(file, "sha256").hexdigest()
