"""A flag has the type of its annotation, or one clear error before anything runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from runtime import cli
from runtime.errors import UserError


@dataclass(frozen=True)
class Config:
    """Bake a cake.

    Args:
        n_steps: stirs, as the recipe says if it is not given.
        labels: what to write on it.
    """

    n_steps: int = None  # type: ignore[assignment]
    rate: float = 0.5
    clip: float | None = 1.0
    ema: bool = True
    noisy: bool = False
    half_precision: bool | None = None
    name: str = "plain"
    model: str | None = None
    mlp: Literal["gelu", "swiglu"] = "gelu"
    size: Literal[1, 2, 4] | None = None
    labels: tuple[str, ...] = ()
    prompts: tuple[cli.FreeText, ...] = ()
    several: tuple[cli.FreeText, ...] | None = ("x",)
    widths: tuple[int, ...] = (1, 2)
    folder: Path | None = None


@dataclass(frozen=True)
class Required:
    """Needs a folder."""

    run: Path
    name: str = ""


def parse(line):
    return cli.parse_flags(Config, line.split())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        ("--n_steps 7", {"n_steps": 7}),
        ("--n-steps=1e3", {"n_steps": 1000}),
        ("--n_steps 1_000", {"n_steps": 1000}),
        ("--n_steps -1", {"n_steps": -1}),
        ("--rate=-1e-4", {"rate": -1e-4}),
        ("--rate -.5 --clip none", {"rate": -0.5, "clip": None}),
        ("--ema False", {"ema": False}),
        ("--ema=no --noisy", {"ema": False, "noisy": True}),
        ("--noema --nonoisy", {"ema": False, "noisy": False}),
        ("--no_ema --noisy YES", {"ema": False, "noisy": True}),
        ("--no-half-precision --rate 1", {"half_precision": False, "rate": 1.0}),
        ("--half_precision", {"half_precision": True}),
        ("--half_precision None", {"half_precision": None}),
        ("--name 123 --model none", {"name": "123", "model": None}),
        ("--name 1e5 --model True", {"name": "1e5", "model": "True"}),
        ("--name=--rate=3", {"name": "--rate=3"}),
        ("--name [1] --model {'a':1}", {"name": "[1]", "model": "{'a':1}"}),
        ("--mlp swiglu --size 4", {"mlp": "swiglu", "size": 4}),
        ("--labels 3 7 cat --n_steps 2", {"labels": ("3", "7", "cat"), "n_steps": 2}),
        ("--labels=3,7", {"labels": ("3", "7")}),
        ("--labels a,b c", {"labels": ("a,b", "c")}),
        ("--prompts a,b", {"prompts": ("a,b",)}),
        ("--prompts a,b c --name x", {"prompts": ("a,b", "c"), "name": "x"}),
        ("--prompts=", {"prompts": ("",)}),
        ("--several none a", {"several": ("none", "a")}),
        ("--several none", {"several": None}),
        ("--widths 8 -1", {"widths": (8, -1)}),
        ("--folder runs/x", {"folder": Path("runs/x")}),
        ("--folder=~/x", {"folder": Path.home() / "x"}),
        ("--folder ~nobody-of-this-name/x", {"folder": Path("~nobody-of-this-name/x")}),
    ],
)
def test_values_come_from_the_annotation(line, expected):
    assert parse(line) == Config(**expected)
    for name, value in expected.items():
        assert type(getattr(parse(line), name)) is type(value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--stepz 3", "unknown flag --stepz; did you mean --n_steps?"),
        ("--noname", "unknown flag --noname; did you mean --name?"),
        ("--xyzzy=3", "unknown flag --xyzzy; --help lists them all"),
        ("-n 3", "unknown flag -n; --help lists them all"),
        ("-- --rate", "unknown flag --; --help lists them all"),
        ("cake", "unexpected 'cake'; a value follows its flag: --flag value"),
        ("--rate 1 2", "unexpected '2'; a value follows its flag: --flag value"),
        ("--noema False", "unexpected 'False'; a value follows its flag: --flag value"),
        ("--noema=False", "--noema takes no value; write --ema=False"),
        ("--rate 1 --rate 2", "--rate is given twice"),
        ("--ema --noema", "--ema is given twice"),
        ("--rate --ema", "--rate needs a value: expected a number"),
        ("--labels", "--labels needs a value: expected text (or several)"),
        ("--n_steps abc", "--n_steps 'abc': expected a whole number"),
        ("--n_steps 1.5", "--n_steps '1.5': expected a whole number"),
        ("--n_steps inf", "--n_steps 'inf': expected a whole number"),
        ("--n_steps none", "--n_steps 'none': expected a whole number"),
        ("--rate nan", "--rate 'nan': expected a number"),
        ("--clip x", "--clip 'x': expected a number or none"),
        ("--ema maybe", "--ema 'maybe': expected true or false"),
        ("--widths 1,,2", "--widths '1,,2': expected a whole number (or several)"),
        ("--widths 1 b", "--widths '1 b': expected a whole number (or several)"),
        ("--folder=", "--folder '': expected a path or none"),
        ("--mlp gleu", "unknown mlp 'gleu'; did you mean 'gelu'? (one of: gelu, swiglu)"),
        ("--size 3", "unknown size '3' (one of: 1, 2, 4)"),
    ],
)
def test_mistakes_are_reported_in_one_line(line, message):
    with pytest.raises(UserError) as error:
        parse(line)
    assert str(error.value) == message


def test_a_flag_without_default_is_required():
    with pytest.raises(UserError, match="missing --run; see --help"):
        cli.parse_flags(Required, ["--name", "x"])
    assert cli.parse_flags(Required, ["--run", "a b"]) == Required(Path("a b"))


@pytest.mark.parametrize("line", ["-h", "--help", "--stepz 3 --help"])
def test_help_goes_to_stdout(line, capsys):
    with pytest.raises(SystemExit) as end:
        parse(line)
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    for words in ("Bake a cake.", "--n_steps=N_STEPS", "stirs, as the recipe", "Default: 1 2"):
        assert words in out
    assert "Default: none" in out and "gelu or swiglu" in out
    assert "FIRE_METADATA" not in out and "-n, " not in out


def test_help_shows_the_defaults_given_for_none(capsys):
    with pytest.raises(SystemExit):
        cli.parse_flags(
            Config, ["--help"], shown_defaults={"n_steps": "as the recipe says", "rate": "unseen"}
        )
    page = capsys.readouterr().out
    assert "Default: as the recipe says" in page and "Default: 0.5" in page
    assert "unseen" not in page
