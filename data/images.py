"""Decoding of image files to uint8 arrays, with NumPy and Pillow.

Nothing here knows of datasets: the caller adds the row and column to an error. Latents are decoded
by a VAE, elsewhere; grids and image files that people look at are `inference.grids`'.
"""

import io
import math
import re

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from runtime.errors import UserError
from runtime.image_size import ImageSize

# First bytes of the common formats.
SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|BM|II\*\0|MM\0\*|RIFF....WEBP|....ftypavif", re.DOTALL
)
# Pillow's modes.
SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
GREY_MODES = ("1", "L", "LA", "La", "F", *SIXTEEN_BIT_MODES)
OPAQUE_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
# Files that have the name of an image and are none, by their first bytes (or those from the fifth).
OTHER_CONTENT = {
    b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
    b"/annex/objects/": "a git-annex pointer: run `git annex get`",
    b"%PDF": "a PDF",
    b"ftyphei": "HEIC, which Pillow does not open: convert it to JPEG",
    b"ftypmif1": "HEIC, which Pillow does not open: convert it to JPEG",
    b"ftypavi": "",  # AVIF: Pillow says what is wrong with it
    b"ftyp": "a video",
}
MARKUP = {
    b"<!doctype html": "an HTML page: download the image again",
    b"<html": "an HTML page: download the image again",
    b"<svg": "SVG: convert it to PNG",
}
MAX_REASON = 60  # characters of Pillow's own words
MAX_QUOTE = 40  # characters of a text that are shown


def decode_image(
    raw: bytes | Image.Image,
    *,
    channels: int,
    size: ImageSize,
    place: float | None = None,
    letterbox: bool = False,
) -> UInt8[np.ndarray, "h w c"]:
    """Decode the largest part of an image that has the proportions of `size`, and resize it.

    Args:
        raw: the content of a file, or an image of Pillow's.
        channels: 1 (grey) or 3 (RGB).
        size: of the result.
        place: in [0, 1), where the part lies between the two ends of the image; None for the
            middle.
        letterbox: show all of the image instead, in the middle between black bars.

    Raises:
        UserError: see `open_upright`.
    """
    image = open_upright(raw)
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (size.width, size.height):
        if letterbox:
            image = _letterbox(image, size)
        else:
            part = image.crop(_crop_box(image, size, place))
            # Antialiased as it shrinks.
            image = part.resize((size.width, size.height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(*size.sides, channels)


def _letterbox(image: Image.Image, size: ImageSize) -> Image.Image:
    """Resize an image to fit into `size`, to the nearest pixel, with black around it."""
    scale = min(size.width / image.width, size.height / image.height)
    width, height = max(round(scale * image.width), 1), max(round(scale * image.height), 1)
    fitted = image.resize((width, height), Image.Resampling.BICUBIC)
    framed = Image.new(image.mode, (size.width, size.height))
    framed.paste(fitted, ((size.width - width) // 2, (size.height - height) // 2))
    return framed


def _crop_box(
    image: Image.Image, size: ImageSize, place: float | None
) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the largest part with the proportions of `size`, to the
    nearest pixel.
    """
    width = min(image.width, round(image.height * size.width / size.height))
    height = min(image.height, round(image.width * size.height / size.width))
    width, height = max(width, 1), max(height, 1)
    left, top = (
        n_left // 2 if place is None else math.floor(place * (n_left + 1))
        for n_left in (image.width - width, image.height - height)
    )
    return left, top, left + width, top + height


def open_upright(raw: bytes | Image.Image) -> Image.Image:
    """Open an image as it is meant to be seen, opaque and with 8 bits, in some mode of Pillow's.

    EXIF orientation is applied, transparent pixels lie over white, 16-bit greys are scaled.

    Raises:
        UserError: this is not a complete image of at least 2 × 2 pixels.
    """
    try:
        image = raw if isinstance(raw, Image.Image) else Image.open(io.BytesIO(raw))
        _check_size(image)
        image.load()  # a truncated file fails here and not in a later conversion
        return _to_opaque(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except (Exception, Image.DecompressionBombWarning) as error:
        # Pillow's parsers raise anything from SyntaxError to struct.error on a damaged file.
        reason = str(error).partition("<")[0].strip()  # Pillow names the buffer it read from
        reason = reason[:MAX_REASON] or type(error).__name__
        if isinstance(raw, bytes):
            reason = name_content(raw) or reason
        raise UserError(f"the image cannot be read ({reason})") from error


def is_grey(image: Image.Image) -> bool:
    """Return whether an opened image has no colours, by its mode or its palette."""
    if image.mode != "P":
        return image.mode in GREY_MODES
    palette = np.array(image.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())


def name_content(raw: bytes) -> str:
    """Name the content of a file that is no image of a known format; "" if it is not known."""
    if raw.count(0) == len(raw):
        return "nothing but zeros" if raw else "the file is empty"
    start = raw[:1000].lstrip(b"\xef\xbb\xbf \t\r\n")
    for mark, content in OTHER_CONTENT.items():
        if start.startswith(mark) or raw[4:].startswith(mark):
            return content
    is_markup = start.startswith(b"<")
    for tag, content in MARKUP.items():
        if is_markup and tag in start.lower():
            return content
    text = start.decode(errors="replace").rstrip("\ufffd")  # a character cut in two
    words = " ".join(text.split())
    if words.isprintable() and "\ufffd" not in words:
        return f"text: '{words[:MAX_QUOTE]}'"
    return ""


def _check_size(image: Image.Image) -> None:
    if min(image.size) < 2:
        raise UserError(f"the image is {image.width} × {image.height} pixels, too small to use")
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise UserError(f"an image of {image.width} × {image.height} pixels is too large to open")


def _to_opaque(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BIT_MODES:
        return _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in OPAQUE_MODES:
        raise UserError(f"images of Pillow's mode {image.mode} have no defined range of values")
    return image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale greys from 0 … 65535 to 0 … 255, rounded; Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UserError("the grey values of a 16-bit image must lie in 0 … 65535")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
