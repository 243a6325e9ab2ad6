"""An image is decoded as a person sees it, whatever its mode, or is refused with a reason."""

import io

import numpy as np
import pytest
from PIL import Image

from data import images
from inference import grids
from runtime.errors import UserError
from runtime.image_size import ImageSize

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 6), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)


def file(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def rgb(raw: bytes, size: int | str = 6) -> np.ndarray:
    return images.decode_image(raw, channels=3, size=ImageSize.parse(size))


def grey(raw: bytes, size: int = 6) -> np.ndarray:
    return images.decode_image(raw, channels=1, size=ImageSize(size, size))[..., 0]


def test_a_grey_image_is_unchanged_or_three_equal_channels():
    raw = file(Image.fromarray(GREY))
    assert (grey(raw) == GREY).all()
    assert (rgb(raw) == GREY[..., None]).all()


def test_a_coloured_image_is_unchanged_or_its_luma():
    raw = file(Image.fromarray(COLOUR))
    assert (rgb(raw) == COLOUR).all()
    luma = COLOUR @ [0.299, 0.587, 0.114]
    assert np.abs(grey(raw) - luma).max() <= 1


def test_an_image_of_pillows_is_decoded_like_a_file():
    decoded = images.decode_image(Image.fromarray(COLOUR), channels=3, size=ImageSize(6, 6))
    assert (decoded == COLOUR).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_lie_over_white(mode):
    alpha = np.where(np.arange(36).reshape(6, 6) % 2, 255, 0).astype(np.uint8)
    opaque = np.repeat(GREY[..., None], 3, -1) if mode == "LA" else COLOUR
    layers = [GREY, alpha] if mode == "LA" else [*np.moveaxis(COLOUR, -1, 0), alpha]
    raw = file(Image.merge(mode, [Image.fromarray(layer) for layer in layers]))
    assert (rgb(raw) == np.where(alpha[..., None], opaque, 255)).all()


def test_half_transparency_mixes_with_white():
    raw = file(Image.new("RGBA", (6, 6), (0, 100, 200, 128)))
    assert np.abs(rgb(raw)[0, 0].astype(int) - [127, 177, 227]).max() <= 1


def palette_image() -> Image.Image:
    image = Image.fromarray((GREY % 4).astype(np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    return image


def test_palettes_are_looked_up():
    raw = file(palette_image())
    table = np.arange(10, 130, 10, dtype=np.uint8).reshape(4, 3)
    assert Image.open(io.BytesIO(raw)).mode == "P"
    assert (rgb(raw) == table[GREY % 4]).all()


def test_a_palettes_transparent_entry_is_white():
    raw = file(palette_image(), transparency=2)
    assert (rgb(raw)[GREY % 4 == 2] == 255).all()
    assert (rgb(raw)[GREY % 4 == 1] == [40, 50, 60]).all()


def test_cmyk_becomes_rgb():
    raw = file(Image.new("CMYK", (6, 6), (0, 255, 255, 0)), "TIFF")
    assert Image.open(io.BytesIO(raw)).mode == "CMYK"
    assert (rgb(raw) == [255, 0, 0]).all()
    assert np.abs(grey(raw).astype(int) - 76).max() <= 1  # the luma of red


def test_one_bit_is_black_and_white():
    raw = file(Image.fromarray(GREY > 127))
    assert Image.open(io.BytesIO(raw)).mode == "1"
    assert (grey(raw) == np.where(GREY > 127, 255, 0)).all()


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_are_scaled_and_rounded(mode):
    values = np.linspace(0, 65535, 36).round().astype(np.uint16).reshape(6, 6)
    image = Image.fromarray(values if mode == "I;16" else values.astype(np.int32))
    raw = file(image, "TIFF")
    assert Image.open(io.BytesIO(raw)).mode == mode
    assert (grey(raw) == np.rint(values / 65535 * 255)).all()
    assert (rgb(raw)[..., 1] == grey(raw)).all()


def test_every_8_bit_value_survives_16_bits():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    assert (grey(file(Image.fromarray(values)), 16).ravel() == np.arange(256)).all()


def test_a_portrait_photograph_stands_upright():
    lying = Image.new("RGB", (64, 32), "red")
    lying.paste("blue", (0, 0, 32, 32))  # the left half, which orientation 6 turns to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = images.open_upright(file(lying, "JPEG", exif=exif, quality=95))
    assert upright.size == (32, 64)
    top, bottom = upright.getpixel((16, 8)), upright.getpixel((16, 56))
    assert top[2] > 200 > 50 > top[0] and bottom[0] > 200 > 50 > bottom[2]  # type: ignore


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(10, 6, "6"), (6, 10, "6"), (6, 7, "6x6"), (6, 20, "6x9"), (10, 6, "8x6"), (6, 10, "6x3")],
)
def test_the_middle_is_cut_exactly(height, width, size):
    h, w = ImageSize.parse(size).sides
    whole = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    top, left = (height - h) // 2, (width - w) // 2
    cut = whole[top : top + h, left : left + w]
    assert (rgb(file(Image.fromarray(whole)), size) == cut).all()


def test_a_place_from_one_end_to_the_other():
    whole = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    for size, image in ((ImageSize(6, 6), whole), (ImageSize(6, 6), whole.swapaxes(0, 1))):
        image = np.ascontiguousarray(image)
        for place, first in ((0.0, 0), (0.2499, 0), (0.25, 1), (None, 1), (0.75, 3), (0.9999, 3)):
            cut = image[:, first : first + 6] if len(image) == 6 else image[first : first + 6]
            decoded = images.decode_image(
                Image.fromarray(image), channels=3, size=size, place=place
            )
            assert (decoded == cut).all()


@pytest.mark.parametrize("shape", [(40, 60), (90, 30), (33, 100)])
def test_the_shape_is_covered_and_nothing_is_stretched(shape):
    """Coordinates of the pixels: they grow equally along both axes, from the middle."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    both = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
    decoded = rgb(file(Image.fromarray(both)), "20x10").astype(float)
    scale = min(shape[0] / 20, shape[1] / 10)
    down = np.diff(decoded[2:-2, :, 0], axis=0).mean()
    across = np.diff(decoded[:, 2:-2, 1], axis=1).mean()
    assert (down, across) == pytest.approx((scale, scale), rel=0.05)
    middle = decoded[..., :2].mean((0, 1))
    np.testing.assert_allclose(middle, (np.array(shape) - 1) / 2, atol=0.6)


def letterbox(image: np.ndarray, size: str) -> np.ndarray:
    raw, options = file(Image.fromarray(image)), {"channels": 3, "size": ImageSize.parse(size)}
    return images.decode_image(raw, **options, letterbox=True)


@pytest.mark.parametrize(
    ("shape", "size"), [((4, 6), "6"), ((6, 3), "6x6"), ((6, 9), "12x9"), ((5, 6), "6x6")]
)
def test_a_letterbox_is_the_whole_image_between_black_bars(shape, size):
    whole = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = np.zeros((*ImageSize.parse(size).sides, 3), np.uint8)
    top, left = ((n - side) // 2 for n, side in zip(expected.shape, shape))
    expected[top : top + shape[0], left : left + shape[1]] = whole
    np.testing.assert_array_equal(letterbox(whole, size), expected)


def test_a_letterbox_is_resized_as_a_cropped_image_and_has_no_bars_where_it_fits():
    whole = RNG.integers(0, 256, (30, 20, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        letterbox(whole, "12x8"), rgb(file(Image.fromarray(whole)), "12x8")
    )
    framed = letterbox(whole, "12")
    np.testing.assert_array_equal(framed[:, 2:10], letterbox(whole, "12x8"))
    assert not framed[:, :2].any() and not framed[:, 10:].any()
    line = np.full((2, 400, 3), 255, np.uint8)
    assert (letterbox(line, "12").max((1, 2)) > 0).sum() == 1  # never nothing


def test_shrinking_averages_and_does_not_skip():
    stripes = np.tile(np.array([0, 255], np.uint8), (32, 16))  # every other column white
    small = grey(file(Image.fromarray(stripes)), 4)
    assert np.abs(small.astype(int) - 127).max() < 16


def test_growing_keeps_the_mean():
    large = grey(file(Image.new("L", (3, 3), 77)), 12)
    assert (large == 77).all()


def damaged() -> dict[str, bytes]:
    png, jpeg = file(Image.fromarray(COLOUR)), file(Image.new("RGB", (64, 64)), "JPEG")
    return {
        "empty": b"",
        "text": b"this is no image",
        "half a PNG": png[: len(png) // 2],
        "half a JPEG": jpeg[: len(jpeg) // 2],
        "flipped bits": png[:40] + bytes(b ^ 255 for b in png[40:]),
        "floats": file(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
        "beyond 16 bits": file(Image.fromarray(np.full((6, 6), 70_000, np.int32)), "TIFF"),
        "one pixel": file(Image.new("L", (1, 1))),
        "one column": file(Image.new("L", (1, 40))),
    }


@pytest.mark.parametrize("damage", damaged())
def test_an_incomplete_image_is_refused(damage):
    with pytest.raises(UserError, match="image"):
        rgb(damaged()[damage])


@pytest.mark.parametrize("limit", [20, 30])  # 36 pixels: more than Pillow's limit, less than twice
def test_a_decompression_bomb_is_refused(monkeypatch, limit):
    raw = file(Image.fromarray(COLOUR))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit if limit == 30 else 10)
    with pytest.raises(UserError, match="pixels"):
        rgb(raw)


def test_to_uint8_inverts_the_models_range_and_clips():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert (grids.to_uint8(every / 127.5 - 1) == every).all()
    assert grids.to_uint8(np.array([[[-9.0, 9.0]]])).tolist() == [[[0, 255]]]


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_a_grid_is_about_square(shape):
    grid = grids.image_grid(np.zeros((20, *shape, 1), np.uint8))
    assert 1 / 2 < grid.width / grid.height < 2


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_has_every_image_enlarged_in_its_place(channels):
    samples = RNG.integers(0, 256, (5, 8, 8, channels), dtype=np.uint8)
    grid = np.asarray(grids.image_grid(samples, columns=3, min_side=64))
    assert grid.shape == (2 * 64 + 3 * grids.GAP, 3 * 64 + 4 * grids.GAP, 3)
    for i, image in enumerate(samples):
        top, left = (grids.GAP + k * (64 + grids.GAP) for k in divmod(i, 3))
        cell = grid[top : top + 64, left : left + 64]
        assert (cell[4::8, 4::8] == image).all()
        assert (cell == np.repeat(np.repeat(cell[::8, ::8], 8, 0), 8, 1)).all()


def test_captions_are_black_on_white_below_their_image():
    white = np.full((2, 8, 8, 1), 255, np.uint8)
    grid = grids.image_grid(white, columns=2, captions=["cat", "x" * 100], min_side=64)
    grid = np.asarray(grid)
    ink = np.argwhere(grid[..., 0] < 128)
    assert ink[:, 0].min() >= 64 + grids.GAP
    gap = slice(64 + grids.GAP, 64 + 2 * grids.GAP)  # a long name must not run into its neighbour
    assert (grid[:, gap] == 255).all() and (grid[:, -grids.GAP :] == 255).all()
    assert (ink[:, 1] < 64).any() and (ink[:, 1] > 72).any()


def test_a_sentence_is_broken_between_words_and_its_rowsare_larger():
    white = np.full((2, 8, 8, 1), 255, np.uint8)
    sentence = "the number seven, written by hand on a sheet of paper"
    grid = np.asarray(grids.image_grid(white, columns=2, captions=["7", sentence]))
    assert grid.shape[1] == 2 * 128 + 3 * grids.GAP
    rows_with_ink = np.any(grid[128 + grids.GAP :, 128 + 2 * grids.GAP :, 0] < 128, axis=1)
    n_lines = (np.diff(rows_with_ink.astype(int), prepend=0) == 1).sum()
    assert n_lines == grids.MAX_CAPTION_LINES


@pytest.mark.parametrize("columns", [("cat", "ship", "bird"), ()])
def test_a_comparison_grid_has_every_image_beside_its_names(columns):
    samples = RNG.integers(0, 256, (2, 3, 8, 8, 1), dtype=np.uint8)
    grid = np.asarray(
        grids.comparison_grid(samples, rows=["cfg 1", "a longer name"], columns=columns)
    )
    plain = np.asarray(grids.image_grid(samples.reshape(6, 8, 8, 1), columns=3))
    left, top = grid.shape[1] - plain.shape[1], grid.shape[0] - plain.shape[0]
    assert (grid[top:, left:] == plain).all()
    names = grid[top:, :left, 0] < 128
    first, second = names[: 64 + grids.GAP], names[64 + grids.GAP :]
    assert 0 < first.sum() < second.sum()
    middle = np.argwhere(first)[:, 0].mean()
    assert abs(middle - grids.GAP - 32) < 4
    assert (top > 0) == bool(columns) == (grid[:top, left:] < 128).any()


def test_latents_are_not_shown_as_images():
    with pytest.raises(ValueError, match="decode latents first"):
        grids.image_grid(np.zeros((1, 8, 8, 4), np.uint8))


def test_a_saved_png_is_the_image(tmp_path):
    grids.save_png(Image.fromarray(COLOUR), tmp_path / "new" / "a.png")
    assert (np.asarray(Image.open(tmp_path / "new" / "a.png")) == COLOUR).all()


def test_a_gif_has_all_frames_and_rests_on_the_last(tmp_path):
    frames = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(4)]
    grids.save_gif(frames, tmp_path / "a.gif", seconds_per_frame=0.1, hold_last=2.0)
    with Image.open(tmp_path / "a.gif") as gif:
        durations = []
        for i in range(gif.n_frames):  # type: ignore
            gif.seek(i)
            durations.append(gif.info["duration"])
    assert durations == [100, 100, 100, 2000]


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.png"
    grids.save_png(Image.fromarray(GREY), path)
    with pytest.raises(OSError, match="cannot write mode F"):
        grids.save_png(Image.fromarray(GREY.astype(np.float32)), path)
    assert (np.asarray(Image.open(path)) == GREY).all()
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
