"""The help page of a command: its description, and its flags in groups."""

import dataclasses
import inspect
import os
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

from runtime.flags import flags_of, groups_of

WIDTH = 100
CONFIG_HELP = "YAML or JSON file of flags, one `name: value` each; flags on the command line win"
RUN_HELP = "; or a run's config.json, to start its training once more"


def help_page(config: type[Any], types: Mapping[str, str]) -> str:
    """Return the page: the docstring, then type, default and meaning of each flag.

    Args:
        config: the dataclass of the command's flags.
        types: what each flag takes, in words.
    """
    known = flags_of(config)
    parts = [f"usage: python {command_name()} [--flag value …]"]
    parts.append(inspect.getdoc(config) or "")
    for title, names in groups_of(config).items():
        texts = {name: known[name].help if name in known else "" for name in names}
        entries = [
            _entry(name, types[name], shown_default(config, name), text)
            for name, text in texts.items()
        ]
        parts.append("\n".join([title, *entries]))
    text = CONFIG_HELP + (RUN_HELP if hasattr(config, "flags_of_run") else "")
    parts.append("\n".join(["Flags from a file", _entry("config", "a path", "none", text)]))
    return "\n\n".join(parts)


def command_name() -> str:
    """Return what follows `python` on the command line: a file, or -m and a module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.origin == sys.argv[0]:
        return f"-m {spec.name}"
    return os.path.basename(sys.argv[0])


def shown_default(config: type[Any], name: str) -> str | None:
    """Return a flag's default as one would type it, or in words; None if the flag is required."""
    known = flags_of(config).get(name)
    (field,) = [field for field in dataclasses.fields(config) if field.name == name]
    default = known.default if known else field.default
    if default is MISSING:
        return None
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    return "none" if default is None else str(default)


def _entry(name: str, kind: str, default: str | None, text: str) -> str:
    kind = kind.removesuffix(" or none") if default == "none" else kind
    facts = f"{kind}, required" if default is None else f"{kind}, default: {default}"
    indent = " " * 6
    body = textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
    return "\n".join([f"  --{name}  ({facts})", *body])
