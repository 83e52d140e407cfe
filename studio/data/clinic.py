"""What is wrong with a dataset before anybody trains on it, and for each finding the fix that one click makes.

Near duplicates: difference hashes (N. Krawetz, 2013), here with a third value for "no difference", so that flat
backgrounds agree. Blur: the variance of the Laplacian (Pech-Pacheco et al., ICPR 2000), at the size that training
sees, and against the median of the dataset, since drawings and photographs differ a hundredfold.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from studio.config import DataConfig
from studio.data.buckets import Size, assign_buckets, kept_fraction
from studio.data.caption_edits import from_name, put_first
from studio.data.collection import captions
from studio.data.decode import UnusablePicture, open_rgb, verify
from studio.data.images import THREADS, ImageItem

CELLS = 8  # a hash compares 8 x 8 neighbours
LEVEL = 2  # grey levels of 255 that count as a difference
NEAR = 10  # of 128 bits: copies in another size, format or brightness stay below, other pictures lie above 20
BLURRED = 0.1  # of the median sharpness
BLURRED_ALONE = 20.0  # sharpness below which a picture is blurred whatever the others are
ENLARGED = 1.25  # how many times a picture may be enlarged to fill its bucket
CROPPED = 0.2  # how much of a picture may be cropped away


@dataclass(frozen=True)
class Finding:
    """`pictures` are what it is about, as names in the dataset. The fix is to leave out `leave_out`, or to write
    `captions`; with neither, `advice` is all there is."""

    kind: str
    title: str
    advice: str
    pictures: tuple[str, ...]
    leave_out: tuple[str, ...] = ()
    captions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Crop:
    """A picture of `width` x `height` pixels as its bucket takes it: `frame` is (left, top, width, height) of
    what is kept, in fractions of the picture."""

    name: str
    width: int
    height: int
    bucket: Size

    @property
    def kept(self) -> float:
        return kept_fraction(self.width, self.height, self.bucket)

    @property
    def enlarged(self) -> float:
        """How many times it is enlarged to cover the bucket; below 1 it is scaled down."""
        return max(self.bucket[0] / self.width, self.bucket[1] / self.height)

    @property
    def frame(self) -> tuple[float, float, float, float]:
        across, down = self.bucket[0] / self.width / self.enlarged, self.bucket[1] / self.height / self.enlarged
        return (1 - across) / 2, (1 - down) / 2, across, down


@dataclass(frozen=True)
class Look:
    """A readable picture: pixels, SHA-256 of the file, difference hash (128,) of bool, variance of the Laplacian."""

    width: int
    height: int
    content: str
    hash: np.ndarray
    sharpness: float


@dataclass(frozen=True)
class Examination:
    """`pictures` counts those in the folder, `crops` are of those that can be read."""

    pictures: int
    findings: tuple[Finding, ...]
    crops: tuple[Crop, ...]


@dataclass(frozen=True)
class _Dataset:
    looks: Mapping[str, Look]
    unreadable: Mapping[str, str]
    captions: Mapping[str, str]
    crops: Sequence[Crop]
    trigger: str


def examine(folder: Path, data: DataConfig, trigger: str = "") -> Examination:
    """Looks at every picture of a dataset; a second time only at those that changed.

    `trigger` is a word that every caption should have. Raises ConfigError for a resolution that buckets refuse.
    """
    texts = captions(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        seen = dict(zip(texts, pool.map(lambda name: _look_at(folder / name, data.resolution), texts), strict=True))
    looks = {name: look for name, look in seen.items() if isinstance(look, Look)}
    unreadable = {name: reason for name, reason in seen.items() if isinstance(reason, str)}
    dataset = _Dataset(looks, unreadable, texts, _crops(looks, data), trigger.strip())
    findings = tuple(finding for check in CHECKS for finding in check(dataset))
    return Examination(len(texts), findings, tuple(dataset.crops))


def _look_at(path: Path, side: int) -> Look | str:
    """A picture's measures, or why it cannot be used."""
    try:
        stat = path.stat()
        return _measure(path, side, stat.st_mtime_ns, stat.st_size)
    except (UnusablePicture, OSError) as problem:
        return str(problem)


@lru_cache(maxsize=4096)
def _measure(path: Path, side: int, changed: int, size: int) -> Look:
    """`changed` and `size` tell a file's versions apart. Raises UnusablePicture."""
    verify(path)
    grey = open_rgb(path).convert("L")
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return Look(grey.width, grey.height, content, difference_hash(grey), sharpness(grey, side))


def difference_hash(grey: Image.Image) -> np.ndarray:
    """Whether each of 8 x 8 places is brighter, and whether it is darker, than its left neighbour: (128,) of bool."""
    small = np.asarray(grey.resize((CELLS + 1, CELLS), Image.Resampling.LANCZOS), dtype=np.int16)
    steps = np.diff(small, axis=1)  # (8, 8)
    return np.concatenate([(steps > LEVEL).ravel(), (steps < -LEVEL).ravel()])


def sharpness(grey: Image.Image, side: int) -> float:
    """Variance of the Laplacian with the longer side scaled down to `side` pixels; nothing is enlarged."""
    scale = min(1.0, side / max(grey.size))
    size = (max(3, round(grey.width * scale)), max(3, round(grey.height * scale)))
    p = np.asarray(grey.resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    return float((4 * p[1:-1, 1:-1] - p[:-2, 1:-1] - p[2:, 1:-1] - p[1:-1, :-2] - p[1:-1, 2:]).var())


def _crops(looks: Mapping[str, Look], data: DataConfig) -> list[Crop]:
    items = [ImageItem(Path(name), "", look.width, look.height, 1, look.content) for name, look in looks.items()]
    buckets = assign_buckets(items, data.resolution, data.bucket_step, data.max_aspect)
    placed = {item.path: size for size, members in buckets.items() for item in members}
    return [Crop(item.path.as_posix(), item.width, item.height, placed[item.path]) for item in items]


# -- checks -----------------------------------------------------------------------------------


def _unreadable(dataset: _Dataset) -> Iterator[Finding]:
    if names := tuple(dataset.unreadable):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(dataset.unreadable.items())[:3])
        yield Finding("unreadable", f"{_count(names)} cannot be read", reasons, names, names)


