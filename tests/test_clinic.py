"""The clinic on pictures made to be wrong, and the editable dataset: nothing lost, nothing outside."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from studio import paths
from studio.config import DataConfig
from studio.data import caption_edits, collection
from studio.data.clinic import Examination, examine
from studio.data.images import scan_folder
from studio.errors import DatasetError

DATA = DataConfig(resolution=64, bucket_step=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures of the demo with captions."""
    place = tmp_path / "datasets" / "ten"
    place.mkdir(parents=True)
    for picture in sorted((paths.assets() / "demo").glob("*.png"))[:10]:
        shutil.copy(picture, place)
        shutil.copy(picture.with_suffix(".txt"), place)
    return place


def kinds(found: Examination) -> dict[str, tuple[str, ...]]:
    return {finding.kind: finding.pictures for finding in found.findings}


def test_good_pictures_pass(folder: Path) -> None:
    found = examine(folder, DATA)
    assert found.pictures == 10 and not found.findings
    assert all(crop.bucket == (64, 64) and crop.frame == (0, 0, 1, 1) for crop in found.crops)


def test_the_whole_demo_passes() -> None:
    assert not examine(paths.assets() / "demo", DATA).findings


def test_every_defect_is_found_and_nothing_else(folder: Path) -> None:
    bear, crab = Image.open(folder / "bear.png").convert("RGB"), Image.open(folder / "crab.png").convert("RGB")
    shutil.copy(folder / "bear.png", folder / "bear-again.png")
    crab.resize((100, 100)).save(folder / "crab small.jpg", quality=60)
    bear.rotate(20).filter(ImageFilter.GaussianBlur(5)).save(folder / "soft.png")
    crab.transpose(Image.Transpose.TRANSPOSE).resize((30, 30)).save(folder / "tiny.png")
    Image.open(folder / "camera.png").rotate(90).resize((300, 80)).save(folder / "wide.png")
    (folder / "broken.png").write_bytes(b"no picture")
    found = kinds(examine(folder, DATA))
    assert found["copies"] == ("bear-again.png", "bear.png")
    assert found["near"] == ("crab small.jpg", "crab.png")
    assert found["blurred"] == ("soft.png",)
    assert found["small"] == ("tiny.png",)
    assert found["shape"] == ("wide.png",)
    assert found["unreadable"] == ("broken.png",)
    new = {"bear-again.png", "crab small.jpg", "soft.png", "tiny.png", "wide.png", "broken.png"}
    assert set(found["uncaptioned"]) == new and "alike" not in found


def test_the_fixes_leave_nothing_to_find(folder: Path) -> None:
    shutil.copy(folder / "bear.png", folder / "bear-again.png")
    Image.open(folder / "crab.png").resize((100, 100)).save(folder / "red_crab2.png")
    (folder / "crab.txt").unlink()
    for finding in examine(folder, DATA, trigger="zkw").findings:
        collection.leave_out(folder, finding.leave_out)
        present = collection.captions(folder)
        collection.write_captions(folder, {name: text for name, text in finding.captions.items() if name in present})
    assert not examine(folder, DATA, trigger="zkw").findings
    assert all(item.caption.startswith("zkw, ") for item in scan_folder(folder).items)
    out = collection.left_out(folder)
    assert len(out) == 2 and collection.put_back(folder, out) == out and not collection.left_out(folder)


def test_a_finding_keeps_the_largest_of_doubles_that_has_a_caption(folder: Path) -> None:
    Image.open(folder / "bear.png").resize((512, 512)).save(folder / "large.png")
    (near,) = examine(folder, DATA).findings[:1]
    assert near.kind == "near" and near.leave_out == ("large.png",)
    (folder / "large.txt").write_text("bear")
    (near,) = examine(folder, DATA).findings
    assert near.leave_out == ("bear.png",)


def test_a_crop_frame_is_what_the_bucket_keeps(folder: Path) -> None:
    Image.open(folder / "bear.png").resize((200, 100)).save(folder / "wide.png")
    squares = DataConfig(resolution=64, bucket_step=8, max_aspect=1)
    (crop,) = [crop for crop in examine(folder, squares).crops if crop.name == "wide.png"]
    assert crop.bucket == (64, 64) and crop.frame == pytest.approx((0.25, 0, 0.5, 1)) and crop.kept == 0.5


# -- captions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "caption", "text", "other", "expected"),
    [
        ("Put a trigger word first", "a dog, red", "zkw", "", "zkw, a dog, red"),
        ("Put a trigger word first", "a dog, zkw, red", "zkw", "", "zkw, a dog, red"),
        ("Put a trigger word first", "zkw dog", "zkw", "", "zkw dog"),
        ("Put a trigger word first", "", "zkw", "", "zkw"),
        ("Find and replace", "a dog, red", "dog", "cat", "a cat, red"),
        ("Find and replace", "a dog, red, big", "red", "", "a dog, big"),
        ("Add at the start", "a dog", "photo,", "", "photo, a dog"),
        ("Add at the end", "a dog,", "photo", "", "a dog, photo"),
        ("Remove a tag", "a dog, Red, reddish", "red", "", "a dog, reddish"),
        ("Remove a tag", "a dog , big", "red", "", "a dog , big"),
    ],
)
def test_edits(edit: str, caption: str, text: str, other: str, expected: str) -> None:
    changed = caption_edits.edited({"one": caption}, caption_edits.EDITS[edit], text, other)
    assert changed == ({} if expected == caption else {"one": expected})


