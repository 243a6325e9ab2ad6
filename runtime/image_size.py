"""Sizes of images, in pixels or latents: height and width, the height first.

A size is written as one number if it is square, `256`, and as `256x192` otherwise: on the command
line, in every JSON file and in messages. Configs hold it as it is written; who needs the two sides
asks `ImageSize.parse`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from runtime.errors import UserError

WrittenSize = Annotated[int | str, "256, or 256x192: height x width"]


@dataclass(frozen=True)
class ImageSize:
    """Height and width.

    Raises:
        UserError: one of them is below 1.
    """

    height: int
    width: int

    def __post_init__(self):
        if min(self.sides) < 1:
            raise UserError(f"image_size {self}: must be at least 1")

    @classmethod
    def parse(cls, written: WrittenSize, name: str = "image_size") -> "ImageSize":
        """Read a size as it is written.

        Args:
            name: of the setting, in errors.

        Raises:
            UserError: the text is no size.
        """
        if isinstance(written, int):
            return cls(written, written)
        match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", written)
        if not match:
            raise UserError(
                f"{name} '{written}': must be a number of pixels such as 256, or HEIGHTxWIDTH "
                "such as 256x192"
            )
        if not all(int(side) for side in match.groups(default="1")):
            raise UserError(f"{name} {written}: must be at least 1")
        return cls(int(match[1]), int(match[2] or match[1]))

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def in_full(self) -> str:
        """Both sides as a text, also of a square: 256x256."""
        return f"{self.height}x{self.width}"

    @property
    def is_square(self) -> bool:
        """True if both sides are equal."""
        return self.height == self.width

    @property
    def written(self) -> int | str:
        """The size as configs and JSON files hold it: a square's side, or a text."""
        return self.height if self.is_square else self.in_full

    def __str__(self) -> str:
        return str(self.written)

    def divided(self, factor: int) -> "ImageSize | None":
        """The size in patches, or in latents, of `factor` pixels to a side; None if one of the
        sides is no multiple of that.
        """
        if self.height % factor or self.width % factor:
            return None
        return ImageSize(self.height // factor, self.width // factor)

    def times(self, factor: int) -> "ImageSize":
        """The size in pixels of patches, or of latents, of `factor` pixels to a side."""
        return ImageSize(self.height * factor, self.width * factor)


def format_shape(shape: Iterable[int]) -> str:
    """Write (height, width, channels), or the first two, as 16×24×3."""
    return "×".join(map(str, shape))


def canonical_size(written: WrittenSize) -> int | str:
    """Return the one way to write a size: `32x32` is 32.

    Raises:
        UserError: the text is no size.
    """
    return written if isinstance(written, int) else ImageSize.parse(written).written
