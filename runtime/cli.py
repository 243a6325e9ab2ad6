"""The command line: flags → a flat, frozen dataclass; the end of a command → its exit status.

Fire binds the flags. By itself it runs first, complains later and guesses types from values; so
names are checked before Fire sees them, values travel through it as JSON, and types come from the
annotations alone. Whether a value makes sense is checked elsewhere. `runtime.help_page` prints the
help, and `runtime.config_file` reads the flags of `--config FILE`.
"""

import contextlib
import dataclasses
import errno
import gc
import json
import os
import re
import select
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import fire
from fire.decorators import SetParseFn

from runtime.config_file import read_config_file
from runtime.errors import RunError, UserError, unknown_name
from runtime.flag_names import hint_for
from runtime.help_page import help_page
from runtime.image_size import WrittenSize, canonical_size

T = TypeVar("T")
MAX_ERROR = 300  # characters of a line that says what is wrong
CONFIG_FLAG = "config"  # of every command, besides the fields of its dataclass
FreeText = Annotated[str, "may hold commas"]  # tuples of it are not split at commas


def parse_flags(config: type[T], argv: Sequence[str] | None = None) -> T:
    """Make the dataclass `config` from command-line flags.

    `--config FILE` reads flags from a file; those on the line take precedence. `-h` or `--help`
    prints a page and exits with 0.

    Args:
        argv: by default the words after the command's name.

    Raises:
        UserError: an unknown, repeated or missing flag, a stray word, a value of the wrong type.
    """
    argv = sys.argv[1:] if argv is None else argv
    fields = {field.name: field for field in dataclasses.fields(config)}  # type: ignore
    hints = typing.get_type_hints(config, include_extras=True)
    kinds = {name: hints[name] for name in fields}
    if "-h" in argv or "--help" in argv:
        print(help_page(config, {name: describe_type(kinds[name]) for name in fields}))
        sys.exit(0)
    words = _split_flags(argv, kinds | {CONFIG_FLAG: Path})
    values = _read_file(config, words.pop(CONFIG_FLAG, None), kinds)
    missing = [
        f"--{name}"
        for name in fields
        if _is_required(fields[name]) and name not in words and name not in values
    ]
    if missing:
        raise UserError(f"missing {', '.join(missing)}; see --help")
    received = _bind(words)
    return config(
        **values | {name: _convert(name, received[name], kinds[name]) for name in received}
    )


