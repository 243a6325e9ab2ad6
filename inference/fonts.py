"""Fonts for text on images, in any script: Pillow's own, Matplotlib's, or one of the system.

    if fonts.is_drawable("猫"):
        fonts.draw_text(draw, (8, 8), "猫", anchor="la")

A text is drawn with one font that has all its characters or, without such a font, with several.
"""

import io
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

FONT_SIZE = 13
Point = tuple[float | int, float | int]
# Sizes at which fonts of colour bitmaps can be had: Noto's and Apple's emoji.
BITMAP_SIZES = (109, 136, 160, 128, 96, 64, 48, 40, 32, 20)
OWN_CHARACTERS = frozenset((*range(32, 127), *map(ord, "…‘’“”")))  # of Pillow's font
PLACEHOLDER_FONTS = ("lastresort", "adobeblank")  # their glyphs are boxes, or nothing
LESS_LEGIBLE = ("bold", "black", "italic", "oblique", "light", "thin", "condensed", "mono", "serif")


class Face(NamedTuple):
    """A font at the size of captions.

    Args:
        file: where it is from; None for Pillow's own.
        scale: of its glyphs, for a font that cannot be had at this size.
        characters: code points that it has.
    """

    file: Path | None
    font: ImageFont.FreeTypeFont
    scale: float
    characters: frozenset[int]


# --- finding fonts --------------------------------------------------------------------------------


@cache
def default_face() -> Face:
    """Return Pillow's own font, which has little more than ASCII."""
    font = ImageFont.load_default(size=FONT_SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont)  # as a size was given
    return Face(None, font, 1.0, OWN_CHARACTERS)


@cache
def font_files() -> Sequence[Path]:
    """List the fonts of Matplotlib and of the system, the most legible first."""
    import matplotlib
    from matplotlib import font_manager

    own = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    found = [Path(file) for file in font_manager.findSystemFonts()]

    def rank(file: Path) -> tuple[int, str]:
        name = file.stem.lower().replace("sansserif", "sans")
        return sum(word in name for word in LESS_LEGIBLE), str(file)

    usable = [
        file for file in found if not any(name in file.stem.lower() for name in PLACEHOLDER_FONTS)
    ]
    return [own, *sorted(usable, key=rank)]


@cache
def open_face(file: Path) -> Face | None:
    """Open a font file; None if it cannot be used."""
    from matplotlib.ft2font import FT2Font

    try:
        characters = frozenset(FT2Font(io.BytesIO(file.read_bytes())).get_charmap())
    except (OSError, RuntimeError):  # FreeType's
        return None
    for size in (FONT_SIZE, *BITMAP_SIZES):
        try:
            font = ImageFont.truetype(str(file), size)
        except OSError:  # no such size
            continue
        return Face(file, font, FONT_SIZE / size, characters)
    return None


@cache
def find_face(character: str) -> Face | None:
    """Find the first font that has a character; None if there is none."""
    if ord(character) in OWN_CHARACTERS:
        return default_face()
    if unicodedata.bidirectional(character) in ("R", "AL") and not features.check("raqm"):
        return None  # it would be drawn from left to right
    faces = (open_face(file) for file in font_files())
    return next((face for face in faces if face and _has_glyph(face, character)), None)


def _has_glyph(face: Face, character: str) -> bool:
    """Test that a character is there and leaves ink: some fonts have colours only."""
    if ord(character) not in face.characters:
        return False
    has_ink = face.font.getmask(character).getbbox() is not None
    return has_ink or face.scale != 1 or unicodedata.category(character) == "Zs"


# --- texts ----------------------------------------------------------------------------------------


def is_drawable(text: str) -> bool:
    """Return whether every visible character of a text is in some font. If not, warn once."""
    if _runs(text) is None:
        _report_missing()
        return False
    return True


def matplotlib_families(text: str) -> list[str]:
    """Return names of fonts for Matplotlib to draw a text with; none if it cannot."""
    from matplotlib import font_manager

    faces = {face.file: face for face, _ in _runs(text) or ()}
    if not faces or any(face.scale != 1 for face in faces.values()):
        return []
    names = ["DejaVu Sans"]
    for file in filter(None, faces):
        known = {entry.fname for entry in font_manager.fontManager.ttflist}
        if str(file) not in known:
            font_manager.fontManager.addfont(file)
        names.append(font_manager.get_font(str(file)).family_name)
    return names


