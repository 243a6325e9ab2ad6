"""How a run learned to draw: the sheets that training left, one after the other.

Pillow only. The sheets are read as they lie in the folder; nothing is drawn anew.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from inference import grids
from runtime.errors import UserError

PROGRESS_FILE = "progress.gif"
FINAL_GRID = "final.png"
NUMBERED = re.compile(r"(\d+)\.png")
SECONDS_PER_FRAME, MAX_SECONDS, HOLD_LAST = 0.8, 12.0, 2.5
MAX_FRAMES = 100  # all of them are in memory


def save_progress_gif(sheets: Path, path: Path, *, last: int | None = None) -> None:
    """Write the film of a folder of sheets as a .gif: a frame for each, with its step. Of many
    sheets it shows `MOST_FRAMES`.

    Args:
        last: the step of the final sheet, if there is one and it is of the end of the run.

    Raises:
        UserError: there are no sheets, or one cannot be read.
    """
    found = thin_out(find_grids(sheets, last), MAX_FRAMES)
    if not found:
        raise UserError(f"there are no sheets of samples in {sheets} yet")
    n_steps = max(1, found[-1][0])
    size = common_size([file for _, file in found])
    frames = [
        grids.add_header(paste_on_white(file, size), f"step {step:,} of {n_steps:,}", share=step / n_steps)
        for step, file in found
    ]
    pace = min(SECONDS_PER_FRAME, MAX_SECONDS / len(frames))
    grids.save_gif(frames, path, seconds_per_frame=pace, hold_last=HOLD_LAST)


def find_grids(sheets: Path, last: int | None) -> list[tuple[int, Path]]:
    """The sheets and their steps, in order. The final one is left out where its step has a sheet
    already, or others are beyond it: a run that goes on leaves the one of its earlier end.
    """
    numbered = [(NUMBERED.fullmatch(file.name), file) for file in sheets.glob("*.png")]
    found = sorted((int(match[1]), file) for match, file in numbered if match)
    final = sheets / FINAL_GRID
    if last is not None and final.exists() and all(step < last for step, _ in found):
        found.append((last, final))
    return found


def thin_out(found: list[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """Up to `most` of them, the last one among them."""
    n = min(len(found), most)
    return [found[(i + 1) * len(found) // n - 1] for i in range(n)]


@contextmanager
def open_image(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError) as error:  # Pillow calls a damaged PNG a syntax error
        raise UserError(f"{file} cannot be read: {error}") from None


def common_size(files: list[Path]) -> tuple[int, int]:
    """Room for each: sheets of other labels have other sizes."""
    sizes = []
    for file in files:
        with open_image(file) as image:  # which reads its size alone
            sizes.append(image.size)
    return max(width for width, _ in sizes), max(height for _, height in sizes)


def paste_on_white(file: Path, size: tuple[int, int]) -> Image.Image:
    whole = Image.new("RGB", size, "white")
    with open_image(file) as image:
        whole.paste(image.convert("RGB"), ((size[0] - image.width) // 2, 0))
    return whole
