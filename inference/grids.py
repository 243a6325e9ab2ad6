"""inference.grids."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

MAX_GRID_IMAGES = 400  # pictures of a grid or a sheet

GAP = 4  # pixels between the pictures of a grid
FONT_SIZE = 13
MAX_CAPTION_LINES = 3  # of a caption
BAR, BAR_REST = "#2a6fbb", "#dddddd"


def to_uint8(x: Float[np.ndarray, "*n h w c"]) -> UInt8[np.ndarray, "*n h w c"]:
    """[-1, 1] to 0 … 255, clipped and rounded to the nearest; the inverse of v / 127.5 − 1."""
    x = np.asarray(x, np.float32)
    return np.rint(np.clip((x + 1) * 127.5, 0, 255)).astype(np.uint8)


def shrink_images(
    images: UInt8[np.ndarray, "*n h w c"], side: int | None
) -> UInt8[np.ndarray, "*n a b c"]:
    """Pictures of at most `side` pixels to a side, for sheets of many: the means of squares."""
    height, width, channels = images.shape[-3:]
    factor = math.ceil(max(height, width) / side) if side else 1
    if factor == 1:
        return images
    a, b = height // factor, width // factor
    cut = images[..., : a * factor, : b * factor, :]
    squares = cut.reshape(*images.shape[:-3], a, factor, b, factor, channels)
    return np.rint(squares.mean(axis=(-4, -2))).astype(np.uint8)


def image_grid(
    images: UInt8[np.ndarray, "n h w c"],
    *,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    min_side: int | None = None,
) -> Image.Image:
    """The pictures in rows, captions below them in up to `MOST_LINES` lines.

    They are enlarged by a whole factor to `min_side` pixels: by default 64, and for long captions
    up to 128.
    """
    images = np.asarray(images)
    n, height, width, channels = images.shape
    if images.dtype != np.uint8 or channels not in (1, 3):
        raise ValueError(
            f"a grid needs uint8 pictures of 1 or 3 channels, not {images.dtype} of {channels};"
            " decode latents first"
        )
    columns = columns or math.ceil(math.sqrt(n))
    font = ImageFont.load_default(size=FONT_SIZE)
    if min_side is None:
        min_side = _side_for(captions or (), font)
    scale = max(1, math.ceil(min_side / min(height, width)))
    cell_width, cell_height = width * scale, height * scale
    lines = [_lines(c, width=cell_width - 2, font=font) for c in captions or ()]  # glyphs overhang
    line_height = FONT_SIZE + GAP // 2
    step_x = cell_width + GAP
    step_y = cell_height + GAP + (max(map(len, lines)) * line_height + GAP // 2 if lines else 0)
    rows = math.ceil(n / columns)
    sheet = Image.new("RGB", (GAP + columns * step_x, GAP + rows * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(images):
        x, y = GAP + i % columns * step_x, GAP + i // columns * step_y
        large = to_pillow(picture).resize((cell_width, cell_height), Image.Resampling.NEAREST)
        sheet.paste(large, (x, y))
        for number, line in enumerate(lines[i] if lines else ()):
            middle = (x + cell_width / 2, y + cell_height + GAP / 2 + number * line_height)
            draw.text(middle, line, fill="black", font=font, anchor="ma")
    return sheet


def comparison_grid(
    images: UInt8[np.ndarray, "rows columns h w c"],
    *,
    rows: Sequence[str],
    columns: Sequence[str] = (),
) -> Image.Image:
    """Rows of pictures that are to be compared: the name of each row before it, and what stands for
    a whole column above it, in up to `MOST_LINES` lines.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    pictures = np.concatenate(list(images))
    cells = image_grid(pictures, columns=images.shape[1], min_side=_side_for(columns, font))
    step_x, step_y = ((side - GAP) // n for side, n in zip(cells.size, images.shape[1::-1]))
    lines = [_lines(name, width=step_x - GAP - 2, font=font) for name in columns]
    line_height = FONT_SIZE + GAP // 2
    left = GAP + math.ceil(max(map(font.getlength, rows)))
    top = max(map(len, lines)) * line_height + GAP if lines else 0
    sheet = Image.new("RGB", (left + cells.width, top + cells.height), "white")
    sheet.paste(cells, (left, top))
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(rows):
        middle = top + GAP + i * step_y + (step_y - GAP) / 2
        draw.text((left, middle), name, fill="black", font=font, anchor="rm")
    for i, several in enumerate(lines):
        middle = left + GAP + i * step_x + (step_x - GAP) / 2
        for above, line in enumerate(reversed(several)):
            draw.text(
                (middle, top - above * line_height), line, fill="black", font=font, anchor="md"
            )
    return sheet


def add_header(image: Image.Image, text: str, *, share: float | None = None) -> Image.Image:
    """The image under a line of text and, with `share` in 0 … 1, a bar of that part of its width:
    a frame of a film that tells how far it is.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    top = FONT_SIZE + 3 * GAP
    sheet = Image.new("RGB", (image.width, top + image.height), "white")
    sheet.paste(image, (0, top))
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), _fit(text, width=image.width - 2 * GAP, font=font), "black", font=font)
    if share is not None:
        length = image.width - 2 * GAP
        for part, colour in ((1.0, BAR_REST), (share, BAR)):
            right = GAP + round(length * part) - 1
            if right >= GAP:
                draw.rectangle((GAP, top - 1 - GAP // 2, right, top - 1), fill=colour)
    return sheet


def to_pillow(picture: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """A grey or a coloured picture as Pillow's."""
    return Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)


def save_png(image: Image.Image, path: str | Path) -> None:
    """Writes the whole file or nothing."""
    _replace(path, lambda file: image.save(file, format="PNG"))


def save_gif(
    frames: Sequence[Image.Image],
    path: str | Path,
    *,
    seconds_per_frame: float = 0.08,
    hold_last: float = 1.5,
) -> None:
    """An endless loop that rests on its last frame for `hold_last` seconds; whole or nothing."""
    seconds = [seconds_per_frame] * (len(frames) - 1) + [hold_last]
    milliseconds = [round(1000 * s) for s in seconds]
    options = {"save_all": True, "append_images": frames[1:], "loop": 0, "duration": milliseconds}
    _replace(path, lambda file: frames[0].save(file, format="GIF", **options))


def _lines(
    text: str, *, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
    """The text, broken between words; what is left over for the last line is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or len(lines) == MAX_CAPTION_LINES or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [_fit(line, width=width, font=font) for line in lines]


def _side_for(captions: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    """Pixels to a picture's side that leave room for its caption."""
    words = [word for caption in captions for word in caption.split()]
    needed = [font.getlength(text) / 2 for text in captions]
    needed += [font.getlength(word) + 2 for word in words]
    return math.ceil(np.clip(max(needed, default=0), 64, 128))


def _fit(text: str, *, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, cut so that it and an ellipsis fit: neighbours' captions must not run together."""
    shown = text
    while shown and font.getlength(shown) > width:
        text = text[:-1]
        shown = text + "…"
    return shown


def _replace(path: str | Path, write: Callable[[Path], object]) -> None:
    """Writes a neighbour and renames it, so that a reader or a crash never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # as in run_folder
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
