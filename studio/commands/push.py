"""`studio push`: an adapter with its model card to the Hugging Face hub."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from studio.commands.files import File
from studio.commands.flags import Json
from studio.errors import ConfigError
from studio.terminal import emit, short

if TYPE_CHECKING:
    from studio.formats.card import Sample

REPO_HELP = "The repository; it is made where there is none yet."
LICENSE_HELP = "Under which terms others may use it, such as apache-2.0. (default: what the file says of it)"
BASE_HELP = "The base it is for. (default: the one that it was trained on, or the published one of its kind)"
SAMPLE_HELP = "A picture that it made; the prompt in its PNG is shown beside it. Repeat for more."
EXISTING_HELP = "What to do where the repository has a card already."
DRY_RUN_HELP = "Write what would be sent into the folder NAME-hub, and send nothing."
_ENDINGS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}

log = logging.getLogger(__name__)


def push(
    file: File,
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help=REPO_HELP)],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only you see.")] = False,
    licence: Annotated[str, typer.Option("--license", help=LICENSE_HELP)] = "",
    base: Annotated[str, typer.Option(metavar="HUB-ID", help=BASE_HELP)] = "",
    sample: Annotated[list[Path] | None, typer.Option(metavar="PICTURE", help=SAMPLE_HELP)] = None,
    card: Annotated[Literal["stop", "keep", "replace"], typer.Option(help=EXISTING_HELP)] = "stop",
    message: Annotated[str, typer.Option(help="The commit's message.")] = "Upload adapter",
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
    as_json: Json = False,
) -> None:
    """Put an adapter on the Hugging Face hub, with a model card.

    The card tells base, licence, trigger words, settings and provenance, and how to use the file in the
    tools that use all of it. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from studio.formats import adapter_path
    from studio.formats.card import Publication, model_card
    from studio.formats.describe import describe_adapter
    from studio.formats.upload import CARD, check_repo, upload

    check_repo(repo)
    path = adapter_path(file)
    facts = describe_adapter(path)
    samples, pictures = _samples(sample or [])
    name = path.name if path.is_file() else ""
    publication = Publication(repo, name, facts, _tools(path, facts), base, licence, samples)
    if not publication.terms:
        log.warning("no licence is stated, so that others may not know what they may do: --license states one")
    text = str(model_card(publication))
    contents: dict[str, Path | bytes] = {CARD: text.encode(), **_adapter_files(path), **pictures}
    if dry_run:
        folder = _written(contents, Path(f"{repo.partition('/')[2]}-hub"))
        told = f"{text}\n{short(folder.resolve())}: {', '.join(contents)}"
        emit({"folder": folder, "files": list(contents)}, told, as_json)
        return
    url = upload(repo, contents, private, card, message)
    emit({"url": url, "files": list(contents)}, url, as_json)


def _tools(path: Path, facts: Mapping[str, Any]) -> list[str]:
    """The tools that use the whole file, as far as is known as it is meant; none for a file with tokens alone."""
    from studio.families import FAMILIES
    from studio.families.loading import load_base
    from studio.formats.card import base_of
    from studio.formats.consumers import TOLERANCE, check_file

    if not facts["layers"]:
        return []
    models = load_base("builtin")[1] if base_of(facts["metadata"]) == "builtin" else None
    reports = check_file(path, FAMILIES[facts["family"]], models)
    whole = {name: report for name, report in reports.items() if not report.unused}
    return [name for name, report in whole.items() if report.error is None or report.error <= TOLERANCE]


def _adapter_files(path: Path) -> dict[str, Path]:
    """Path in the repository -> file of the adapter: the file itself, or what PEFT's folder is made of."""
    from studio.formats import peft

    if path.is_file():
        return {path.name: path}
    files = [folder / name for folder in peft.folders(path).values() for name in (peft.CONFIG, peft.WEIGHTS)]
    return {file.relative_to(path).as_posix(): file for file in files}


def _samples(pictures: list[Path]) -> tuple[list[Sample], dict[str, Path]]:
    """(what the card shows, path in the repository -> picture). Raises ConfigError for what is no picture."""
    from PIL import Image

    from studio.diffusion.metadata import read_parameters
    from studio.diffusion.prompts import extract_loras
    from studio.formats.card import Sample

    samples, files = [], {}
    for place, picture in enumerate(pictures):
        try:
            with Image.open(picture) as image:
                image.verify()
                ending = _ENDINGS[image.format or ""]
            prompt = extract_loras(read_parameters(picture).get("Prompt", ""))[0]
        except (OSError, SyntaxError, KeyError) as problem:
            raise ConfigError(f"--sample: '{picture}' is no PNG, JPEG or WebP picture ({problem})") from problem
        samples.append(Sample(f"images/{place:02d}{ending}", prompt.strip()))
        files[samples[-1].path] = picture
    return samples, files


def _written(contents: Mapping[str, Path | bytes], folder: Path) -> Path:
    """The new folder with these files. Raises ConfigError where it exists."""
    if folder.exists():
        raise ConfigError(f"'{folder}' exists already: remove it first")
    for name, content in contents.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, target)
        else:
            target.write_bytes(content)
    return folder
