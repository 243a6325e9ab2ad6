"""Names and captions in any script are drawn, or are numbers; never boxes."""

from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageFont

from inference import curves, fonts, grids
from inference.labels import SampleRequest, grid_texts

WHITE = np.full((2, 8, 8, 1), 255, np.uint8)


def save_font(path: Path, characters: str, *, has_ink: bool = True) -> Path:
    """A font whose glyphs are all the same square, or nothing."""
    names = [".notdef", *(f"u{ord(c):x}" for c in characters)]
    pen = TTGlyphPen(None)
    if has_ink:
        pen.moveTo((100, 0))
        for corner in ((100, 800), (900, 800), (900, 0)):
            pen.lineTo(corner)
        pen.closePath()
    glyph, box = pen.glyph(), TTGlyphPen(None).glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"u{ord(c):x}" for c in characters})
    builder.setupGlyf({name: box if name == ".notdef" else glyph for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def forget():
    for name in ("font_files", "open_face", "find_face", "_runs", "_report_missing"):
        function = getattr(fonts, name)
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture
def system_fonts(monkeypatch):
    """Sets the fonts of the system, besides Matplotlib's."""
    from matplotlib import font_manager

    def install(*files: Path) -> None:
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(f) for f in files])
        forget()

    install()
    yield install
    monkeypatch.undo()
    forget()


def ink(text: str) -> np.ndarray:
    canvas = Image.new("RGB", (400, 24), "white")
    fonts.draw_text(canvas, (4, 4), text, anchor="la")
    return np.asarray(canvas.convert("L")) < 128


@pytest.mark.parametrize(
    "text", ["Füße", "Ωμέγα", "кошка", "חתול", "قط", "😀", "naïve café", "Đặng", "→ ½ µ", "ﬁ"]
)
def test_matplotlib_s_font_has_most_alphabets(system_fonts, text):
    assert fonts.is_drawable(text)
    assert ink(text).any()
    unknown = ImageFont.load_default(size=fonts.FONT_SIZE).getlength("\u732b" * len(text))
    assert fonts.text_length(text) != unknown


def test_plain_letters_need_no_other_font(system_fonts):
    assert [face.file for face, _ in fonts._runs("a cat’s sofa, 100% …") or ()] == [None]
    face = fonts.default_face()
    assert fonts.text_length("a cat") == face.font.getlength("a cat")
    assert ink("a cat").any()


def test_a_decomposed_letter_is_one_letter(system_fonts):
    """As a Mac writes names of folders."""
    assert (ink("Gru\u0308n") == ink("Grün")).all()


@pytest.mark.parametrize("invisible", ["\ufe0f", "\u200d", "\u200e", "\x07", "\u00ad"])
def test_invisible_characters_leave_no_box(system_fonts, invisible):
    assert (ink(f"a{invisible}b") == ink("ab")).all()
    assert fonts.is_drawable(f"ü{invisible}")


def test_a_script_without_a_font_is_a_number_and_is_reported_once(system_fonts, capsys):
    names = ["cat", "猫", "犬"]
    assert grid_texts([0, 1, 2, 1], names) == ["cat", "1", "2", "1"]
    assert grid_texts(["a cat", "猫", "猫", "a dog"], ()) == ["a cat", "1", "1", "a dog"]
    request = SampleRequest(np.array([1, 0]), names, np.arange(3))
    assert request.grid_captions == ["1", "cat"]
    assert request.captions == ["猫", "cat"]  # a file's name, or a web page, can show it
    assert capsys.readouterr().err.count("\n") == 1
    assert grid_texts([0, 1], ()) is None


def test_a_font_of_the_system_is_found(system_fonts, tmp_path):
    assert not fonts.is_drawable("猫")
    system_fonts(save_font(tmp_path / "cjk.ttf", "猫犬"))
    assert grid_texts([0, 1], ["cat", "猫"]) == ["cat", "猫"]
    assert ink("猫").sum() > 60  # the square
    assert fonts.text_length("猫") == pytest.approx(13, abs=1)
    found = np.asarray(grids.image_grid(WHITE, captions=["cat", "猫"], min_side=64))
    plain = np.asarray(grids.image_grid(WHITE, captions=["cat", " "], min_side=64))
    differs = np.argwhere((found != plain).any(-1))
    assert len(differs) > 60 and differs[:, 1].min() > 64 + grids.GAP
    assert differs[:, 0].min() >= 64 + grids.GAP  # below the image


