"""Image files from outside: which ones are accepted, checked before they are decoded."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from wmcache.common.errors import UserError
from wmcache.common.paths import AnyPath
from wmcache.pipeline.importers.videos import MOST_PIXELS

IMAGES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
"""Suffix -> Pillow's name of the format."""
MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})


def identify(data: bytes, formats: list[str], where: AnyPath | str) -> Image.Image:
    """Open an image of one of these formats (Pillow's names), not decoded yet.

    Raises UserError for another format, size or kind; any error of Pillow's for a damaged file.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:  # its text is an address in memory
        raise UserError(
            f"{where} is no {' or '.join(formats)} image; replace the file, or correct its suffix"
        ) from None
    if image.width * image.height > MOST_PIXELS:
        raise UserError(f"{where} has {image.width} x {image.height} pixels, too many for a frame")
    if image.mode not in MODES:
        raise UserError(f"{where} has other colours ({image.mode}) than RGB or grey; save it as RGB")
    # An MPO file of a phone or a 3D camera is a JPEG followed by other views; Pillow opens the first one.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise UserError(f"{where} contains several images; save a single one")
    if image.format == "PNG":
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()  # decoding skips the checksums of pixels
    return image


def has_16_bits(image: Image.Image, data: bytes) -> bool:
    """Return whether an image has more than 8 bits per channel, of which Pillow would read 8 where it has colours."""
    return image.format == "PNG" and data[24] > 8
