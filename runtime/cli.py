"""The command line: flags fill a flat, frozen dataclass; `run` turns an end into an exit status.

Fire binds the flags and prints the help. By itself it runs first, complains later and guesses types
from values; so names are checked before Fire sees them, words travel through it as JSON, and types
come from the annotations alone. Whether a value makes sense is not known here.
"""

import contextlib
import dataclasses
import difflib
import errno
import inspect
import io
import json
import os
import re
import select
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import fire
from fire.decorators import SetParseFn

from runtime.errors import RunError, UserError, unknown_name

T = TypeVar("T")
FreeText = Annotated[str, "may hold commas"]


def parse_flags(
    config: type[T],
    argv: Sequence[str] | None = None,
    *,
    shown_defaults: Mapping[str, Any] | None = None,
) -> T:
    """The dataclass `config` filled from `argv`, by default the words after the command's name.

    `-h` or `--help` prints a page made from the docstring's `Args:` and leaves with 0; `filled`
    says there what a default of None will become.

    Raises:
        UserError: an unknown, repeated or missing flag, a stray word, a value of the wrong type.
    """
    argv = sys.argv[1:] if argv is None else argv
    fields = {field.name: field for field in dataclasses.fields(config)}  # type: ignore
    hints = typing.get_type_hints(config, include_extras=True)
    kinds = {name: hints[name] for name in fields}
    found: dict[str, list[str]] = {}

    def record(**words: list[str]) -> None:
        found.update(words)

    record.__doc__ = config.__doc__
    record.__signature__ = _signature(fields, kinds, shown_defaults or {})  # type: ignore
    if "-h" in argv or "--help" in argv:
        print(_help_page(record))
        sys.exit(0)
    words = _split(argv, kinds)
    if missing := [f"--{n}" for n in fields if _required(fields[n]) and n not in words]:
        raise UserError(f"missing {', '.join(missing)}; see --help")
    flags = [f"--{name}={json.dumps(words[name])}" for name in words]
    fire.Fire(SetParseFn(json.loads)(record), flags)
    return config(**{name: _coerce(name, words, kinds[name]) for name, words in found.items()})


