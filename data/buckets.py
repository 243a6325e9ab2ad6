"""Buckets: shapes of about one area, to which images of any proportions are cropped.

Each image goes to the bucket that is nearest in proportions, all images of a batch to one. What a
batch is of, and in which order, is `data.shuffle.BucketOrder`'s.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int32, Int64

from runtime.errors import UserError, count
from runtime.image_size import ImageSize

MAX_PROPORTION = 2.0  # of the longer side of a chosen shape to the shorter
MIN_AREA = 0.8  # of a chosen shape, as a share of the area asked for
MAX_BUCKETS = 31  # each is a program to compile


@dataclass(frozen=True, eq=False)
class Buckets:
    """The bucket of each row of a split.

    Args:
        shapes: of the buckets.
        ids: of each row, its bucket.
        cropped: of each row, the share of its pixels that is cropped away, where it is known; in
            letterboxes, the share of the pixels of its shape that are bars, which is the same.
        moved: of each shape that has too few rows for a batch, how many were nearest to it and were
            moved to others.
    """

    shapes: tuple[ImageSize, ...]
    ids: Int64[np.ndarray, "n"]
    cropped: Float64[np.ndarray, "n"] | None = None
    moved: tuple[tuple[ImageSize, int], ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of rows in each bucket."""
        return tuple(np.bincount(self.ids, minlength=len(self.shapes)).tolist())

    def describe(
        self, size: ImageSize, names: Sequence[str] = (), *, letterbox: bool = False
    ) -> list[str]:
        """Describe each bucket in a line, and what was moved.

        Args:
            size: of samples of the run.
            names: of the buckets, if they are not their shapes.
            letterbox: whether images are shown between bars and not cropped.
        """
        lost = "in black bars" if letterbox else "of their pixels cropped away"
        n = count(len(self.shapes), "bucket")
        lines = [f"{n} (height x width), one compiled program each:"]
        for i, (shape, n_rows) in enumerate(zip(self.shapes, self.sizes)):
            line = f"  {names[i] if names else shape.in_full}: {count(n_rows, 'image')}"
            if self.cropped is not None and n_rows:
                share = self.cropped[self.ids == i].mean()
                line += f", {100 * share:.1f} % {lost}"
            lines.append(line)
        for shape, n_rows in self.moved:
            lines.append(
                f"  {count(n_rows, 'image')} of {shape.in_full}, too few for a batch, "
                "moved to the nearest other"
            )
        if size not in self.shapes or not self.sizes[self.shapes.index(size)]:
            lines.append(
                f"  samples of the run have the shape of image_size, {size.in_full}, which no "
                "bucket has: it does not train on it"
            )
        return lines


def canonical_words(words: Sequence[str]) -> tuple[str, ...]:
    """Return the one way to write the words of `--buckets`, if they are shapes."""
    if len(words) == 1 and words[0].isdecimal():
        return tuple(words)
    with contextlib.suppress(UserError):
        return tuple(ImageSize.parse(word).in_full for word in words)
    return tuple(words)


def resolve_shapes(words: Sequence[str], size: ImageSize, multiple: int) -> tuple[ImageSize, ...]:
    """Return the shapes that `--buckets` names, or as many as it asks for.

    Args:
        words: a number alone, or shapes such as 320x192.
        size: whose area chosen shapes have.
        multiple: that their sides are of.

    Raises:
        UserError: they are no shapes, or shapes that the patches do not divide.
    """
    if len(words) == 1 and words[0].isdecimal():
        return choose_shapes(int(words[0]), size, multiple)
    shapes = []
    for word in words:
        try:
            shape = ImageSize.parse(word)
        except UserError:
            raise UserError(
                f"--buckets {' '.join(words)}: takes one number, such as 5, or several shapes, "
                "such as 256x256 320x192"
            ) from None
        if shape.divided(multiple) is None:
            raise UserError(f"--buckets {word}: both sides must be multiples of {multiple}")
        shapes.append(shape)
    if len(set(shapes)) < len(shapes):
        raise UserError(f"--buckets {' '.join(words)}: a shape is named twice")
    return tuple(shapes)


