"""The licensed pictures and their names: Noto (the base), Fluent high contrast (the demo style).

Sources, fetched by `npm pack`: `emoji-datasource-google` (Noto artwork, Apache-2.0),
`emojibase-data` (CLDR names and keywords, MIT), `@iconify-json/fluent-emoji-high-contrast` (MIT).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "names": "emojibase-data@17.0.0",
    "fluent": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
}
NOT_A_CONCEPT = ("Flags", "Component")


@dataclass(frozen=True)
class Picture:
    """One picture with its words. `pixels` is (64, 64, 3) uint8 on white."""

    name: str
    keywords: tuple[str, ...]
    category: str
    pixels: np.ndarray
    held_out: bool


def fetch(work: Path) -> dict[str, Path]:
    """Downloads and unpacks the three packages below `work`; returns where each lies."""
    folders = {}
    for key, package in PACKAGES.items():
        folder = work / "packages" / key
        if not (folder / "package").exists():
            folder.mkdir(parents=True, exist_ok=True)
            packed = subprocess.run(
                ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
            )
            with tarfile.open(folder / packed.stdout.strip().splitlines()[-1]) as archive:
                archive.extractall(folder, filter="data")
        folders[key] = folder / "package"
    return folders


def held_out(key: str) -> bool:
    """One picture in twenty is kept from the autoencoder; all skin tones of an emoji share the draw."""
    return hashlib.sha256(key.encode()).digest()[0] % 20 == 0


def on_white(image: Image.Image) -> np.ndarray:
    """(64, 64, 3) uint8 of a picture with transparency, over white."""
    image = image.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def _bare(hexcode: str) -> str:
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def noto(folders: dict[str, Path]) -> list[Picture]:
    """The Noto pictures that are concepts (1,632 of them): no flags, no skin tones."""
    words = {_bare(entry["hexcode"]): entry for entry in json.loads((folders["names"] / "en/data.json").read_text())}
    pictures = []
    for entry in json.loads((folders["noto"] / "emoji.json").read_text()):
        file = folders["noto"] / "img/google/64" / entry["image"]
        named = words.get(_bare(entry["unified"]))
        if entry["category"] in NOT_A_CONCEPT or not entry["has_img_google"] or named is None or not file.exists():
            continue
        keywords = tuple(tag for tag in named.get("tags", ()) if tag.isascii())
        pixels = on_white(Image.open(file))
        pictures.append(Picture(named["label"], keywords, entry["category"], pixels, held_out(_bare(entry["unified"]))))
    return pictures


def noto_variants(folders: dict[str, Path]) -> list[np.ndarray]:
    """Flags and skin tones, pixels only: more to learn from for the autoencoder. None is held out."""
    variants = []
    for entry in json.loads((folders["noto"] / "emoji.json").read_text()):
        base = _bare(entry["unified"])
        if held_out(base) or not entry["has_img_google"]:
            continue
        if entry["category"] == "Flags":
            files = [entry["image"]]
        else:
            files = [skin["image"] for skin in entry.get("skin_variations", {}).values()]
        paths = [folders["noto"] / "img/google/64" / file for file in files]
        variants += [on_white(Image.open(path)) for path in paths if path.exists()]
    return variants


def fluent(folders: dict[str, Path], size: int = SIZE) -> list[Picture]:
    """Fluent high contrast (about 1,590 pictures): black line drawings on white."""
    import resvg_py

    icons = json.loads((folders["fluent"] / "icons.json").read_text())
    pictures = []
    for name, icon in icons["icons"].items():
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {icons["width"]} {icons["height"]}" '
            f'width="{size}" height="{size}">{icon["body"].replace("currentColor", "#000")}</svg>'
        )
        drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))))
        white = Image.new("RGBA", drawn.size, "white")
        pixels = np.asarray(Image.alpha_composite(white, drawn.convert("RGBA")).convert("RGB"))
        pictures.append(Picture(name.replace("-", " "), (), "", pixels, held_out(name)))
    return pictures


_NEAR_COPY = re.compile(r"-thirty$|^family|^kiss: |^couple with heart: |facing right|^(men|women) ")


def concepts(pictures: list[Picture]) -> list[Picture]:
    """The pictures that the text-to-image model learns: signs and near-copies are left out.

    Left out: signs and letters, woman/man versions where a neutral one exists, families, half hours.
    """
    names = {picture.name for picture in pictures}

    def has_neutral(name: str) -> bool:
        neutral = re.sub(r"^(man|woman)\b", "person", name), re.sub(r"^(man|woman) ", "", name)
        return any(other in names for other in neutral if other != name)

    return [
        picture
        for picture in pictures
        if picture.category != "Symbols" and not _NEAR_COPY.search(picture.name) and not has_neutral(picture.name)
    ]