def test_tags_are_counted_once_a_caption() -> None:
    assert caption_edits.tag_counts(["a, b, a", "b", ""]) == [("b", 2), ("a", 1)]


@pytest.mark.parametrize(
    ("name", "caption"),
    [("red_panda-02.png", "red panda"), ("IMG_2034.jpg", ""), ("007.png", ""), ("x/big cat.png", "big cat")],
)
def test_a_caption_from_a_name(name: str, caption: str) -> None:
    assert caption_edits.from_name(name) == caption


# -- bringing files in ------------------------------------------------------------------------


def upload(folder: Path, tmp_path: Path, *files: tuple[str, bytes]) -> collection.Added:
    given = []
    for place, (name, content) in enumerate(files):
        source = tmp_path / f"upload-{place}"
        source.write_bytes(content)
        given.append((source, name))
    return collection.add_files(folder, given)


def test_captions_follow_their_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    added = upload(folder, tmp_path, ("a.txt", b"first"), ("a.png", b"1"), ("b.png", b"2"), ("c.txt", b"no picture"))
    assert added.pictures == ["a.png", "b.png"] and added.captions == ["a.png"]
    assert added.refused == [("c.txt", "there is no picture of the same name")]
    again = upload(folder, tmp_path, ("a.png", b"another"), ("a.txt", b"second"), ("b.txt", b"later"), ("b.png", b"2"))
    assert again.pictures == ["a-2.png"] and not again.refused
    assert collection.captions(folder) == {"a-2.png": "second", "a.png": "first", "b.png": "later"}


def test_two_pictures_never_share_a_caption_file(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    added = upload(folder, tmp_path, ("a.png", b"1"), ("a.jpg", b"2"), ("x/a.PNG", b"3"), ("a [1].png", b"4"))
    assert added.pictures == ["a.png", "a-2.jpg", "a-3.png", "a -1.png"]


HOSTILE = [
    *(
        "../../evil.png",
        "..\\..\\evil.png",
        "/etc/evil.png",
        "C:\\evil.png",
        ".evil.png",
        "...png",
        "evil.png/..",
        "a\0b.png",
    ),
    *(
        "..%2f..%2fevil.png",
        'con?<>|*".png',
        "\u202egnp.exe.png",
        "x" * 400 + ".png",
        "evil.png\n",
        "~/evil.png",
        "$(rm).png",
    ),
]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_upload_leaves_its_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "datasets" / "set"
    added = upload(folder, tmp_path, (name, b"1"))
    made = {file for file in tmp_path.rglob("*") if file.is_file() and not file.name.startswith("upload-")}
    assert made == {folder / name for name in added.pictures} and bool(made) != bool(added.refused)
    assert all(file.parent == folder and not file.name.startswith(".") for file in made)


@pytest.mark.parametrize(
    "name", ["../a.png", "/etc/passwd", "x/../../a.png", ".left-out/a.png", "", ".", "link.png", "\0"]
)
def test_no_name_leads_out_of_a_dataset(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "a.png").write_bytes(b"1")
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    for act in (lambda: collection.write_caption(folder, name, "x"), lambda: collection.leave_out(folder, [name])):
        with pytest.raises(DatasetError):
            act()
    assert not list(tmp_path.rglob("*.txt"))


def test_a_folder_is_copied_with_its_captions(tmp_path: Path, folder: Path) -> None:
    (folder / "10_zkw dog").mkdir()
    shutil.copy(folder / "bear.png", folder / "10_zkw dog" / "dog.png")
    (folder / "notes.pdf").write_bytes(b"x")
    copy = collection.new_folder(tmp_path / "datasets", "ten")
    collection.import_folder(folder, copy)
    assert copy.name == "ten-2" and collection.captions(copy) == collection.captions(folder)
    assert collection.captions(copy)["10_zkw dog/dog.png"] == "zkw dog"
    collection.write_caption(copy, "bear.png", "changed")
    assert (folder / "bear.txt").read_text().strip() == "bear" and not (copy / "notes.pdf").exists()


def test_five_hundred_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    names = [(f"picture {place}.png", str(place).encode()) for place in range(500)]
    texts = [(f"picture {place}.txt", f"caption {place}".encode()) for place in range(500)]
    assert len(upload(folder, tmp_path, *names, *texts).pictures) == 500
    assert collection.captions(folder)["picture 499.png"] == "caption 499"
