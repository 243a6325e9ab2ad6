"""Grids of images, comparison grids with row and column names, and GIFs of them.

Takes uint8 pixels and text, and knows nothing of models. What is compared is chosen in
`comparisons.py`.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from inference import fonts
from inference.fonts import FONT_SIZE
from runtime.errors import UserError
from runtime.files import atomic_file

MAX_GRID_IMAGES = 400
MAX_CAPTION_LINES = 3

GAP = 4  # pixels between the images of a grid
LINE_HEIGHT = FONT_SIZE + GAP // 2
BAR_COLOR, BAR_BACKGROUND = "#2a6fbb", "#dddddd"
# A word and the space before it, or one Chinese or Japanese character.
UNSPACED = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
BREAKABLE = re.compile(rf" ?(?:[{UNSPACED}]|[^ {UNSPACED}]+)")


# --- pixels ---------------------------------------------------------------------------------------


class NotFiniteError(UserError):
    """Images with NaN or infinity in them: as bytes they would be black, and look like a result."""


def round_to_nearest(x: Float[np.ndarray, "*n"]) -> UInt8[np.ndarray, "*n"]:
    """Round −1 … 1 to the nearest byte, halves to the even one: the inverse of v / 127.5 − 1."""
    return np.rint(np.clip((x + 1) * 127.5, 0, 255)).astype(np.uint8)


def round_half_up(x: Float[np.ndarray, "*n"]) -> UInt8[np.ndarray, "*n"]:
    """Round −1 … 1 as DiT and SiT do: clip(127.5·x + 128), truncated."""
    return np.clip(127.5 * x + 128, 0, 255).astype(np.uint8)


def round_down(x: Float[np.ndarray, "*n"]) -> UInt8[np.ndarray, "*n"]:
    """Round −1 … 1 as ADM and REPA do: clip((x + 1)·127.5), truncated. REPA's 255·(x + 1) / 2 has
    the same bits, since a division by 2 is exact.
    """
    return np.clip((x + 1) * 127.5, 0, 255).astype(np.uint8)


ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "nearest": round_to_nearest,
    "half_up": round_half_up,
    "down": round_down,
}


def to_uint8(
    x: Float[np.ndarray, "*n h w c"],
    *,
    first: int = 0,
    kind: str = "sample",
    rounding: str = "nearest",
) -> UInt8[np.ndarray, "*n h w c"]:
    """Convert [−1, 1] to 0 … 255, clipped and rounded.

    Args:
        first: the index of the first image, for the error.
        kind: noun for an image in the error.
        rounding: a key of `ROUNDINGS`.

    Raises:
        NotFiniteError: an image holds NaN or infinity.
    """
    x = np.asarray(x, np.float32)
    is_bad = np.atleast_1d(~np.isfinite(x).all(axis=(-3, -2, -1)))
    if is_bad.any():
        n = is_bad.shape[-1]
        # Axes before that of the samples are steps or guidance scales.
        bad = np.flatnonzero(is_bad.reshape(-1, n).any(axis=0))
        raise NotFiniteError(
            f"{kind} {first + bad[0]} (counted from 0) is not finite: NaN or infinity in "
            f"{len(bad)} of {n} images"
        )
    return ROUNDINGS[rounding](x)


def to_pillow(image: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """Convert a grey or RGB image to Pillow's."""
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)


def shrink_images(
    images: UInt8[np.ndarray, "*n h w c"], side: int | None
) -> UInt8[np.ndarray, "*n a b c"]:
    """Shrink images by a whole factor to at most `side` pixels a side, averaging squares."""
    height, width, channels = images.shape[-3:]
    factor = math.ceil(max(height, width) / side) if side else 1
    if factor == 1:
        return images
    a, b = height // factor, width // factor
    cropped = images[..., : a * factor, : b * factor, :]
    squares = cropped.reshape(*images.shape[:-3], a, factor, b, factor, channels)
    return np.rint(squares.mean(axis=(-4, -2))).astype(np.uint8)


# --- grids ----------------------------------------------------------------------------------------


def image_grid(
    images: UInt8[np.ndarray, "n h w c"],
    *,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    min_side: int | None = None,
) -> Image.Image:
    """Lay out images in rows, captions below them in up to `MAX_CAPTION_LINES` lines.

    Args:
        columns: by default such that the grid is about square, for images of any proportions.
        min_side: images are enlarged by a whole factor to at least this many pixels; by default 64,
            and up to 128 for long captions.

    Raises:
        ValueError: the images are not uint8 with 1 or 3 channels.
    """
    images = np.asarray(images)
    n, height, width, channels = images.shape
    if images.dtype != np.uint8 or channels not in (1, 3):
        raise ValueError(
            f"a grid needs uint8 images of 1 or 3 channels, not {images.dtype} of {channels};"
            " decode latents first"
        )
    n_columns: int = columns or min(n, math.ceil(math.sqrt(n * height / width)))
    if min_side is None:
        min_side = _side_for_captions(captions or ())
    scale = max(1, math.ceil(min_side / min(height, width)))
    cell_width, cell_height = width * scale, height * scale
    # Two pixels are left free, as glyphs overhang.
    lines = [_wrap(text, width=cell_width - 2) for text in captions or ()]
    caption_height = max(map(len, lines)) * LINE_HEIGHT + GAP // 2 if lines else 0
    step_x, step_y = cell_width + GAP, cell_height + GAP + caption_height
    rows = math.ceil(n / n_columns)
    canvas = Image.new("RGB", (GAP + n_columns * step_x, GAP + rows * step_y), "white")
    for i, image in enumerate(images):
        x, y = GAP + i % n_columns * step_x, GAP + i // n_columns * step_y
        enlarged = to_pillow(image).resize((cell_width, cell_height), Image.Resampling.NEAREST)
        canvas.paste(enlarged, (x, y))
        for line_number, line in enumerate(lines[i] if lines else ()):
            top_middle = (x + cell_width / 2, y + cell_height + GAP / 2 + line_number * LINE_HEIGHT)
            fonts.draw_text(canvas, top_middle, line, anchor="ma")
    return canvas


