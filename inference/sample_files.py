"""Many pictures of one `Drawable`: drawn in batches, and kept so that what was interrupted goes on.

    pictures = drawn.of(Drawable.of_run(Path("runs/digits")), DrawConfig(n=1000))

What is kept is an .npz in the layout of the ADM suite, or a folder with a file for each picture.
"""

import json
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from data.image_sets import Batch, PictureSet, written
from inference import grids
from inference.labels import SampleRequest, by_turns
from inference.sampler import Samples
from inference.trained_model import SamplingOverrides, SamplingPlan, TrainedModel
from runtime.errors import UserError
from runtime.files import atomic, report_unwritable, tidy
from runtime.run_folder import locked

CARD = "card.json"
MOST_LETTERS = 40  # of a label in a file's name
Draw = Callable[[int], Batch]  # the pictures of a batch, by the place of its first


@dataclass(frozen=True)
class DrawConfig(SamplingOverrides):
    """What to draw for an evaluation, and how; what is None is as in the run.

    Args:
        n: how many pictures, as many of each class.
    """

    n: int = 50_000
    seed: int = 0
    batch_size: int = 64


def of(drawable: TrainedModel, config: DrawConfig, *, samples: Path | None = None) -> PictureSet:
    """The pictures that an evaluation looks at, which are drawn as they are asked for.

    Args:
        samples: an .npz that they are written to. Until it is whole, they are kept beside it.

    Raises:
        UserError: this cannot draw from it.
    """
    c, size = config, min(config.batch_size, config.n)
    subjects, how = by_turns(drawable, c.n, seed=c.seed), drawable.how(c)
    draw, starts = drawer(drawable, subjects, how, size), range(0, c.n, size)
    card = describe(drawable, subjects, how)
    if samples is None:
        return PictureSet(c.n, lambda _: map(draw, starts), card)
    return PictureSet(c.n, lambda _: kept(draw, starts, samples, subjects.which, card), card)


def drawer(drawable: TrainedModel, subjects: SampleRequest, how: SamplingPlan, size: int) -> Draw:
    """What draws a batch of so many pictures."""
    n = len(subjects.which)

    def draw(start: int) -> Batch:
        # The last batch is filled up, so that all are one compiled program.
        labels, told = subjects.rows(start, start + size)
        found = drawable.sample(labels, how, batch_size=size, **told)
        return grids.to_uint8(found.x[: n - start])

    return draw


def part_of(whole: Callable[[], Samples], size: int) -> Draw:
    """What draws all of them, once the first are asked for."""
    return lambda start: grids.to_uint8(whole().x[start : start + size])


def describe(drawable: TrainedModel, subjects: SampleRequest, how: SamplingPlan) -> dict[str, Any]:
    """All that pictures depend on, for the card beside them."""
    card = {"sampler": asdict(how.sampler), "cfg_scale": how.cfg_scale, "seed": subjects.seed}
    return card | drawable.card | {"count": len(subjects.which)}


# --- what is kept ---------------------------------------------------------------------------------


def kept(
    draw: Draw,
    starts: range,
    samples: Path,
    labels: Int[np.ndarray, "n"],
    card: dict[str, Any],
) -> Generator[Batch]:
    """The batches, which are written to the .npz `samples` too. What an earlier process drew is
    read: until all is written, batches are in a folder beside it.
    """
    parts = parts_of(samples)

    def part(start: int) -> Path:
        return parts / f"{start:09}.npy"

    def keep(start: int, batch: Batch) -> None:
        with atomic(part(start)) as file:
            np.save(file, batch)

    with taken(parts, card | {"batch_size": starts.step}):
        ready = ensured(draw, starts, is_kept=lambda s: part(s).exists(), keep=keep)
        batches = (np.load(part(start)) for start in ready)
        yield from written(batches, parts / samples.name, labels)
        (parts / samples.name).replace(samples)
        for path in parts.glob("*.npy"):  # the card last: without it the rest would be a stranger's
            path.unlink()
        shutil.rmtree(parts)


