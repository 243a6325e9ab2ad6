"""A flag has the type of its annotation, or one clear error before anything runs."""

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from runtime import cli
from runtime.errors import UserError
from runtime.flags import Derived, again, flag, setting


@dataclass(frozen=True)
class DoughFlags:
    """Dough."""

    n_steps: int = setting(Derived("as the recipe says"), "stirs")
    rate: float = flag(0.5, "sugar per flour, " + "which the recipe may leave to your taste, " * 3)


@dataclass(frozen=True)
class OvenFlags:
    """Oven."""

    noisy: bool = flag(False, "ring at the end")


@dataclass(frozen=True)
class Config(DoughFlags, OvenFlags):
    """Bake a cake.

    The oven is preheated.
    """

    rate: float = again(DoughFlags, "rate", default=0.5)
    clip: float | None = 1.0
    ema: bool = True
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


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["-h", "--help", "--stepz 3 --help"])
def test_help_goes_to_stdout(line, capsys):
    with pytest.raises(SystemExit) as end:
        parse(line)
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    assert "\n\nBake a cake.\n\nThe oven is preheated.\n\n" in out
    assert "\n  --n_steps  (a whole number, default: as the recipe says)\n      stirs\n" in out
    for words in ("mlp  (gelu or swiglu, default: gelu)", "widths  (a whole number (or several), "):
        assert words in out
    assert "default: 1 2)" in out and "folder  (a path, default: none)" in out
    assert max(map(len, out.splitlines())) <= 100


def test_help_lists_each_flag_once_under_its_group(capsys):
    """Groups are in the order of inheritance, and a flag declared again stays in its group."""
    with pytest.raises(SystemExit):
        parse("--help")
    page = capsys.readouterr().out
    headings = re.findall(r"(?m)^(\w[\w ]*)\n  --", page)
    assert headings == ["Dough", "Oven", "Flags", "Flags from a file"]
    names = re.findall(r"(?m)^  --(\w+)  \(", page)
    assert names[:3] == ["n_steps", "rate", "noisy"] and names[-1] == "config"
    assert sorted(names) == sorted([*Config.__dataclass_fields__, "config"])


def test_help_says_what_is_required(capsys):
    with pytest.raises(SystemExit):
        cli.parse_flags(Required, ["--help"])
    assert "--run  (a path, required)" in capsys.readouterr().out


# --- flags from a file ----------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    def write(content, name="flags.yaml"):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / name)

    return write


VALUES = {
    "n_steps": (1000, 1000),
    "rate": (1e-05, 1e-05),
    "clip": ("none", None),
    "ema": (False, False),
    "half_precision": (True, True),
    "name": (123, "123"),
    "mlp": ("swiglu", "swiglu"),
    "size": (4, 4),
    "labels": (["a,b"], ("a,b",)),
    "prompts": (["a, b", "none"], ("a, b", "none")),
    "several": (["none"], ("none",)),
    "widths": ([8, -1], (8, -1)),
    "folder": ("~/x", Path.home() / "x"),
}


@pytest.mark.parametrize("name", ["flags.yaml", "flags.json"])
def test_values_of_a_file_become_those_of_the_line(file, name):
    path = file({key: given for key, (given, _) in VALUES.items()} | {"model": None}, name)
    config = cli.parse_flags(Config, ["--config", path])
    assert config == Config(**{key: value for key, (_, value) in VALUES.items()})


def test_yaml_is_read_as_people_write_it(file):
    path = file("# a comment\nn-steps: 1e3\nnoisy: yes\nlabels: 3,7\nwidths: []\n")
    config = cli.parse_flags(Config, [f"--config={path}"])
    assert config == Config(n_steps=1000, noisy=True, labels=("3", "7"), widths=())
    assert cli.parse_flags(Config, ["--config", file("")]) == Config()


def test_flags_on_the_line_take_precedence(file):
    path = file({"ema": True, "rate": 3, "labels": ["1", "2"], "name": "x"})
    for line in (["--noema", "--config", path], ["--config", path, "--noema"]):
        config = cli.parse_flags(Config, [*line, "--labels", "7"])
        assert config == Config(ema=False, rate=3.0, labels=("7",), name="x")


def test_a_file_may_hold_a_required_flag(file):
    assert cli.parse_flags(Required, ["--config", file({"run": "a b"})]) == Required(Path("a b"))


RUN = {"dataset_name": "digits", "model": "DiT-S/2", "model_config": {}, "dataset": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"stepz": 3}, "{path}: unknown flag 'stepz'; did you mean 'n_steps'? (one of: n_steps, "),
        ({"config": "x"}, "{path}: unknown flag 'config' (one of: "),
        ({"n_steps": "abc"}, "{path}: --n_steps 'abc': expected a whole number"),
        ({"n_steps": True}, "{path}: --n_steps 'true': expected a whole number"),
        ({"n_steps": [3]}, "{path}: --n_steps '3': expected a whole number"),
        ({"mlp": "gleu"}, "{path}: unknown mlp 'gleu'; did you mean 'gelu'? (one of: gelu, "),
        ({"mlp": ["gelu"]}, "{path}: --mlp 'gelu': expected gelu or swiglu"),
        ({"widths": [8, "b"]}, "{path}: --widths '8 b': expected a whole number (or several)"),
        ({"name": {"a": 1}}, "{path}: name {{'a': 1}}: expected a value or a list of values"),
        ({"labels": [["a"]]}, "{path}: labels [['a']]: expected a value or a list of values"),
        ([1, 2], "--config {path}: expected one 'name: value' for each flag"),
        ("n_steps: [", "--config {path} is damaged: "),
        (RUN, "{path} is of a training run, whose flags this command does not take"),
    ],
)
def test_mistakes_in_a_file_name_it_and_the_flag(file, content, message):
    path = file(content)
    with pytest.raises(UserError) as error:
        cli.parse_flags(Config, ["--config", path])
    assert str(error.value).startswith(message.format(path=path))


def test_a_file_that_cannot_be_read_is_one_line(file, tmp_path):
    with pytest.raises(UserError, match=r"cannot read --config .*nowhere: No such file"):
        cli.parse_flags(Config, ["--config", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"flags\.json is damaged: "):
        cli.parse_flags(Config, ["--config", file("{", "flags.json")])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.yaml is damaged: "):
        cli.parse_flags(Config, ["--config", str(tmp_path / "binary.yaml")])


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (UserError(f"column {'x' * 5000} is no image; pass --image_column"), "--image_column"),
        (
            UserError(f"column {'x' * 5000}", how="pass " + "--flag " * 30 + "!"),
            "--flag " * 30 + "!",
        ),
    ],
)
def test_a_line_of_an_error_is_short_and_keeps_the_way_out(error, end, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit, match="2"):
        cli.run_command(fail)
    line = capsys.readouterr().err
    assert len(line) <= 310 and line.startswith("error: column xxx")
    assert line.endswith(f"{end}\n")


def test_an_error_keeps_its_way_out_between_processes():
    error = pickle.loads(pickle.dumps(UserError("no column 'x'", how="pass --image_column NAME")))
    assert str(error) == "no column 'x'; pass --image_column NAME"
    assert error.how == "pass --image_column NAME"
