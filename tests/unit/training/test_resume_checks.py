"""A run is not resumed on a dataset whose classes have changed."""

from dataclasses import replace

import pytest

from datasets_config import DATASET_CONFIGS
from runtime.errors import UserError
from training.conditionings import RUN_CONDITIONINGS


def with_classes(*names, n=None):
    return replace(
        DATASET_CONFIGS["digits"],
        name="folder:pets",
        label_names=tuple(names),
        n_classes=len(names) if n is None else n,
    )


def saved(*names, n=None):
    n = len(names) if n is None else n
    return {"model_config": {"n_classes": n}, "dataset": {"label_names": list(names)}}


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        (saved("cat", "dog"), with_classes("ant", "cat", "dog"), "had 2 .* has 3 (added: ant)"),
        (saved("ant", "cat", "dog"), with_classes("cat", "dog"), "had 3 .* has 2 (removed: ant)"),
        (saved("cat", "dog"), with_classes("ant", "cat"), "(added: ant; removed: dog)"),
        (saved("0", "1", "10", "2"), with_classes("0", "1", "2", "10"), "(in another order)"),
        (saved(n=10), with_classes(n=11), "had 10 .* has 11 (some were added)"),
        (saved(n=10), with_classes(n=0), "had 10 .* has 0 (some were removed)"),
        (saved("a"), with_classes("a", "b", "c", "d", "e"), "(added: b, c, … 2 more)"),
    ],
)
def test_other_classes_are_named(before, now, change):
    pattern = change.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(UserError, match=f"cannot resume: folder:pets .*{pattern}") as error:
        RUN_CONDITIONINGS["class"].require_same(now, before)
    assert "--init_from RUN" in str(error.value) and len(str(error.value)) <= 300


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (saved("cat", "dog"), with_classes("cat", "dog")),
        (saved(n=2), with_classes("cat", "dog")),  # a version that did not read the names
        (saved(n=10), with_classes(n=10)),
    ],
)
def test_the_same_classes_are_resumed(before, now):
    RUN_CONDITIONINGS["class"].require_same(now, before)