def _read_file(config: type[Any], words: list[str] | None, kinds: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the flags in the file that `--config` names, if it is given."""
    if words is None:
        return {}
    path = _convert(CONFIG_FLAG, words, Path)
    values: dict[str, Any] = {}
    for name, read in read_config_file(path, config).items():
        try:
            values[name] = _convert(name, read.words, kinds[name], is_list=read.is_list)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return values


def _bind(words: dict[str, list[str]]) -> dict[str, list[str]]:
    """Bind the words to a function by Fire, and return what it received."""
    received: dict[str, list[str]] = {}

    def receive(**flags: list[str]) -> None:
        received.update(flags)

    flags = [f"--{name}={json.dumps(words[name])}" for name in words]
    fire.Fire(SetParseFn(json.loads)(receive), flags)
    return received


def run_command(
    main: Callable[[], object], exit_process: Callable[[int], NoReturn] = sys.exit
) -> NoReturn:
    """Call `main` and exit: 0, 2 for a UserError or a full disk, 130 for Ctrl-C, else 1.

    Args:
        exit_process: exits after a failure that one line explains.
    """
    gc.freeze()  # what is imported stays: the collector need not walk it each time
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _print_error(str(error), n_kept=len(error.how))
        exit_process(2)
    except RunError as error:
        _print_error(str(error))
        exit_process(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            sys.exit(1)
        # By text: Orbax wraps the operating system's error in one of its own.
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            where = getattr(error, "filename", None) or f"the disk ({error})"
            _print_error(f"no space left on {where}")
            exit_process(2)
        raise
    finally:
        gc.freeze()  # nor at the interpreter's end, which would take 0.8 s more
    sys.exit(0)


def _print_error(message: str, n_kept: int = 0) -> None:
    """Print a message on one line, shortened in its middle: the way out stands at the end."""
    line = " ".join(message.splitlines())
    n_end = max(n_kept, 117)
    if len(line) > MAX_ERROR:
        line = f"{line[: max(MAX_ERROR - n_end - 3, 40)]} … {line[-n_end:]}"
    print("error:", line, file=sys.stderr)


def _stdout_is_closed() -> bool:
    """Check if the reader of stdout has gone, as in `| head`. Other broken pipes are failures."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    closed = bool(poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    return closed


# --- words → flags --------------------------------------------------------------------------------


def _split_flags(argv: Sequence[str], kinds: dict[str, Any]) -> dict[str, list[str]]:
    """Group the words by the flag that they follow."""
    words: dict[str, list[str]] = {}
    name = ""
    for word in argv:
        if not re.match(r"--|-[A-Za-z]", word):  # a value; -1 and -.5 are values too
            if not name or (words[name] and not _allows(kinds[name], tuple)):
                raise UserError(f"unexpected '{word}'; a value follows its flag: --flag value")
            words[name].append(word)
            continue
        flag, equals, value = word.partition("=")
        name, negated = _find_field(flag, kinds)
        if name in words:
            raise UserError(f"--{name} is given twice")
        if negated and equals:
            raise UserError(f"{flag} takes no value; write --{name}={value}")
        words[name] = [value] if equals else []
        if negated:
            words[name], name = ["false"], ""
    for name in words:
        if not words[name] and not _allows(kinds[name], bool):
            raise UserError(f"--{name} needs a value: expected {describe_type(kinds[name])}")
    return {name: values or ["true"] for name, values in words.items()}


def _find_field(flag: str, kinds: dict[str, Any]) -> tuple[str, bool]:
    """Find the field that a flag names; True if it negates it, as `--noema` and `--no_ema` do."""
    name = flag.lstrip("-").replace("-", "_")
    positive = name.removeprefix("no").removeprefix("_")
    if flag.startswith("--") and name in kinds:
        return name, False
    if flag.startswith("--no") and positive in kinds and _allows(kinds[positive], bool):
        return positive, True
    raise UserError(f"unknown flag {flag}; {hint_for(name, kinds)}")


# --- words → values -------------------------------------------------------------------------------


def _convert(name: str, words: Sequence[str], kind: Any, *, is_list: bool = False) -> Any:
    """Convert the words of a flag to the first member of its annotation that accepts them.

    Args:
        is_list: the words are the items of a list, so that a single one is not split at commas.
    """
    for member in _union_members(kind):
        is_tuple = typing.get_origin(member) is tuple
        if (is_list and not is_tuple) or (member is type(None) and len(words) > 1):
            continue
        with contextlib.suppress(ValueError, KeyError):
            return _parse_items(words, member) if is_list else _parse_value(words, member)
    literals = [member for member in _union_members(kind) if typing.get_origin(member) is Literal]
    if literals and not is_list:
        raise unknown_name(name, words[0], map(str, typing.get_args(literals[0])))
    raise UserError(f"--{name} '{' '.join(words)}': expected {describe_type(kind)}")


def _parse_value(words: Sequence[str], kind: Any) -> Any:
    """Parse words as one member of an annotation.

    Raises:
        ValueError, KeyError: the words are no such value.
    """
    inner = typing.get_args(kind)
    if kind == tuple[FreeText, ...]:
        return tuple(words)
    if typing.get_origin(kind) is tuple:  # one word may hold several values, split by commas
        parts = words[0].split(",") if len(words) == 1 else words
        return _parse_items([part.strip() for part in parts], kind)
    if typing.get_origin(kind) is Literal:
        return {str(choice): choice for choice in inner}[words[0]]
    return SCALARS[kind][1](words[0])


def _parse_items(words: Sequence[str], kind: Any) -> tuple[Any, ...]:
    """Parse each word as one item of a tuple."""
    (item, _) = typing.get_args(kind)
    if item == FreeText:
        return tuple(words)
    return tuple(_parse_value([_require_nonempty(word)], item) for word in words)


def _require_nonempty(word: str) -> str:
    if not word:
        raise ValueError("an empty word, as from an unset shell variable")
    return word


def _parse_path(word: str) -> Path:
    # The shell expands `--out ~/x`, but not `--out=~/x`.
    return Path(os.path.expanduser(_require_nonempty(word)))


def _parse_int(word: str) -> int:
    with contextlib.suppress(ValueError):
        return int(word)
    if not float(word).is_integer():  # 1e3 is; inf and nan are not
        raise ValueError(word)
    return int(float(word))


def _parse_float(word: str) -> float:
    if (number := float(word)) != number:
        raise ValueError("nan")
    return number


def _parse_size(word: str) -> int | str:
    with contextlib.suppress(ValueError):
        return _parse_int(word)
    return canonical_size(word)


BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
SCALARS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    type(None): ("none", lambda word: {"none": None}[word.lower()]),
    int: ("a whole number", _parse_int),
    float: ("a number", _parse_float),
    bool: ("true or false", lambda word: BOOLS[word.lower()]),
    Path: ("a path", _parse_path),
    str: ("text", str),
    FreeText: ("text", str),
    WrittenSize: ("a number of pixels or HEIGHTxWIDTH", _parse_size),
}


def _union_members(kind: Any) -> list[Any]:
    """Members of a union, None first so that `none` is None for `str | None`; else the kind."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return sorted(typing.get_args(kind) if union else [kind], key=lambda k: k is not type(None))


def _allows(kind: Any, member_type: type) -> bool:
    """Return True if an annotation, or a member of its union, is this type."""
    return any(
        member_type in (member, typing.get_origin(member)) for member in _union_members(kind)
    )


def describe_type(kind: Any) -> str:
    """Describe an annotation in words."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, inner))
    if typing.get_origin(kind) is tuple:
        return f"{describe_type(inner[0])} (or several)"
    members = _union_members(kind)[::-1]
    return " or ".join(describe_type(m) for m in members) if len(members) > 1 else SCALARS[kind][0]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
