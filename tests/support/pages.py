"""README.md and the pages of docs/, and the recipes on them."""

import re

from commands import ROOT

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
RECIPES = ("A dataset", "A block", "A method", "A solver", "A loss of hidden states")
RECIPES += ("A guidance", "A teacher")


def recipe(title: str) -> str:
    """Return the code below a heading of docs/extending.md."""
    page = PAGES[ROOT / "docs" / "extending.md"]
    return re.findall(r"(?s)```python\n(.*?)```", page.split(f"\n## {title}\n")[1])[0]


def run_recipe(title: str, *modules, **names) -> dict:
    """Run a recipe among the names of these modules, and return the names there afterwards."""
    place = {name: value for module in modules for name, value in vars(module).items()} | names
    exec(recipe(title), place)
    return place