def parts_of(samples: Path) -> Path:
    """The folder beside an .npz that holds what is drawn of it."""
    return samples.with_name(f"{samples.name}.parts")


def begun_by(samples: Path) -> int | None:
    """How many pictures at a time an .npz was begun with that is not whole yet.

    Raises:
        UserError: its card is damaged.
    """
    return (read_card(parts_of(samples)) or {}).get("batch_size")


def in_folder(
    draw: Draw,
    starts: range,
    folder: Path,
    labels: Sequence[str],
    card: dict[str, Any],
) -> Generator[int]:
    """The batches as PNG files in a folder, each named by a picture's place and label, beside a
    card. Yields how many pictures there are, batch by batch.
    """
    n = len(labels)

    def files(start: int) -> list[Path]:
        some = range(start, min(start + starts.step, n))
        return [folder / file_name(place, n, labels[place]) for place in some]

    def keep(start: int, batch: Batch) -> None:
        for picture, file in zip(batch, files(start), strict=True):
            grids.save_png(grids.as_image(picture), file)

    def is_kept(start: int) -> bool:
        return all(file.exists() for file in files(start))

    with taken(folder, card | {"batch_size": starts.step}):
        for start in ensured(draw, starts, is_kept=is_kept, keep=keep):
            yield len(files(start))


def file_name(place: int, n: int, label: str) -> str:
    """Of a picture, so that names sort as places do: 000007_cat.png."""
    word = re.sub(r"\W+", "-", label)[:MOST_LETTERS].strip("-")
    return f"{place:0{max(6, len(str(n - 1)))}}{'_' * bool(word)}{word}.png"


def ensured(
    draw: Draw,
    starts: range,
    *,
    is_kept: Callable[[int], bool],
    keep: Callable[[int, Batch], object],
) -> Generator[int]:
    """The place of each batch, once it is kept: it is drawn unless it is there already, of a
    process that ended somehow.
    """
    for start in starts:
        if not is_kept(start):
            keep(start, draw(start))
        yield start


@contextmanager
def taken(folder: Path, card: dict[str, Any]) -> Iterator[None]:
    """A folder of drawn pictures, new or begun with the same card, for this process alone.

    Raises:
        UserError: it was begun with other settings, holds something else, or cannot be written to;
            another process is writing there.
    """
    require_ours(folder)
    with report_unwritable(folder):
        folder.mkdir(exist_ok=True)
        with locked(folder):
            tidy(folder)
            take_up(folder, card)
            yield


def require_ours(folder: Path) -> None:
    """Raises UserError if a folder holds files, and no card that tells how they were drawn."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file; name a folder that is new")
    if not folder.is_dir() or (folder / CARD).exists():
        return
    if strangers := sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")):
        raise UserError(
            f"'{folder}' holds other files, such as {strangers[0]}; name a folder that is new"
        )


def take_up(folder: Path, card: dict[str, Any]) -> None:
    """Write the card of a new folder, or compare it.

    Raises:
        UserError: the folder was begun with other settings, which are named.
    """
    told, before = json.loads(json.dumps(card, default=str)), read_card(folder)
    if before is None:
        with atomic(folder / CARD) as record:
            record.write(json.dumps(told, indent=2).encode() + b"\n")
        return
    if changed := list(differences(before, told)):
        raise UserError(
            f"'{folder}' was begun with other settings: {'; '.join(changed)}; go on with those, "
            "remove it, or write elsewhere"
        )


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of a folder, if there is one."""
    file = folder / CARD
    try:
        return dict(json.loads(file.read_text())) if file.exists() else None
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from None


def differences(before: dict[str, Any], now: dict[str, Any]) -> Generator[str]:
    """What differs, in words."""
    for name in before | now:
        was, become = before.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(become, dict):
            yield from differences(was, become)
        elif was != become:
            yield f"{name} was {shortened(was)}, not {shortened(become)}"


def shortened(value: Any) -> str:
    words = str(value)
    return words if len(words) <= 60 else f"{words[:60]}…"
