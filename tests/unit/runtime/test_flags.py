"""A flag is declared once: its default, its rules and its group follow from that declaration."""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import pytest

from runtime.errors import UserError
from runtime.flags import (
    Derived,
    again,
    check_values,
    defaults_of,
    flag,
    flags_of,
    groups_of,
    paths_of,
    reject_unused,
    required,
    setting,
)


@dataclass(frozen=True, kw_only=True)
class BaseFlags:
    """First."""

    out: Path | None = flag(Derived("here"), "a folder")
    mode: str = setting("fast", "fast or slow", choices=("fast", "slow"))


@dataclass(frozen=True, kw_only=True)
class MoreFlags(BaseFlags):
    """First."""

    rate: float = setting(0.5, "per step", above=0, only_with=("mode", "slow"), may_change=True)


@dataclass(frozen=True, kw_only=True)
class OtherFlags:
    """Second."""

    share: float = flag(0.1, "of all", at_least=0, at_most=1)
    n: int | None = flag(None, "workers", at_least=2, only_with=("share", None))


@dataclass(frozen=True, kw_only=True)
class Config(MoreFlags, OtherFlags):
    """A command."""

    run: Path = required("a folder")
    rate: float = again(MoreFlags, "rate", default=0.25, above=None)


def test_a_setting_is_none_while_it_is_left_out():
    config = Config(run=Path("x"))
    assert (config.out, config.mode, config.rate, config.share) == (None, None, None, 0.1)
    assert defaults_of(config) == {"mode": "fast", "rate": 0.25, "share": 0.1}
    with pytest.raises(TypeError, match="run"):
        Config()


def test_groups_are_in_the_order_of_inheritance_with_the_basic_ones_first():
    expected = {"First": ["out", "mode", "rate"], "Second": ["share", "n"], "Flags": ["run"]}
    assert groups_of(Config) == groups_of(Config(run=Path("x"))) == expected
    names = [name for group in expected.values() for name in group]
    assert list(flags_of(Config)) == names
    assert sorted(names) == sorted(field.name for field in fields(Config))


def test_a_flag_declared_again_differs_only_where_it_is_said_to():
    first, second = flags_of(MoreFlags)["rate"], flags_of(Config)["rate"]
    assert (first.default, first.above, second.default, second.above) == (0.5, 0, 0.25, None)
    assert (second.help, second.only_with, second.may_change) == (
        *("per step", ("mode", "slow")),
        True,
    )
    assert flags_of(Config)["run"].default is MISSING


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0.0}, "--rate 0.0: must be above 0"),
        ({"rate": float("nan")}, "--rate nan: must be finite"),
        ({"share": 1.5}, "--share 1.5: must be between 0 and 1"),
        ({"n": 1}, "--n 1: must be at least 2"),
        ({"mode": "slwo"}, "unknown mode 'slwo'; did you mean 'slow'? (one of: fast, slow)"),
    ],
)
def test_a_value_that_breaks_a_rule_is_named(values, message):
    @dataclass(frozen=True, kw_only=True)
    class Both(MoreFlags, OtherFlags):
        pass

    with pytest.raises(UserError) as error:
        check_values(Both, values)
    assert str(error.value) == message
    check_values(Both, dict.fromkeys(values))  # None breaks no rule


def test_a_given_flag_that_another_leaves_unread_is_rejected():
    reject_unused(Config, {"mode": "slow", "share": 0.5}, ["rate", "n"])
    reject_unused(Config, {"mode": "fast", "share": 0.0}, [])
    with pytest.raises(UserError, match=r"^--rate is for --mode slow$"):
        reject_unused(Config, {"mode": "fast"}, ["rate"])
    with pytest.raises(UserError, match=r"^--n is for --share$"):
        reject_unused(Config, {"share": 0.0}, ["n"])


def test_paths_are_found_by_their_type():
    assert paths_of(Config) == {"out", "run"}
