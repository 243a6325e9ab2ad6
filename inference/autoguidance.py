"""Autoguidance: a smaller or less trained model of the same data as guide (Karras et al. 2024).

    python generate.py --run RUN --guide RUN@2000 --guide_scale 2

Both predict for the same label. What the weak one gets wrong more often, the strong one is led away
from. No null label is needed.
"""

from pathlib import Path
from typing import Any

from inference.spaces import compare_spaces
from inference.trained_model import Guide, SamplingOverrides, SamplingPlan, TrainedModel
from runtime.errors import UserError
from runtime.run_folder import split_reference

DEFAULT_SCALE = 2.0


def plan_with_guide(
    trained: TrainedModel, overrides: SamplingOverrides, *, negative: bool = False
) -> SamplingPlan:
    """Complete the overrides with the model's own settings, and open the weak model that they name.

    With a weak model, classifier-free guidance is off unless its scale is given; it acts first
    then, on the strong model alone. At a scale of 1 the weak model is not read.

    Args:
        negative: a negative prompt is given.

    Raises:
        UserError: a value does not fit the model, or the two models do not fit each other.
    """
    scale = DEFAULT_SCALE if overrides.guide_scale is None else overrides.guide_scale
    if not overrides.guide:
        if overrides.guide_scale is not None:
            raise UserError(f"--guide_scale {scale:g} needs a weak model: --guide RUN[@STEP]")
        return trained.plan(overrides, negative=negative)
    guide = Guide(open_guide(overrides.guide, trained), scale)
    return trained.plan(overrides, negative=negative, guide=guide)


def open_guide(reference: str, trained: TrainedModel) -> TrainedModel:
    """Open the weak model for a strong one.

    Args:
        reference: a run's folder, or `RUN@STEP` for an earlier checkpoint of it.

    Raises:
        UserError: there is no such run, or it predicts something else than the strong model.
    """
    folder, step = split_reference(reference)
    guide = TrainedModel.from_run(
        folder, ema=trained.ema is not False, step=step, fsdp=trained.mesh.shape["fsdp"]
    )
    if trained.trained_size == guide.image_size:
        guide = guide.at_size(trained.image_size.written)
    ours, theirs = _facts(trained), _facts(guide)
    if name := next((name for name in ours if ours[name] != theirs.get(name)), None):
        raise UserError(
            f"--guide {reference}: its {name} is {str(theirs.get(name))[:60]}, and of "
            f"{trained.name} {str(ours[name])[:60]}: they must be the same"
        )
    if differences := compare_spaces(trained.space, guide.space):
        raise UserError(f"--guide {reference}: {differences[0]}")
    return guide


def _facts(model: TrainedModel) -> dict[str, Any]:
    """Facts that two models must share for the difference of their outputs to mean something."""
    method, network = model.method, model.model
    flags = (*method.output_flags, "time_shift")
    return {
        "objective": method.title,
        **{name: getattr(method, name) for name in flags if hasattr(method, name)},
        "size": (network.image_size, network.channels),
        "number of classes": network.n_classes,
        "classes": model.label_names,
        "way to encode captions": "SD3's" if model.full_width else "ours",
        "text encoders": [Path(path).name for path in model.text_encoder_paths],
        "dataset": model.settings.get("dataset_name"),
    }
