"""One picture file to RGB pixels, or the reason why it cannot be used."""

from __future__ import annotations

import io
import logging
import struct
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError, features

log = logging.getLogger(__name__)

EXTENSIONS = frozenset(
    [".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"]
    + ([".avif"] if features.check("avif") else [])
)
MAX_PIXELS = 89_478_485  # Pillow's own limit for decompression bombs: 256 MiB of 24-bit pixels
MIN_SIDE = 16  # pixels
MODES = frozenset(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16L", "I;16B"])
SEVERAL_FRAMES = "several frames: only the first is used"


TRANSPOSE = {  # EXIF orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnusablePicture(Exception):
    """The reason why a picture is left out, with the fix, as a message for the user."""


def verify(path: Path) -> tuple[tuple[int, int], bool]:
    """((width, height) as seen, whether further frames are ignored). Size and mode are judged by the header,
    before any pixel is decoded; then every pixel is decoded once, since damage shows only there.

    Raises UnusablePicture.
    """
    try:
        if path.stat().st_size == 0:
            raise UnusablePicture("the file is empty (0 bytes): copy or export it again")
        with Image.open(path) as image:
            _check_header(image)
            # The second image in MPO, which phones save as .jpg, is a preview or a depth map: not worth a note.
            several = getattr(image, "is_animated", False) and image.format != "MPO"
            image.load()
            width, height = image.size
            return ((height, width) if _orientation(image) >= 5 else (width, height)), several
    except UnusablePicture:
        raise
    except Image.DecompressionBombError as error:  # beyond twice its limit, Pillow raises instead of giving a size
        raise UnusablePicture(_too_large("the picture")) from error
    except UnidentifiedImageError as error:
        raise UnusablePicture("not a picture in any format that can be read: export it again as PNG or JPEG") from error
    except Exception as error:  # Pillow's decoders raise whatever their parsing ran into
        raise UnusablePicture(f"damaged or cut off ({str(error) or type(error).__name__}): export it again") from error


def open_rgb(path: Path) -> Image.Image:
    """The first frame as 8-bit sRGB, turned upright by its EXIF orientation, transparency over white.

    Raises what Pillow raises when the file is missing or damaged.
    """
    with Image.open(path) as image:
        image.load()
        orientation = _orientation(image)
        rgb = _to_rgb(image, str(path))
    return rgb.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else rgb


def _too_large(what: str) -> str:
    side = int(MAX_PIXELS**0.5)
    return f"{what} is over the limit of {MAX_PIXELS / 1e6:.0f} megapixels: scale it down to {side} x {side} or less"


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnusablePicture(_too_large(f"{width} x {height}"))
    if min(width, height) < MIN_SIDE:
        raise UnusablePicture(f"{width} x {height} is too small: each side needs {MIN_SIDE} pixels or more")
    if image.mode not in MODES:
        raise UnusablePicture(f"colour mode {image.mode} is not supported: save it as 8-bit or 16-bit RGB or grey")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of a loaded image, 1 to 8. TIFF is upright once loaded, and says 1."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):  # broken EXIF, good pixels
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips 16-bit grey at 255 instead of scaling it
        return Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    profile = image.info.get("icc_profile")
    if profile and image.mode == "CMYK":
        return _to_srgb(image, profile, name)
    rgb = _over_white(image) if image.has_transparency_data else image.convert("RGB")
    # The profile of a grey picture has one channel, and grey needs none to become RGB.
    return _to_srgb(rgb, profile, name) if profile and image.mode not in ("1", "L", "LA") else rgb


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return white.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    """Through the embedded ICC profile; the plain conversion, with a warning, when the profile is unusable."""
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        assert converted is not None  # it is None only for a conversion in place
        return converted
    except (ImageCms.PyCMSError, OSError) as error:
        log.warning("%s: its colour profile is unusable and not applied: %s", name, error)
        return image.convert("RGB")