@cache
def _report_missing() -> None:
    message = "a text has characters that no font here has, and its number is shown in its place"
    print(f"note: {message}; a font such as Noto Sans has them", file=sys.stderr)


@lru_cache(maxsize=4096)
def _runs(text: str) -> tuple[tuple[Face, str], ...] | None:
    """Divide a text into parts of one font each; None if a character is in no font."""
    text = "".join(" " if c.isspace() else c for c in unicodedata.normalize("NFC", text))
    shown = [c for c in text if not _is_invisible(c)]
    faces = list(dict.fromkeys(find_face(c) for c in shown)) or [default_face()]
    if None in faces:
        return None
    for face in faces:
        if face and all(_covers(face, c) for c in shown):
            return ((face, _only(text, face)),)
    runs: list[tuple[Face, str]] = []
    for c in shown:
        face = runs[-1][0] if runs and _covers(runs[-1][0], c) else find_face(c)
        assert face
        if runs and runs[-1][0] is face:
            runs[-1] = (face, runs[-1][1] + c)
        else:
            runs.append((face, c))
    return tuple(runs)


def _covers(face: Face, character: str) -> bool:
    return face is find_face(character) or _has_glyph(face, character)


def _is_invisible(character: str) -> bool:
    """Test for joiners, marks of direction, control characters and selectors of variants."""
    return unicodedata.category(character) in ("Cc", "Cf") or "\ufe00" <= character <= "\ufe0f"


def _only(text: str, face: Face) -> str:
    """Leave out invisible characters that a font would show as boxes."""
    return "".join(c for c in text if not _is_invisible(c) or ord(c) in face.characters)


def text_length(text: str) -> float:
    """Return the width of a text in pixels."""
    return sum((_run_length(face, part) for face, part in _drawable_runs(text)), 0.0)


def _run_length(face: Face, text: str) -> float:
    return face.scale * face.font.getlength(text)


def _drawable_runs(text: str) -> tuple[tuple[Face, str], ...]:
    """Divide a text as `_runs`, with question marks for the characters that no font has."""
    known = "".join(c if _is_invisible(c) or find_face(c) else "?" for c in text)
    return _runs(text) or _runs(known) or ()


def draw_text(image: Image.Image, xy: Point, text: str, *, anchor: str) -> None:
    """Draw a text in black on an RGB image.

    Args:
        anchor: what `xy` is the place of, in Pillow's letters: left, middle or right; and
            ascender, middle or descender.
    """
    runs = _drawable_runs(text)
    if all(face.file is None for face, _ in runs):
        draw = ImageDraw.Draw(image)
        draw.text(xy, "".join(part for _, part in runs), "black", default_face().font, anchor)
        return
    ascent, descent = default_face().font.getmetrics()
    down = {"a": ascent, "m": (ascent - descent) / 2, "d": -descent}[anchor[1]]
    left = {"l": 0.0, "m": text_length(text) / 2, "r": text_length(text)}[anchor[0]]
    x, baseline = xy[0] - left, xy[1] + down
    for face, part in runs:
        if face.scale == 1:
            ImageDraw.Draw(image).text((x, baseline), part, "black", face.font, "ls")
        else:
            _draw_scaled(image, (x, baseline), part, face)
        x += _run_length(face, part)


def _draw_scaled(image: Image.Image, xy: Point, text: str, face: Face) -> None:
    """Draw with a font that is too large, in its own colours, and shrink what was drawn."""
    left, top, right, bottom = (round(n) for n in face.font.getbbox(text, anchor="ls"))
    large = Image.new("RGBA", (max(1, right - left), max(1, bottom - top)), (255, 255, 255, 0))
    origin = (-left, -top)
    ImageDraw.Draw(large).text(origin, text, "black", face.font, "ls", embedded_color=True)
    width, height = (max(1, round(n * face.scale)) for n in large.size)
    small = large.resize((width, height), Image.Resampling.LANCZOS)
    place = (round(xy[0] + left * face.scale), round(xy[1] + top * face.scale))
    image.paste(small, place, small)
