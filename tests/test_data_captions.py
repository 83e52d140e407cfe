"""Where captions come from, and what happens to those that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from studio.data.captions import decode_text
from studio.data.images import NO_CAPTION, ImageFolder, scan_folder
from studio.errors import DatasetError


def add(path: Path, caption: str | bytes | None = None, suffix: str = ".txt") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = [*path.as_posix().encode()]
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    if caption is not None:
        path.with_suffix(suffix).write_bytes(caption if isinstance(caption, bytes) else caption.encode())


def captions(scanned: ImageFolder) -> dict[str, str]:
    return {item.path.name: item.caption for item in scanned.items}


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_sidecars(tmp_path: Path, suffix: str) -> None:
    add(tmp_path / "a.b.png", "  a dog,\n on grass \n", suffix)
    assert captions(scan_folder(tmp_path)) == {"a.b.png": "a dog, on grass"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    add(tmp_path / "a.png", "ein Käfer, 甲虫".encode(encoding))
    assert captions(scan_folder(tmp_path)) == {"a.png": "ein Käfer, 甲虫"}


@pytest.mark.parametrize("data", ["Käfer".encode("cp1252"), "dog".encode("utf-16-le"), "甲虫".encode("shift-jis")])
def test_other_encodings_leave_the_picture_out(tmp_path: Path, data: bytes) -> None:
    add(tmp_path / "a.png", data)
    add(tmp_path / "good.png", "good")
    scanned = scan_folder(tmp_path)
    assert captions(scanned) == {"good.png": "good"}
    (entry,) = scanned.left_out
    assert entry.path.name == "a.png"
    assert "caption file a.txt: " in entry.reason and "save it again as UTF-8" in entry.reason
    assert "a.txt" in scanned.report()


def test_utf_16_cut_in_a_character() -> None:
    with pytest.raises(Exception, match="not valid UTF-8 or UTF-16"):
        decode_text("dog".encode("utf-16")[:-1])


def test_no_caption_is_noted(tmp_path: Path) -> None:
    add(tmp_path / "a.png")
    add(tmp_path / "b.png", " \n")
    scanned = scan_folder(tmp_path)
    assert captions(scanned) == {"a.png": "", "b.png": ""}
    assert f"{NO_CAPTION}: a.png, b.png" in scanned.report()


def test_text_without_picture_is_noted(tmp_path: Path) -> None:
    add(tmp_path / "a.png", "a")
    (tmp_path / "a.png.txt").write_text("b")
    (tmp_path / "notes.md").write_text("c")
    report = scan_folder(tmp_path).report()
    assert "not used: a.png.txt" in report and "other files, not used: 1 .md" in report


def test_kohya_folders(tmp_path: Path) -> None:
    add(tmp_path / "10_sks dog" / "a.png")
    add(tmp_path / "10_sks dog" / "b.png", "b, sitting")
    add(tmp_path / "3_x_y" / "deep" / "c.png")
    add(tmp_path / "plain" / "d.png", "d")
    add(tmp_path / "0_off" / "e.png", "e")
    scanned = scan_folder(tmp_path)
    assert captions(scanned) == {"a.png": "sks dog", "b.png": "b, sitting", "c.png": "x_y", "d.png": "d"}
    assert [item.repeats for item in scanned.items] == [10, 10, 3, 1]
    assert scanned.left_out[0].reason == "its folder's name asks for 0 repeats"
    report = scanned.report()
    assert report.startswith(f"4 pictures in {tmp_path}, 24 an epoch")
    assert "repeated 10 times an epoch, captioned 'sks dog' where nothing else is: 10_sks dog" in report


def test_kohya_form_of_the_folder_itself_is_noted(tmp_path: Path) -> None:
    add(tmp_path / "10_dog" / "a.png")
    scanned = scan_folder(tmp_path / "10_dog")
    assert (scanned.items[0].caption, scanned.items[0].repeats) == ("", 1)
    assert "counts below the dataset folder only" in scanned.report()


def test_metadata_jsonl(tmp_path: Path) -> None:
    add(tmp_path / "a.png")
    add(tmp_path / "train" / "b.png")
    rows = [{"file_name": "a.png", "text": "a\u2028cat"}, {"file_name": "train/b.png", "caption": "b"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines += ["{broken", json.dumps({"file_name": "gone.png", "text": "x"}), '{"text": "x"}', "[1]", ""]
    (tmp_path / "metadata.jsonl").write_text("\r\n".join(lines), "utf-8")
    scanned = scan_folder(tmp_path)
    assert captions(scanned) == {"a.png": "a cat", "b.png": "b"}
    reasons = {f"{entry.path.name}: {entry.reason}" for entry in scanned.left_out}
    assert "gone.png: named in metadata.jsonl, but no such picture" in reasons
    assert "metadata.jsonl: line 5 has no file_name, or neither text nor caption" in reasons
    assert any(reason.startswith("metadata.jsonl: line 3 is not JSON") for reason in reasons)
    assert "metadata.jsonl: line 6 is not a JSON object" in reasons


def test_metadata_csv_in_a_subfolder(tmp_path: Path) -> None:
    add(tmp_path / "train" / "a.png")
    (tmp_path / "train" / "metadata.csv").write_text('file_name,text\na.png,"a cat, ""asleep"""\n', "utf-8-sig")
    assert captions(scan_folder(tmp_path)) == {"a.png": 'a cat, "asleep"'}


def test_metadata_without_the_columns(tmp_path: Path) -> None:
    add(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("image,prompt\na.png,cat\n")
    with pytest.raises(DatasetError, match=r"file_name and text \(or caption\), but its columns are image, prompt"):
        scan_folder(tmp_path)


def test_metadata_not_utf_8(tmp_path: Path) -> None:
    add(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,Käfer\n".encode("cp1252"))
    with pytest.raises(DatasetError, match="metadata.csv: not valid UTF-8"):
        scan_folder(tmp_path)


def test_precedence_and_conflict(tmp_path: Path) -> None:
    add(tmp_path / "5_name" / "a.png", "from txt")
    (tmp_path / "5_name" / "a.caption").write_text("from caption")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "5_name/a.png", "text": "from metadata"}')
    scanned = scan_folder(tmp_path)
    assert captions(scanned) == {"a.png": "from txt"}
    assert "captions differ between a.txt, a.caption, metadata; used is a.txt" in scanned.report()
    (tmp_path / "5_name" / "a.txt").unlink()
    (tmp_path / "5_name" / "a.caption").unlink()
    assert captions(scan_folder(tmp_path)) == {"a.png": "from metadata"}
