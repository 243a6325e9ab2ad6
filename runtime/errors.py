"""Errors that one line explains. Every other exception is a bug and keeps its traceback."""

import difflib
from collections.abc import Iterable


class OneLineError:
    """Mixin of an exception that a notebook, too, shows as its message without a traceback."""

    def _render_traceback_(self) -> list[str]:  # called by IPython
        return [f"error: {self}"]


class RunError(OneLineError, RuntimeError):
    """A run that failed; the message says why. `cli.run_command` prints it and exits with 1."""


class UserError(OneLineError, ValueError):
    """A mistake in the flags or in the data. `cli.run_command` prints one line and exits with 2.

    Args:
        problem: the thing and its value.
        how: the way out. A line that is too long loses the end of `problem`, never this.
    """

    def __init__(self, problem: object = "", *, how: str = "") -> None:
        super().__init__(f"{problem}; {how}" if how else problem)
        self.problem, self.how = str(problem), how


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UserError:
    """Make the error for a name that is not in a table: the name, the nearest one, all allowed."""
    known = list(known)
    nearest = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    rest = f", … {len(known) - 20} more" if len(known) > 20 else ""
    return UserError(f"unknown {kind} '{name}'{hint} (one of: {', '.join(known[:20])}{rest})")


def some_of(names: Iterable[object], n: int = 8) -> str:
    """List the first names, and how many more there are: a line stays a line."""
    names = [str(name) for name in names]
    rest = f", … {len(names) - n} more" if len(names) > n else ""
    return ", ".join(names[:n]) + rest


def count(n: int, noun: str) -> str:
    """Write "1 row", "2 rows"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