def run_command(main: Callable[[], object], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Call `main` and exit: 0, 2 for a person's mistake or a full disk, 130 for Ctrl-C, else 1.

    `leave` exits after a failure that one line explains.
    """
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _say(str(error))
        leave(2)
    except RunError as error:
        _say(str(error))
        leave(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            sys.exit(1)
        # By text: Orbax wraps the operating system's error in one of its own.
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            where = getattr(error, "filename", None) or f"the disk ({error})"
            _say(f"no space left on {where}")
            leave(2)
        raise
    sys.exit(0)


def _say(message: str) -> None:
    print("error:", " ".join(message.splitlines()), file=sys.stderr)


def _stdout_is_closed() -> bool:
    """Whether our reader has gone, as `| head` does; any other broken pipe is a failure."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    if closed := bool(poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    return closed


def _split(argv: Sequence[str], kinds: dict[str, Any]) -> dict[str, list[str]]:
    """The words that follow each flag, as typed."""
    words: dict[str, list[str]] = {}
    name = ""
    for word in argv:
        if not re.match(r"--|-[A-Za-z]", word):  # a value; -1 and -.5 are values too
            if not name or (words[name] and not _holds(kinds[name], tuple)):
                raise UserError(f"unexpected '{word}'; a value follows its flag: --flag value")
            words[name].append(word)
            continue
        flag, equals, value = word.partition("=")
        name, negated = _field(flag, kinds)
        if name in words:
            raise UserError(f"--{name} is given twice")
        if negated and equals:
            raise UserError(f"{flag} takes no value; write --{name}={value}")
        words[name] = [value] if equals else []
        if negated:
            words[name], name = ["false"], ""
    for name in words:
        if not words[name] and not _holds(kinds[name], bool):
            raise UserError(f"--{name} needs a value: expected {_expected(kinds[name])}")
    return {name: given or ["true"] for name, given in words.items()}


def _field(flag: str, kinds: dict[str, Any]) -> tuple[str, bool]:
    """The field that a flag names, and whether it negates it, as `--noema` and `--no_ema` do."""
    name = flag.lstrip("-").replace("-", "_")
    positive = name.removeprefix("no").removeprefix("_")
    if flag.startswith("--") and name in kinds:
        return name, False
    if flag.startswith("--no") and positive in kinds and _holds(kinds[positive], bool):
        return positive, True
    near = difflib.get_close_matches(name, kinds, n=1)
    hint = f"did you mean --{near[0]}?" if near else "--help lists them all"
    raise UserError(f"unknown flag {flag}; {hint}")


def _coerce(name: str, words: Sequence[str], kind: Any) -> Any:
    for member in _members(kind):
        if member is type(None) and len(words) > 1:
            continue
        with contextlib.suppress(ValueError, KeyError):
            return _value(words, member)
    literals = [member for member in _members(kind) if typing.get_origin(member) is Literal]
    if literals:
        raise unknown_name(name, words[0], map(str, typing.get_args(literals[0])))
    raise UserError(f"--{name} '{' '.join(words)}': expected {_expected(kind)}")


def _value(words: Sequence[str], kind: Any) -> Any:
    """What words mean under one member of an annotation; ValueError or KeyError if nothing."""
    inner = typing.get_args(kind)
    if kind == tuple[FreeText, ...]:
        return tuple(words)
    if typing.get_origin(kind) is tuple:  # one word may hold several, split by commas
        parts = words[0].split(",") if len(words) == 1 else words
        return tuple(_value([_filled(part.strip())], inner[0]) for part in parts)
    if typing.get_origin(kind) is Literal:
        return {str(choice): choice for choice in inner}[words[0]]
    return SCALARS[kind][1](words[0])


def _filled(word: str) -> str:
    if not word:
        raise ValueError("an empty word, as an unset shell variable leaves")
    return word


def _path(word: str) -> Path:
    # The shell expands `--out ~/x`, but not `--out=~/x`.
    return Path(os.path.expanduser(_filled(word)))


def _whole(word: str) -> int:
    with contextlib.suppress(ValueError):
        return int(word)
    if not float(word).is_integer():  # 1e3 is; inf and nan are not
        raise ValueError(word)
    return int(float(word))


def _number(word: str) -> float:
    if (number := float(word)) != number:
        raise ValueError("nan")
    return number


BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
SCALARS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    type(None): ("none", lambda word: {"none": None}[word.lower()]),
    int: ("a whole number", _whole),
    float: ("a number", _number),
    bool: ("true or false", lambda word: BOOLS[word.lower()]),
    Path: ("a path", _path),
    str: ("text", str),
    FreeText: ("text", str),
}


def _members(kind: Any) -> list[Any]:
    """The members of a union, None first so that `str | None` can be none; else the kind itself."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return sorted(typing.get_args(kind) if union else [kind], key=lambda k: k is not type(None))


def _holds(kind: Any, wanted: type) -> bool:
    return any(wanted in (member, typing.get_origin(member)) for member in _members(kind))


def _expected(kind: Any) -> str:
    """An annotation in a person's words."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, inner))
    if typing.get_origin(kind) is tuple:
        return f"{_expected(inner[0])} (or several)"
    members = _members(kind)[::-1]
    return " or ".join(_expected(m) for m in members) if len(members) > 1 else SCALARS[kind][0]


def _required(field: dataclasses.Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _signature(
    fields: dict[str, dataclasses.Field], kinds: dict[str, Any], shown_defaults: Mapping[str, Any]
) -> inspect.Signature:
    """What Fire prints: types in words, and each default as a person would type it."""

    def parameter(name: str, field: dataclasses.Field) -> inspect.Parameter:
        make = field.default_factory
        default = field.default if make is MISSING else make()
        default = shown_defaults.get(name) if default is None else default
        words = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        shown = type("Default", (), {"__repr__": lambda _: "none" if words == "None" else words})()
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if _required(field) else shown,
            annotation=types.SimpleNamespace(__qualname__=_expected(kinds[name])),
        )

    return inspect.Signature([parameter(name, field) for name, field in fields.items()])


def _help_page(record: Callable) -> str:
    """Fire's page without its pager, and without the one-letter flags, which we do not take."""
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.redirect_stderr(page):  # noqa: SIM117
        with contextlib.suppress(SystemExit):
            fire.Fire(record, ["--", "--help"])
    return re.sub(r"(?m)^( *)-\w, --", r"\1--", page.getvalue()).rstrip()
