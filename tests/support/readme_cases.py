"""Inputs and helpers shared by the tests of readme."""

import re

from commands import ROOT

TEXT = (ROOT / "README.md").read_text()


def recipe(name):
    """The code that follows a recipe's name."""
    return re.findall(r"(?s)```python\n(.*?)```", TEXT.split(f"\n**{name}** is ")[1])[0]


def cook(name, *modules, **more):
    """Runs a recipe where its text says that it belongs, and returns the names there."""
    place = {k: v for module in modules for k, v in vars(module).items()} | more
    exec(recipe(name), place)
    return place