def comparison_grid(
    images: UInt8[np.ndarray, "rows columns h w c"],
    *,
    rows: Sequence[str],
    columns: Sequence[str] = (),
) -> Image.Image:
    """Lay out rows of images to compare.

    Args:
        rows: the name before each row.
        columns: the text above each column, in up to `MAX_CAPTION_LINES` lines.
    """
    n_rows, n_columns = images.shape[:2]
    min_side = _side_for_captions(columns)
    cells = image_grid(np.concatenate(list(images)), columns=n_columns, min_side=min_side)
    step_x, step_y = (cells.width - GAP) // n_columns, (cells.height - GAP) // n_rows
    lines = [_wrap(text, width=step_x - GAP - 2) for text in columns]
    left = GAP + math.ceil(max(map(fonts.text_length, rows)))
    top = max(map(len, lines)) * LINE_HEIGHT + GAP if lines else 0
    canvas = Image.new("RGB", (left + cells.width, top + cells.height), "white")
    canvas.paste(cells, (left, top))
    for i, name in enumerate(rows):
        middle = top + GAP + i * step_y + (step_y - GAP) / 2
        fonts.draw_text(canvas, (left, middle), name, anchor="rm")
    for i, column_lines in enumerate(lines):
        middle = left + GAP + i * step_x + (step_x - GAP) / 2
        for n_below, line in enumerate(reversed(column_lines)):
            bottom = top - n_below * LINE_HEIGHT
            fonts.draw_text(canvas, (middle, bottom), line, anchor="md")
    return canvas


def add_header(image: Image.Image, text: str, *, progress: float | None = None) -> Image.Image:
    """Put a line of text above an image, for a frame of a GIF.

    Args:
        progress: in 0 … 1, the filled part of a progress bar below the text.
    """
    top = FONT_SIZE + 3 * GAP
    canvas = Image.new("RGB", (image.width, top + image.height), "white")
    canvas.paste(image, (0, top))
    draw = ImageDraw.Draw(canvas)
    length = image.width - 2 * GAP
    fonts.draw_text(canvas, (GAP, GAP), _truncate(text, width=length), anchor="la")
    if progress is not None:
        for part, color in ((1.0, BAR_BACKGROUND), (progress, BAR_COLOR)):
            right = GAP + round(length * part) - 1
            if right >= GAP:
                draw.rectangle((GAP, top - 1 - GAP // 2, right, top - 1), fill=color)
    return canvas


# --- files ----------------------------------------------------------------------------------------


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write the whole file or nothing; its folder is created if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, sync=False) as file:
        image.save(file, format="PNG")


def save_gif(
    frames: Sequence[Image.Image],
    path: str | Path,
    *,
    seconds_per_frame: float = 0.08,
    hold_last: float = 1.5,
) -> None:
    """Write an endless loop, the whole file or nothing; its folder is created if need be.

    Args:
        hold_last: seconds for which the last frame stays.
    """
    seconds = [seconds_per_frame] * (len(frames) - 1) + [hold_last]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, sync=False) as file:
        frames[0].save(
            file,
            format="GIF",
            save_all=True,
            append_images=frames[1:],
            loop=0,
            duration=[round(1000 * s) for s in seconds],
        )


# --- text -----------------------------------------------------------------------------------------


def _side_for_captions(captions: Sequence[str]) -> int:
    """Pixels to an image's side that leave room for its caption, in 64 … 128."""
    words = [word for caption in captions for word in caption.split()]
    needed = [fonts.text_length(text) / 2 for text in captions]
    needed += [fonts.text_length(word) + 2 for word in words]
    return math.ceil(np.clip(max(needed, default=0), 64, 128))


def _wrap(text: str, *, width: int) -> list[str]:
    """Break a text between words, or between characters of scripts that write no spaces, into at
    most `MAX_CAPTION_LINES` lines, and truncate each.
    """
    lines = [""]
    for piece in BREAKABLE.findall(" ".join(text.split())):
        longer = lines[-1] + piece
        if len(lines) < MAX_CAPTION_LINES and lines[-1] and fonts.text_length(longer) > width:
            lines.append(piece.lstrip())
        else:
            lines[-1] = longer
    return [_truncate(line, width=width) for line in lines]


def _truncate(text: str, *, width: int) -> str:
    """Cut a text so that it and an ellipsis fit: neighbouring captions must not run together."""
    shortened = text
    while shortened and fonts.text_length(shortened) > width:
        text = text[:-1]
        shortened = text + "…"
    return shortened
