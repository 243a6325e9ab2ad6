"""All methods by the value of `--objective`, and those of other people's modules."""

import importlib
from collections.abc import Mapping
from typing import Any

from methods.ddpm import DDPM
from methods.mean_flow import MeanFlow
from methods.method import Method
from methods.rectified_flow import RectifiedFlow
from runtime.errors import UserError, unknown_name

METHODS: dict[str, type[Method]] = {
    "rectified_flow": RectifiedFlow,
    "meanflow": MeanFlow,
    "ddpm": DDPM,
}
DEFAULT_METHOD = "rectified_flow"


def find_method(name: str) -> type[Method]:
    """Look up a method: a key of METHODS, or `module:class` of a module that can be imported.

    Raises:
        UserError: there is none of this name.
    """
    if name in METHODS:
        return METHODS[name]
    module, colon, class_name = name.partition(":")
    if not colon:
        raise unknown_name("objective", name, METHODS)
    try:
        found = getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"method '{name}' cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"method '{name}' is not a subclass of methods.method.Method")
    return found


def class_path(method: type[Method]) -> str:
    """Return the `module:class` by which `find_method` imports a method."""
    return f"{method.__module__}:{method.__qualname__}"


def method_of(settings: Mapping[str, Any]) -> Method:
    """Make the method of a trained model from its `config.json`.

    Raises:
        UserError: it was trained by a method that is not known here and cannot be imported.
    """
    name = settings.get("objective") or DEFAULT_METHOD
    if name in METHODS:
        return METHODS[name].from_flags(settings)
    try:
        return find_method(settings.get("method") or name).from_flags(settings)
    except UserError as error:
        raise UserError(
            f"the model was trained with --objective {name}, which is not known here: {error}; add "
            "it to METHODS first, or train with --objective MODULE:CLASS to sample from anywhere"
        ) from None


def recorded_name(settings: Mapping[str, Any]) -> str:
    """Return the name by which `find_method` finds the method of a trained model here.

    Raises:
        UserError: it was trained by a method that is not known here and cannot be imported.
    """
    name = settings.get("objective") or DEFAULT_METHOD
    if name in METHODS:
        return name
    return class_path(type(method_of(settings)))
