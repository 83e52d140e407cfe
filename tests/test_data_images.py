"""Folders of pictures: what is used, what is left out, and what is said about it."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from studio.data import decode
from studio.data.decode import open_rgb
from studio.data.images import ImageFolder, scan_folder
from studio.errors import DatasetError


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png_header(path: Path, width: int, height: int) -> None:
    """A complete one-bit PNG of any size, without holding its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(1), bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    path.write_bytes(b"".join(parts))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One good picture, so that what is added to it decides only about itself."""
    picture().save(tmp_path / "good.png")
    (tmp_path / "good.txt").write_text("a good one", "utf-8")
    return tmp_path


def reason(scanned: ImageFolder, name: str) -> str:
    """Why `name` is left out: the only one left out, and present in the report."""
    assert [item.path.name for item in scanned.items] == ["good.png"]
    (entry,) = scanned.left_out
    assert entry.path.name == name
    assert f"{name}: {entry.reason}" in scanned.report()
    return entry.reason


def notes(scanned: ImageFolder, name: str) -> str:
    return "\n".join(note.text for note in scanned.notes if note.path.name == name)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nowhere does not exist") as caught:
        scan_folder(tmp_path / "nowhere")
    assert caught.value.exit_code == 3


def test_a_file_is_not_a_folder(folder: Path) -> None:
    with pytest.raises(DatasetError, match="is not a folder"):
        scan_folder(folder / "good.png")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"No pictures in .* looked for .*\.jpg .*found no files"):
        scan_folder(tmp_path)


def test_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "IMG_1.HEIC").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DatasetError, match=r"found only 1 \.heic, 1 \.txt"):
        scan_folder(tmp_path)


def test_nothing_usable_names_each_reason(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    picture(8, 8).save(tmp_path / "b.png")
    with pytest.raises(DatasetError, match=r"(?s)can be used.*a\.png: .*empty.*b\.png: 8 x 8 is too small"):
        scan_folder(tmp_path)


def test_truncated_jpeg(folder: Path) -> None:
    picture(256, 256).save(folder / "bad.jpg")
    data = (folder / "bad.jpg").read_bytes()
    (folder / "bad.jpg").write_bytes(data[: len(data) // 2])
    assert "truncated" in reason(scan_folder(folder), "bad.jpg")


@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif", ".bmp", ".tif"])
def test_truncated_others(folder: Path, suffix: str) -> None:
    picture(256, 256).save(folder / f"bad{suffix}")
    data = (folder / f"bad{suffix}").read_bytes()
    (folder / f"bad{suffix}").write_bytes(data[: len(data) // 2])
    assert "export it again" in reason(scan_folder(folder), f"bad{suffix}")


def test_zero_byte_png(folder: Path) -> None:
    (folder / "bad.png").touch()
    assert "0 bytes" in reason(scan_folder(folder), "bad.png")


def test_not_a_picture(folder: Path) -> None:
    (folder / "bad.jpg").write_text("<html>404</html>")
    assert "not a picture" in reason(scan_folder(folder), "bad.jpg")


def test_huge_png_is_refused_by_its_header(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png_header(folder / "bad.png", 20_000, 20_000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded") if self.width > 48 else None)
    text = reason(scan_folder(folder), "bad.png")
    assert text == "the picture is over the limit of 89 megapixels: scale it down to 9459 x 9459 or less"


def test_large_png_is_refused_with_its_size(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    png_header(folder / "bad.png", 10_000, 10_000)
    assert "10000 x 10000 is over the limit of 89 megapixels" in reason(scan_folder(folder), "bad.png")
    assert not recwarn.list


def test_too_small(folder: Path) -> None:
    picture(200, 15).save(folder / "bad.png")
    assert reason(scan_folder(folder), "bad.png").startswith("200 x 15 is too small")


def test_float_tiff(folder: Path) -> None:
    Image.new("F", (32, 32)).save(folder / "bad.tif")
    assert "colour mode F" in reason(scan_folder(folder), "bad.tif")


def test_exact_duplicate_with_the_same_caption(folder: Path) -> None:
    for name, caption in (("same", "a good one"), ("other", "another")):
        (folder / f"{name}.png").write_bytes((folder / "good.png").read_bytes())
        (folder / f"{name}.txt").write_text(caption)
    scanned = scan_folder(folder)
    assert [item.path.name for item in scanned.items] == ["good.png", "other.png"]
    assert scanned.items[0].id == scanned.items[1].id
    assert scanned.left_out[0].reason == "same picture and caption as good.png"


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (32, 32), (255, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert len(scan_folder(tmp_path).items) == 1
    assert open_rgb(tmp_path / "a.jpg").mode == "RGB"
    assert open_rgb(tmp_path / "a.jpg").getpixel((16, 16)) == (0, 255, 255)


def test_broken_colour_profile_is_said_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("CMYK", (32, 32), (255, 0, 0, 0)).save(tmp_path / "a.jpg", icc_profile=b"nonsense")
    assert open_rgb(tmp_path / "a.jpg").getpixel((16, 16)) == (0, 255, 255)
    assert "a.jpg: its colour profile is unusable" in caplog.text


def test_colour_profile_is_applied(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"_XYZ").replace(b"bXYZ", b"rXYZ").replace(b"_XYZ", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "sBGR".encode("utf-16-be"))
    for name, profile in (("srgb", srgb), ("swapped", swapped)):
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{name}.png", icc_profile=profile)
    assert open_rgb(tmp_path / "srgb.png").getpixel((0, 0)) == (255, 0, 0)
    red, _, blue = open_rgb(tmp_path / "swapped.png").getpixel((0, 0))
    assert red < 10 and blue > 245


def test_animated_gif_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    scanned = scan_folder(tmp_path)
    assert decode.SEVERAL_FRAMES in notes(scanned, "a.gif") and decode.SEVERAL_FRAMES in scanned.report()
    assert open_rgb(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, suffix: str, orientation: int) -> None:
    if suffix not in decode.EXTENSIONS:
        pytest.skip("this Pillow cannot read it")
    upright = Image.new("RGB", (64, 32), "black")
    ImageDraw.Draw(upright).rectangle((0, 0, 31, 15), fill="white")  # the top left quarter
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270} | {
        k: v for k, v in decode.TRANSPOSE.items() if k not in (6, 8)
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a{suffix}", exif=exif, quality=95)
    (item,) = scan_folder(tmp_path).items
    assert (item.width, item.height) == (64, 32)
    seen = open_rgb(item.path).convert("L")
    corners = [seen.getpixel(xy) > 128 for xy in ((5, 5), (58, 5), (5, 27), (58, 27))]
    assert seen.size == (64, 32) and corners == [True, False, False, False]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_keeps_the_picture(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0garbage")
    assert scan_folder(tmp_path).items[0].width == 48


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_over_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 16, 32))
    image.convert(mode).save(tmp_path / "a.png")
    seen = open_rgb(tmp_path / "a.png")
    assert seen.getpixel((0, 0)) == (0, 0, 0) and seen.getpixel((31, 0)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (32, 1))
    Image.fromarray(ramp).save(tmp_path / f"a{suffix}")
    assert len(scan_folder(tmp_path).items) == 1
    seen = np.asarray(open_rgb(tmp_path / f"a{suffix}"))
    assert np.array_equal(seen[..., 0], ramp >> 8) and np.array_equal(seen[..., 0], seen[..., 2])


@pytest.mark.parametrize("suffix", sorted(decode.EXTENSIONS))
def test_every_extension(tmp_path: Path, suffix: str) -> None:
    kind = {".apng": "PNG", ".jfif": "JPEG"}.get(suffix)
    picture().save(tmp_path / f"A{suffix.upper()}", format=kind)
    (item,) = scan_folder(tmp_path).items
    assert (item.width, item.height, item.repeats) == (48, 32, 1)


def test_order_is_by_path_and_hidden_files_are_skipped(tmp_path: Path) -> None:
    for seed, name in enumerate(["b/x.png", "a.png", "c/d/y.png", ".hidden.png", ".git/z.png", "__MACOSX/._a.png"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=seed).save(tmp_path / name)
    paths = [item.path.relative_to(tmp_path).as_posix() for item in scan_folder(tmp_path).items]
    assert paths == ["a.png", "b/x.png", "c/d/y.png"]


def test_a_link_to_a_parent_ends(folder: Path) -> None:
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    assert len(scan_folder(folder).items) == 1


def test_report_stays_short(folder: Path) -> None:
    for number in range(30):
        (folder / f"{number:02}.png").touch()
    lines = scan_folder(folder).report().splitlines()
    assert lines[0] == f"1 picture in {folder}, 1 an epoch"
    assert lines[1] == "Left out: 30" and lines[-1] == "  and 10 more" and len(lines) == 23
