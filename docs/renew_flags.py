"""Write the flags of `train.py`, by group, into docs/training.md: `python docs/renew_flags.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime.flags import flags_of, groups_of
from runtime.help_page import shown_default
from training.config import TrainConfig

PAGE = Path(__file__).with_name("training.md")
BEGIN, END = "<!-- flags: written by docs/renew_flags.py -->", "<!-- end of flags -->"


def tables() -> str:
    """Return a table of flags for each group."""
    known, parts = flags_of(TrainConfig), []
    for group, names in groups_of(TrainConfig).items():
        rows = [f"| `--{name}` | {default(name)} | {known[name].help} |" for name in names]
        parts.append(f"### {group}\n\n| flag | default | |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts)


def default(name: str) -> str:
    """Return a flag's default as the help page shows it, and nothing for none."""
    shown = shown_default(TrainConfig, name)
    return "" if shown in (None, "none") else shown


def renewed(page: str) -> str:
    """Return the page with the tables as the code has them now."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