def test_a_text_in_several_scripts_takes_several_fonts(system_fonts, tmp_path):
    system_fonts(save_font(tmp_path / "cjk.ttf", "猫犬"), save_font(tmp_path / "other.ttf", "한"))
    text = "a 猫 und 한 für 犬"
    runs = fonts._runs(text)
    assert runs and "".join(part for _, part in runs) == text
    assert {face.file.stem if face.file else "" for face, _ in runs} == {
        "", "cjk", "other", "DejaVuSans",
    }  # fmt: skip
    assert fonts.text_length(text) > fonts.text_length("a  und  für ") + 2 * 13
    for anchor, x in (("la", 4), ("ma", 200), ("rm", 396), ("md", 200)):
        canvas = Image.new("RGB", (400, 40), "white")
        fonts.draw_text(canvas, (x, 20), text, anchor=anchor)
        columns = np.argwhere(np.asarray(canvas.convert("L")) < 128)[:, 1]
        left = x - {"l": 0, "m": 0.5, "r": 1}[anchor[0]] * fonts.text_length(text)
        assert abs(columns.min() - left) < 3
        assert abs(columns.max() - left - fonts.text_length(text)) < 4


@pytest.mark.parametrize("name, has_ink", [("LastResortHE", True), ("colours", False)])
def test_fonts_of_placeholders_and_without_ink_are_not_used(system_fonts, tmp_path, name, has_ink):
    system_fonts(save_font(tmp_path / f"{name}.ttf", "猫", has_ink=has_ink))
    assert not fonts.is_drawable("猫")


def test_a_damaged_font_is_passed_over(system_fonts, tmp_path):
    (tmp_path / "a.ttf").write_bytes(b"no font")
    system_fonts(tmp_path / "a.ttf", tmp_path / "gone.ttf", save_font(tmp_path / "b.ttf", "猫"))
    assert fonts.is_drawable("猫")


def test_a_font_of_one_large_size_is_shrunk(system_fonts, tmp_path, monkeypatch):
    """As fonts of colour bitmaps are."""
    honest = ImageFont.truetype

    def only_109(file, size):
        if size != 109:
            raise OSError("invalid pixel size")
        return honest(file, size)

    monkeypatch.setattr(ImageFont, "truetype", only_109)
    system_fonts(save_font(tmp_path / "emoji.ttf", "🫠"))
    assert fonts.is_drawable("🫠")
    rows, columns = np.nonzero(ink("🫠"))
    assert fonts.text_length("🫠") == pytest.approx(13, abs=1)
    assert 9 <= np.ptp(rows) + 1 <= 12 and 9 <= np.ptp(columns) + 1 <= 12


def test_regular_faces_come_before_bold_ones(system_fonts, tmp_path):
    bold = save_font(tmp_path / "a-Bold.ttf", "猫")
    regular = save_font(tmp_path / "b-Regular.ttf", "猫")
    system_fonts(bold, regular)
    assert [file.name for file in fonts.font_files()[1:]] == ["b-Regular.ttf", "a-Bold.ttf"]


@pytest.mark.parametrize(
    "name, title", [("run $a$ ü", "Loss of run $a$ ü"), ("猫", "Loss of 猫"), ("犬", "Loss")]
)
def test_the_title_of_the_curves_names_the_run_in_its_script(system_fonts, tmp_path, name, title):
    """Matplotlib warns of each box, which fails this test."""
    system_fonts(save_font(tmp_path / "cjk.ttf", "猫"))
    metrics = [{"step": i, "loss": 1.0 / i} for i in (1, 2)]
    figure = curves.plot_curves(metrics, title=name)
    assert figure.axes[0].get_title(loc="left") == title
    curves.save_figure(figure, tmp_path / "curves.png")


def test_text_without_spaces_is_broken_between_characters(system_fonts, tmp_path):
    system_fonts(save_font(tmp_path / "cjk.ttf", "猫犬"))
    assert grids._wrap("猫犬猫犬 cat 猫犬", width=30) == ["猫犬", "猫犬", "cat …"]
    assert grids._wrap("a cat on a sofa", width=40) == ["a cat", "on a", "sofa"]
    assert grids._wrap("  猫  ", width=30) == ["猫"]
    assert grids._wrap("", width=30) == [""]
