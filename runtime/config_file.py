"""Flags from a file, for `--config FILE`: YAML or JSON, one `name: value` for each flag.

A run's `config.json` is such a file too. It records more than what was given; the command's config
chooses by its method `flags_of_run` what starts that run once more.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from runtime.errors import UserError, unknown_name
from runtime.flag_names import hint_from_tables
from runtime.flags import groups_of
from runtime.run_folder import REQUIRED_KEYS


class FileWords(NamedTuple):
    """The value of a flag as words of a command line.

    Args:
        is_list: whether the file has a list. Its words are not split at commas.
    """

    words: list[str]
    is_list: bool


def read_config_file(path: Path, config: type[Any]) -> dict[str, FileWords]:
    """Read the flags of a file; those with a null value are left out.

    Args:
        config: the dataclass of the command's flags.

    Raises:
        UserError: the file cannot be read, has a key that is no flag, or is of another command.
    """
    content = _read_mapping(path)
    if all(key in content for key in REQUIRED_KEYS):
        if not hasattr(config, "flags_of_run"):
            raise UserError(f"{path} is of a training run, whose flags this command does not take")
        try:
            content = config.flags_of_run(content)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    names = [name for group in groups_of(config).values() for name in group]
    words: dict[str, FileWords] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise UserError(f"{path}: {_unknown_flag(key, name, names)}")
        if value is not None:
            words[name] = _as_words(path, name, value)
    return words


def _unknown_flag(key: Any, name: str, names: list[str]) -> UserError:
    hint = hint_from_tables(name, names)
    if hint is None:
        return unknown_name("flag", key, names)
    return UserError(f"unknown flag '{key}'; {hint}")


def _read_mapping(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text()
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:  # ValueError: not JSON, or not even text
        raise UserError(f"--config {path} is damaged: {error}") from None
    if not isinstance(content, dict | None):
        raise UserError(f"--config {path}: expected one 'name: value' for each flag")
    return content or {}


def _as_words(path: Path, name: str, value: Any) -> FileWords:
    is_list = isinstance(value, list)
    parts = value if is_list else [value]
    if any(isinstance(part, list | dict | None) for part in parts):
        raise UserError(f"{path}: {name} {value}: expected a value or a list of values")
    words = [str(part).lower() if isinstance(part, bool) else str(part) for part in parts]
    return FileWords(words, is_list)
