"""A size is written in one way, height first, or refused in one line."""

from dataclasses import dataclass

import pytest

from runtime import cli
from runtime.errors import UserError
from runtime.flags import flag
from runtime.image_size import ImageSize, WrittenSize, canonical_size, format_shape


@dataclass(frozen=True)
class Config:
    """Frame it."""

    image_size: WrittenSize = flag(8, "of the frame")
    size: WrittenSize | None = flag(None, "of the wall")


@pytest.mark.parametrize(
    ("written", "sides", "canonical"),
    [
        (32, (32, 32), 32),
        ("32", (32, 32), 32),
        ("32x32", (32, 32), 32),
        ("256x192", (256, 192), "256x192"),
        ("3×5", (3, 5), "3x5"),
    ],
)
def test_every_spelling_is_one_size(written, sides, canonical):
    size = ImageSize.parse(written)
    assert size.sides == sides
    assert size.written == canonical_size(written) == canonical
    assert ImageSize.parse(size.written) == size
    assert type(size.written) is type(canonical)
    flags = cli.parse_flags(Config, ["--image_size", str(written), "--size", "none"])
    assert (flags.image_size, flags.size) == (canonical, None)


@pytest.mark.parametrize(
    "text", ["256x", "x32", "0x32", "32x0", "256*192", "192x256x3", "1.5", "-4x4", "a", ""]
)
def test_another_text_is_refused_in_one_line(text):
    with pytest.raises(UserError, match=r"^image_size .*: must be "):
        ImageSize.parse(text)
    expected = f"--image_size '{text}': expected a number of pixels or HEIGHTxWIDTH"
    with pytest.raises(UserError) as caught:
        cli.parse_flags(Config, [f"--image_size={text}"])
    assert str(caught.value) == expected


def test_sizes_are_divided_exactly_or_not_at_all():
    size = ImageSize(16, 24)
    assert size.divided(8) == ImageSize(2, 3) and ImageSize(2, 3).times(8) == size
    assert size.divided(3) is None and size.divided(16) is None
    assert format_shape((*size.sides, 3)) == "16×24×3"
