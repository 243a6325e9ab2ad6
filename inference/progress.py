"""A GIF of how a run's samples improved: the grids that training saved, one after the other.

Reads the grids from the run's folder; samples nothing and needs no weights.
"""

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from inference import grids
from runtime.errors import UserError

PROGRESS_FILE = "progress.gif"
FINAL_GRID = "final.png"
NUMBERED_GRID = re.compile(r"(\d+)\.png")
SECONDS_PER_FRAME, MAX_SECONDS, HOLD_LAST = 0.8, 12.0, 2.5
MAX_FRAMES = 100  # all of them are in memory


def save_progress_gif(folder: Path, path: Path, *, last_step: int | None = None) -> None:
    """Write the grids of a folder as a .gif, a frame for each, with its step in the header. Of many
    grids it shows `MAX_FRAMES`.

    Args:
        last_step: the run's last step, which the final grid is of; None leaves that grid out.

    Raises:
        UserError: there are no grids, or one cannot be read.
    """
    numbered_files = thin_out(find_grids(folder, last_step), MAX_FRAMES)
    if not numbered_files:
        raise UserError(f"there are no grids of samples in {folder} yet")
    n_steps = max(1, numbered_files[-1][0])
    size = common_size([file for _, file in numbered_files])
    frames = [
        grids.add_header(
            paste_on_white(file, size),
            f"step {step:,} of {n_steps:,}",
            progress=step / n_steps,
        )
        for step, file in numbered_files
    ]
    seconds_per_frame = min(SECONDS_PER_FRAME, MAX_SECONDS / len(frames))
    grids.save_gif(frames, path, seconds_per_frame=seconds_per_frame, hold_last=HOLD_LAST)


def find_grids(folder: Path, last_step: int | None) -> list[tuple[int, Path]]:
    """The grids and their steps, in order.

    The final grid is left out if there is a numbered one of its step or a later one: a resumed run
    has the final grid of its earlier end.
    """
    matches = [(NUMBERED_GRID.fullmatch(file.name), file) for file in folder.glob("*.png")]
    numbered_files = sorted((int(match[1]), file) for match, file in matches if match)
    final = folder / FINAL_GRID
    if (
        last_step is not None
        and final.exists()
        and all(step < last_step for step, _ in numbered_files)
    ):
        numbered_files.append((last_step, final))
    return numbered_files


def thin_out(numbered_files: list[tuple[int, Path]], max_n: int) -> list[tuple[int, Path]]:
    """Choose up to `max_n`, evenly, the last one among them: the end of each of `max_n` parts."""
    total = len(numbered_files)
    n = min(total, max_n)
    return [numbered_files[(i + 1) * total // n - 1] for i in range(n)]


@contextmanager
def open_image(file: Path) -> Generator[Image.Image]:
    """Open an image. Raises UserError if it cannot be read."""
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError) as error:  # Pillow calls a damaged PNG a syntax error
        raise UserError(f"{file} cannot be read: {error}") from None


def common_size(files: list[Path]) -> tuple[int, int]:
    """The greatest width and height: grids of other labels have other sizes."""
    sizes = []
    for file in files:
        with open_image(file) as image:  # reads the file's header only
            sizes.append(image.size)
    return max(width for width, _ in sizes), max(height for _, height in sizes)


def paste_on_white(file: Path, size: tuple[int, int]) -> Image.Image:
    """Read an image and centre it at the top of a white canvas."""
    canvas = Image.new("RGB", size, "white")
    with open_image(file) as image:
        canvas.paste(image.convert("RGB"), ((size[0] - image.width) // 2, 0))
    return canvas
