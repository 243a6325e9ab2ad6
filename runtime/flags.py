"""Flags of a command, each declared once: the fields of a frozen dataclass with their metadata.

    @dataclass(frozen=True, kw_only=True)
    class SamplingFlags:
        "Sampling."

        eta: float = flag(0.0, "fresh noise of ddim, from 0 to 1", at_least=0, at_most=1)
        n_steps: int = setting(50, "solver steps", above=0, may_change=True)

A `flag` that is left out has its default. A `setting` that is left out is None until the command
has looked at the run to resume and at the dataset. A command's config inherits from such groups;
the first line of a group's docstring is its heading on the help page. `runtime.cli` reads the
command line.
"""

import dataclasses
import inspect
import math
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from runtime.errors import UserError, unknown_name

METADATA_KEY = "flag"
OWN_FLAGS = "Flags"  # heading of the flags that belong to no group


class Derived(str):
    """A default that the command computes; the text is what the help page shows for it."""


@dataclass(frozen=True)
class Flag:
    """Everything that is known of a flag besides its name and type.

    Args:
        default: the value of a flag left out; None if there is none, MISSING if it is required.
        help: for the help page, without a final full stop.
        is_setting: whether the config holds None, in place of the default, for a flag left out.
        above: the value must be larger. Bounds are of numbers, also where a text is possible.
        at_least: the value must not be smaller.
        at_most: the value must not be larger.
        choices: all values that are allowed.
        only_with: name of another flag, and the value of it with which alone this flag is read;
            None stands for any value but False, 0 and None.
        may_change: whether a resumed run may give another value.
        inherited: whether a resumed run takes the value from its folder.
    """

    default: Any
    help: str
    is_setting: bool = False
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    choices: Collection[Any] | None = None
    only_with: tuple[str, Any] | None = None
    may_change: bool = False
    inherited: bool = True

    def check(self, name: str, value: Any) -> None:
        """Raises UserError if a value is not finite, out of range or none of the choices."""
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} {value}: must be finite")
        if not isinstance(value, str):
            self._check_bounds(name, value)
        if self.choices is not None and value not in self.choices:
            raise unknown_name(name, value, self.choices)

    def _check_bounds(self, name: str, value: Any) -> None:
        if self.above is not None and value <= self.above:
            raise UserError(f"--{name} {value}: must be above {self.above}")
        low, high = self.at_least, self.at_most
        if low is not None and high is not None and not low <= value <= high:
            raise UserError(f"--{name} {value}: must be between {low} and {high}")
        if low is not None and value < low:
            raise UserError(f"--{name} {value}: must be at least {low}")
        if high is not None and value > high:
            raise UserError(f"--{name} {value}: must be at most {high}")

    def is_unread(self, values: Mapping[str, Any]) -> bool:
        """Check if the value of another flag leaves this one unread."""
        if not self.only_with:
            return False
        other, required = self.only_with
        actual = values.get(other)
        return not actual if required is None else actual != required


# --- declaring ------------------------------------------------------------------------------------


def flag(default: Any, help: str, **rules: Any) -> Any:
    """Declare a flag whose value is `default` if it is left out, and None if that is `Derived`.

    Args:
        rules: further fields of `Flag`.
    """
    return _declare(Flag(default, help, **rules))


def setting(default: Any, help: str, **rules: Any) -> Any:
    """Declare a flag that is None while it is left out, and then the resumed run's value, the
    dataset's recommendation or `default`.

    Args:
        rules: further fields of `Flag`.
    """
    return _declare(Flag(default, help, is_setting=True, **rules))


def required(help: str, **rules: Any) -> Any:
    """Declare a flag that must be given.

    Args:
        rules: further fields of `Flag`.
    """
    return _declare(Flag(MISSING, help, **rules))


def again(group: type[Any], name: str, **changes: Any) -> Any:
    """Declare a flag of a group once more, for a config that needs another default, type or rule,
    or not the whole group.

    Args:
        changes: fields of `Flag` that differ.
    """
    return _declare(dataclasses.replace(flags_of(group)[name], **changes))


def _declare(known: Flag) -> Any:
    is_none = known.is_setting or isinstance(known.default, Derived)
    return dataclasses.field(
        default=None if is_none else known.default, metadata={METADATA_KEY: known}
    )


# --- looking up -----------------------------------------------------------------------------------


def groups_of(config: Any) -> dict[str, list[str]]:
    """Return the names of the flags of a config or its class, by the heading of their group, in the
    order of inheritance. A flag belongs to the first class that declares it.
    """
    config = config if isinstance(config, type) else type(config)
    missing = {field.name for field in dataclasses.fields(config)}
    groups: dict[str, list[str]] = {}
    for base in _bases_first(config):
        title = (inspect.getdoc(base) or "").partition("\n")[0].rstrip(".")
        own = [name for name in inspect.get_annotations(base) if name in missing]
        if own:
            groups.setdefault(OWN_FLAGS if base is config else title, []).extend(own)
        missing -= set(own)
    return groups


def _bases_first(config: type[Any]) -> list[type[Any]]:
    bases = [base for base in config.__bases__ if dataclasses.is_dataclass(base)]
    return [*(above for base in bases for above in _bases_first(base)), config]


def flags_of(config: Any) -> dict[str, Flag]:
    """Return all flags of a config or its class, by name, in the order of the help page."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    names = [name for group in groups_of(config).values() for name in group]
    known = {name: fields[name].metadata.get(METADATA_KEY) for name in names}
    return {name: value for name, value in known.items() if value is not None}


def defaults_of(config: Any) -> dict[str, Any]:
    """Return the defaults that depend on nothing else, by name."""
    return {
        name: known.default
        for name, known in flags_of(config).items()
        if known.default not in (None, MISSING) and not isinstance(known.default, Derived)
    }


def paths_of(config: Any) -> set[str]:
    """Return the names of the flags that are paths."""
    kinds = typing.get_type_hints(config if isinstance(config, type) else type(config))
    return {name for name, kind in kinds.items() if Path in (kind, *typing.get_args(kind))}


# --- checking -------------------------------------------------------------------------------------


def check_values(config: Any, values: Mapping[str, Any]) -> None:
    """Raises UserError for the first value that breaks the rules of its flag; None breaks none."""
    for name, known in flags_of(config).items():
        if values.get(name) is not None:
            known.check(name, values[name])


def check_interval(name: str, times: Sequence[float]) -> None:
    """Raises UserError for a flag of two times if they are not in 0 … 1, the lower first."""
    if len(times) != 2:
        raise UserError(f"--{name} takes two times: the lowest and the highest")
    low, high = times
    if not 0 <= low < high <= 1:
        raise UserError(f"--{name} {low:g} {high:g}: must be two times in 0 … 1, the lower first")


def reject_unused(config: Any, values: Mapping[str, Any], given: Collection[str]) -> None:
    """Reject a given flag that another flag leaves unread.

    Raises:
        UserError: there is such a flag.
    """
    for name, known in flags_of(config).items():
        if name in given and known.is_unread(values) and known.only_with:
            other, value = known.only_with
            raise UserError(f"--{name} is for --{other}{f' {value}' if value else ''}")
