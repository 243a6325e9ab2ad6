"""Ends that one line explains. Everything else that goes wrong is a bug and keeps its traceback."""

import difflib
from collections.abc import Iterable


class OneLine:
    """Is shown by a notebook as what it says, too, and not by the way there."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [f"error: {self}"]


class RunError(OneLine, RuntimeError):
    """A run that failed, and whose message tells why: `cli.run` prints it and exits with 1."""


class UserError(OneLine, ValueError):
    """A mistake at the keyboard or in the data: `cli.run` prints one line and exits with 2."""


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """For a name that is not in a table: the name, the nearest one and what is allowed."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    more = f", … {len(known) - 20} more" if len(known) > 20 else ""
    return UserError(f"unknown {kind} '{name}'{hint} (one of: {', '.join(known[:20])}{more})")