def _copies(dataset: _Dataset) -> Iterator[Finding]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, look in dataset.looks.items():
        groups[look.content].append(name)
    yield from _doubled(dataset, "copies", "exact copies", [group for group in groups.values() if len(group) > 1])


def _near_copies(dataset: _Dataset) -> Iterator[Finding]:
    """Groups by chains of nearly equal hashes, less exact copies."""
    one_each = {look.content: name for name, look in dataset.looks.items()}
    names = sorted(one_each.values())
    if len(names) < 2:
        return
    hashes = np.array([dataset.looks[name].hash for name in names])
    leader = list(range(len(names)))
    for place in range(len(names)):
        near = np.flatnonzero((hashes[place + 1 :] != hashes[place]).sum(axis=1) <= NEAR) + place + 1
        for other in near:
            old, new = leader[other], leader[place]
            leader = [new if one == old else one for one in leader]
    groups: dict[int, list[str]] = defaultdict(list)
    for name, head in zip(names, leader, strict=True):
        groups[head].append(name)
    yield from _doubled(dataset, "near", "nearly the same", [group for group in groups.values() if len(group) > 1])


def _doubled(dataset: _Dataset, kind: str, what: str, groups: list[list[str]]) -> Iterator[Finding]:
    if not groups:
        return
    extra: list[str] = []
    for group in groups:
        best = max(group, key=lambda name: (bool(dataset.captions[name]), _pixels(dataset.looks[name])))
        extra += [name for name in group if name != best]
    names = tuple(name for group in groups for name in group)
    advice = "Doubles weigh more than the others, and are learnt by heart. The largest with a caption stays."
    yield Finding(kind, f"{_count(names)} are {what}", advice, names, tuple(extra))


def _blurred(dataset: _Dataset) -> Iterator[Finding]:
    if not dataset.looks:
        return
    limit = max(BLURRED_ALONE, BLURRED * float(np.median([look.sharpness for look in dataset.looks.values()])))
    names = tuple(name for name, look in dataset.looks.items() if look.sharpness < limit)
    if names:
        yield Finding("blurred", f"{_count(names)} look blurred", "The adapter learns blur as well.", names, names)


def _small(dataset: _Dataset) -> Iterator[Finding]:
    names = tuple(crop.name for crop in dataset.crops if crop.enlarged > ENLARGED)
    if names:
        advice = "They would be enlarged, and the adapter learns softness. Use larger ones, or a lower resolution."
        title = f"{_count(names)} are smaller than the training size"
        yield Finding("small", title, advice, names, _if_few(names, dataset))


def _odd_shape(dataset: _Dataset) -> Iterator[Finding]:
    names = tuple(crop.name for crop in dataset.crops if 1 - crop.kept > CROPPED)
    if names:
        advice = "Much of them would be cut off; see the crops below. Crop them by hand, or raise max aspect."
        title = f"{_count(names)} lose more than {CROPPED:.0%} to the crop"
        yield Finding("shape", title, advice, names, _if_few(names, dataset))


def _uncaptioned(dataset: _Dataset) -> Iterator[Finding]:
    names = tuple(name for name, caption in dataset.captions.items() if not caption)
    named = {name: from_name(name) for name in names}
    written = {name: put_first(text, dataset.trigger) if dataset.trigger else text for name, text in named.items()}
    if names:
        advice = "Say what each shows. The fix writes their file names as captions, which is better than nothing."
        fix = {name: text for name, text in written.items() if text}
        yield Finding("uncaptioned", f"{_count(names)} have no caption", advice, names, captions=fix)


def _alike(dataset: _Dataset) -> Iterator[Finding]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, caption in dataset.captions.items():
        groups[caption].append(name)
    groups.pop("", None)
    for caption, names in groups.items():
        if len(names) > max(2, len(dataset.captions) // 10):
            advice = "What differs between them and is not in the caption is learnt as part of it."
            yield Finding("alike", f'{_count(names)} share the caption "{caption}"', advice, tuple(names))


def _without_trigger(dataset: _Dataset) -> Iterator[Finding]:
    word = dataset.trigger
    fix = {name: put_first(text, word) for name, text in dataset.captions.items() if text and word}
    fix = {name: text for name, text in fix.items() if word.casefold() not in dataset.captions[name].casefold()}
    if fix:
        advice = "The adapter answers to a word only where the captions have it. The fix puts it first."
        yield Finding("trigger", f'{_count(fix)} lack the trigger word "{word}"', advice, tuple(fix), captions=fix)


Check = Callable[[_Dataset], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    *(_unreadable, _copies, _near_copies, _blurred, _small, _odd_shape),
    *(_uncaptioned, _without_trigger, _alike),
)


def _count(names: Sequence[str] | Mapping[str, str]) -> str:
    return f"{len(names)} picture{'s' * (len(names) != 1)}"


def _if_few(names: tuple[str, ...], dataset: _Dataset) -> tuple[str, ...]:
    """What to leave out: nothing where that would be most of a dataset, whose settings are then to blame."""
    return names if len(names) <= len(dataset.looks) / 2 else ()


def _pixels(look: Look) -> int:
    return look.width * look.height
