"""A method is found by its name or its module, and a model's method by what its run recorded."""

from dataclasses import dataclass

import pytest

from methods.ddpm import DDPM
from methods.rectified_flow import RectifiedFlow
from methods.registry import METHODS, class_path, find_method, method_of, recorded_name
from runtime.errors import UserError
from runtime.flags import setting


@dataclass(frozen=True)
class Mine(RectifiedFlow):
    title = "mine"
    power: float = setting(2.0, "of the error", above=0)


def test_a_method_is_found_by_name_or_in_its_module():
    assert {name: find_method(name) for name in METHODS} == METHODS
    assert find_method(class_path(Mine)) is Mine


@pytest.mark.parametrize(
    "name, message",
    [
        ("ddmp", "unknown objective 'ddmp'; did you mean 'ddpm'"),
        ("no_such_module:Mine", "cannot be imported: No module named 'no_such_module'"),
        ("methods.ddpm:Mine", "cannot be imported: module 'methods.ddpm' has no attribute 'Mine'"),
        (":Mine", "cannot be imported"),
        ("math:pi", "is not a subclass of methods.method.Method"),
    ],
)
def test_what_is_no_method_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        find_method(name)


def test_the_method_of_a_model_is_the_recorded_one():
    flags = {"objective": "ddpm", "prediction": "v", "learned_sigma": True, "seed": 3}
    assert method_of(flags) == DDPM("v", learned_sigma=True)
    assert method_of({}) == RectifiedFlow()
    flags = {"objective": "rectified_flow", "time_shift": 3.0}
    assert method_of(flags) == RectifiedFlow(time_shift=3.0)
    assert method_of({"objective": "mine", "method": class_path(Mine), "power": 3.0}) == Mine(
        power=3.0
    )
    with pytest.raises(UserError, match=r"with --objective mine, which is not known here: .*Other"):
        method_of({"objective": "mine", "method": class_path(Mine).replace("Mine", "Other")})


def test_a_method_that_was_added_in_another_session_is_found_by_its_class():
    assert recorded_name({"objective": "ddpm"}) == "ddpm" and recorded_name({}) == "rectified_flow"
    flags = {"objective": "mine", "method": class_path(Mine), "power": 3.0}
    assert find_method(recorded_name(flags)) is Mine
    with pytest.raises(UserError, match=r"not known here: .* add it to METHODS first, or train"):
        recorded_name({"objective": "mine", "method": "__main__:NotHere"})


def test_a_field_left_out_has_its_default_and_one_out_of_range_is_refused():
    assert Mine().power == 2 and Mine.from_flags({"power": None, "seed": 1}).power == 2
    with pytest.raises(UserError, match=r"--power -1: must be above 0"):
        Mine(power=-1)
