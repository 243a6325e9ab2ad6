"""The rules of what can be guided: was its null label trained, and what follows if it was not.

Guidance leads away from the output for the null label. A run without label dropout never trains
that label, and some published tables of classes have no row for it.
"""

from collections.abc import Mapping
from typing import Any

from runtime.errors import UserError


def null_is_trained(settings: Mapping[str, Any]) -> bool:
    """Check if a model has a trained null label.

    Args:
        settings: as in a run's config.json. A run that started from other weights, which may have
            brought the label, records it; else the label dropout tells.
    """
    recorded = settings.get("null_is_trained")
    return settings.get("label_dropout") != 0 if recorded is None else recorded


def default_scale(settings: Mapping[str, Any]) -> float:
    """Return the guidance scale to sample a model with: its own, or 1 if it cannot be guided."""
    return float(settings["cfg_scale"]) if null_is_trained(settings) else 1.0


def untrained_null_error(name: str, cfg_scale: float) -> UserError:
    """Make the error for guidance of a model without a trained null label."""
    return UserError(
        f"cfg_scale {cfg_scale:g}: '{name}' was trained without label dropout, so it has no null "
        "label to guide by; leave it at 1"
    )


def unguidable_error(method: str, given: str) -> UserError:
    """Make the error for guidance of a method whose guidance is in the weights.

    Args:
        given: what asks for guidance, such as "cfg_scale 2" or "--guide".
    """
    return UserError(
        f"{given}: guidance of {method} is in its weights; sample it without any, and train with "
        "--target_scale or --teacher_scale to change it"
    )
