"""Flags of a command, each declared once: the fields of a frozen dataclass with their metadata.

    @dataclass(frozen=True)
    class SamplingFlags:
        "Sampling."

        eta: float = flag(0.0, "fresh noise of ddim, from 0 to 1", at_least=0, at_most=1)
        n_steps: int = setting(50, "solver steps", above=0, may_change=True)

A `flag` that is left out has its default. A `setting` that is left out is None until the command
has looked at the run to resume and at the dataset. `runtime.cli` reads the command line and prints
the help, in one group for each dataclass that a command's config inherits from.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import UserError, unknown_name

METADATA_KEY = "flag"


class Derived(str):
    """A default that depends on other values; the text is what the help page shows for it."""


@dataclass(frozen=True)
class Flag:
    """Everything that is known of a flag besides its name and type.

    Args:
        default: the value of a flag left out; None if there is none.
        help: one line for the help page, without a final full stop.
        above: the value must be larger.
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
        if self.above is not None and value <= self.above:
            raise UserError(f"--{name} {value}: must be above {self.above}")
        low, high = self.at_least, self.at_most
        if low is not None and high is not None and not low <= value <= high:
            raise UserError(f"--{name} {value}: must be between {low} and {high}")
        if low is not None and value < low:
            raise UserError(f"--{name} {value}: must not be below {low}")
        if self.choices is not None and value not in self.choices:
            raise unknown_name(name, value, self.choices)


def flag(default: Any, help: str, *, shown: str | None = None, **rules: Any) -> Any:
    """Declare a flag whose value is `default` if it is left out.

    Args:
        shown: what the help page shows in place of a default of None.
        rules: further fields of `Flag`.
    """
    known = Flag(default if shown is None else Derived(shown), help, **rules)
    return dataclasses.field(default=default, metadata={METADATA_KEY: known})


def setting(default: Any, help: str, **rules: Any) -> Any:
    """Declare a flag that is None while it is left out, and then the resumed run's value, the
    dataset's recommendation or `default`.

    Args:
        rules: further fields of `Flag`.
    """
    known = Flag(default, help, **rules)
    return dataclasses.field(default=None, metadata={METADATA_KEY: known})


def flags_of(config: Any) -> dict[str, Flag]:
    """Return all flags of a config or its class, by name."""
    fields = dataclasses.fields(config)
    return {f.name: f.metadata[METADATA_KEY] for f in fields if METADATA_KEY in f.metadata}


def defaults_of(config: Any) -> dict[str, Any]:
    """Return the defaults that depend on nothing else, by name."""
    flags = flags_of(config)
    return {
        name: known.default
        for name, known in flags.items()
        if known.default is not None and not isinstance(known.default, Derived)
    }


def check_values(config: Any, values: Mapping[str, Any]) -> None:
    """Raises UserError for the first value that breaks the rules of its flag; None breaks none."""
    for name, known in flags_of(config).items():
        if values.get(name) is not None:
            known.check(name, values[name])


def reject_unused(config: Any, values: Mapping[str, Any], given: Collection[str]) -> None:
    """Reject a given flag that another flag leaves unread.

    Raises:
        UserError: there is such a flag.
    """
    for name, known in flags_of(config).items():
        if name not in given or not known.only_with:
            continue
        other, required = known.only_with
        actual = values.get(other)
        if not actual if required is None else actual != required:
            raise UserError(f"--{name} is for --{other}{f' {required}' if required else ''}")