def choose_shapes(n: int, size: ImageSize, multiple: int) -> tuple[ImageSize, ...]:
    """Choose n shapes between 1:2 and 2:1, evenly spaced in the logarithm of their proportions, of
    at most the area of `size`, which is one of them. Fewer if the multiples allow no more.

    Raises:
        UserError: n is out of range.
    """
    if not 1 <= n <= MAX_BUCKETS or n % 2 == 0:
        raise UserError(
            f"--buckets {n}: must be an odd number up to {MAX_BUCKETS}, so that the shape of "
            "image_size is one of them"
        )
    if n == 1:
        return (size,)
    candidates = {size, *_shapes_of_area(size.height * size.width, multiple)}
    limit = math.log(MAX_PROPORTION)
    chosen = {
        min(candidates, key=lambda shape: (abs(_log_proportion(shape) - target), -_area(shape)))
        for target in np.linspace(-limit, limit, n).tolist()
    }
    nearest = min(chosen, key=lambda shape: abs(_log_proportion(shape) - _log_proportion(size)))
    return tuple(sorted((chosen - {nearest}) | {size}, key=_log_proportion))


def _shapes_of_area(area: int, multiple: int) -> Iterator[ImageSize]:
    """Yield shapes of at most this area, and not much less, each with its transpose."""
    for short in range(multiple, math.isqrt(area) + 1, multiple):
        long = area // short // multiple * multiple
        long = min(long, int(MAX_PROPORTION * short) // multiple * multiple)
        if short * long >= MIN_AREA * area:
            yield from (ImageSize(short, long), ImageSize(long, short))


def assign_buckets(
    sides: Int32[np.ndarray, "n 2"], shapes: Sequence[ImageSize], *, batch_size: int = 1
) -> Buckets:
    """Assign each image to the shape that is nearest in the logarithm of the proportions. Shapes
    that have too few images for a batch are left out, the smallest first, as long as there are
    others: their images go to the nearest that is left.

    Args:
        batch_size: 0 to leave out none.
        sides: height and width of each image; zeros, of one that cannot be read, are a square.
    """
    sides = np.where(sides < 1, 1, sides).astype(np.float64)
    proportions = np.log(sides[:, 1] / sides[:, 0])
    ids = _nearest(proportions, shapes)
    n_nearest = np.bincount(ids, minlength=len(shapes)).tolist()
    left, sizes = list(shapes), np.array(n_nearest)
    while sizes.min() < batch_size and len(left) > 1:
        del left[int(sizes.argmin())]
        ids = _nearest(proportions, left)
        sizes = np.bincount(ids, minlength=len(left))
    moved = [(shape, n) for shape, n in zip(shapes, n_nearest) if n and shape not in left]
    return Buckets(tuple(left), ids, _cropped_share(sides, ids, left), tuple(moved))


def _nearest(
    proportions: Float64[np.ndarray, "n"], shapes: Sequence[ImageSize]
) -> Int64[np.ndarray, "n"]:
    distances = [abs(proportions - _log_proportion(shape)) for shape in shapes]
    return np.argmin(distances, axis=0).astype(np.int64)


def _cropped_share(
    sides: Float64[np.ndarray, "n 2"], ids: Int64[np.ndarray, "n"], shapes: Sequence[ImageSize]
) -> Float64[np.ndarray, "n"]:
    """Share of an image outside the largest part of it that has the proportions of its bucket."""
    wanted = np.array([shape.sides for shape in shapes], np.float64)[ids]
    scale = (wanted / sides).max(1, keepdims=True)
    return 1 - (wanted / scale / sides).prod(1)


def _area(shape: ImageSize) -> int:
    return shape.height * shape.width


def _log_proportion(shape: ImageSize) -> float:
    return math.log(shape.width / shape.height)
