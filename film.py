"""How a run learned to draw: the sheets that training left, one after the other.

Pillow only. The sheets are read as they lie in the folder; nothing is drawn anew.
"""

import re
from pathlib import Path

from PIL import Image

import images
from errors import UserError

NAME = "progress.gif"
FINAL = "final.png"
NUMBERED = re.compile(r"(\d+)\.png")
SECONDS_PER_FRAME, MOST_SECONDS, HOLD_LAST = 0.8, 12.0, 2.5


def save(sheets: Path, path: Path, *, last: int | None = None) -> None:
    """Write the film of a folder of sheets as a .gif: a frame for each, with its step.

    Args:
        last: the step of the final sheet, if there is one and it is of the end of the run.

    Raises:
        UserError: there are no sheets, or one cannot be read.
    """
    found = steps(sheets, last)
    n_steps = max(1, *(step for step, _ in found)) if found else 1
    frames = [
        images.headed(opened(file), f"step {step:,} of {n_steps:,}", share=step / n_steps)
        for step, file in found
    ]
    if not frames:
        raise UserError(f"there are no sheets of samples in {sheets} yet")
    pace = min(SECONDS_PER_FRAME, MOST_SECONDS / len(frames))
    images.save_gif(same_size(frames), path, seconds_per_frame=pace, hold_last=HOLD_LAST)


def steps(sheets: Path, last: int | None) -> list[tuple[int, Path]]:
    """The sheets and their steps, in order. The final one is left out where its step has a sheet
    already, or others are beyond it: a run that goes on leaves the one of its earlier end.
    """
    numbered = [(NUMBERED.fullmatch(file.name), file) for file in sheets.glob("*.png")]
    found = sorted((int(match[1]), file) for match, file in numbered if match)
    final = sheets / FINAL
    if last is not None and final.exists() and all(step < last for step, _ in found):
        found.append((last, final))
    return found


def opened(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow calls a damaged PNG a syntax error
        raise UserError(f"{file} cannot be read: {error}") from None


def same_size(frames: list[Image.Image]) -> list[Image.Image]:
    """Sheets of other labels have other sizes: each on white, as large as the largest."""
    size = max(f.width for f in frames), max(f.height for f in frames)
    padded = []
    for frame in frames:
        whole = Image.new("RGB", size, "white")
        whole.paste(frame, ((size[0] - frame.width) // 2, 0))
        padded.append(whole)
    return padded
