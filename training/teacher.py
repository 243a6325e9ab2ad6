"""A teacher: a trained flow whose velocity another network learns to follow.

It is not trained. Its weights are sharded as the student's are, and go into every step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from inference.conditioning import Conditioning
from inference.spaces import Space, compare_spaces
from inference.trained_model import TrainedModel
from methods.method import drop_labels
from methods.rectified_flow import RectifiedFlow
from model import ModelConfig, model_graphdef
from runtime import processes
from runtime.errors import UserError
from runtime.flags import Derived, flag, setting
from runtime.run_folder import find_run, split_reference


@dataclass(frozen=True, kw_only=True)
class TeacherFlags:
    """Teacher."""

    teacher: str | None = flag(
        None,
        "a run of rectified flow, RUN or RUN@STEP, or a published one, to distil",
        may_change=True,
    )
    teacher_scale: float = setting(
        Derived("the teacher's own"),
        "guidance scale of the teacher, which the student learns as its own",
        only_with=("teacher", None),
    )


@dataclass(frozen=True)
class Teacher:
    """A frozen flow, and the scale that it is guided at.

    Args:
        weights: on the devices of the student.
        null: one label in place of its null label, as the student's.
        reference: where it is, with the step of its checkpoint: `RUN@STEP`.
    """

    network: ModelConfig
    method: RectifiedFlow
    weights: Any
    scale: float
    reference: str
    null: Any = None

    @property
    def passes(self) -> int:
        """Its forward passes in a step: with guidance one more, without a label."""
        return 1 + (self.scale != 1)

    def merge(self) -> Any:
        """Return the network with its weights."""
        return nnx.merge(model_graphdef(self.network), self.weights)

    def velocity(self, network: Any) -> Callable[[Array, Array, Any], Array]:
        """Make the guided velocity, as a function of (x, t, label), of the merged network."""

        def velocity(x: Array, t: Array, label: Any) -> Array:
            output = network(x, t, label)
            if self.scale != 1:
                everywhere = jnp.ones(len(x), bool)
                null = drop_labels(label, everywhere, self.network.n_classes, self.null)
                unconditional = network(x, t, null)
                output = unconditional + self.scale * (output - unconditional)
            return self.method.velocity(output, x, t.reshape(-1, 1, 1, 1))

        return velocity


def taught_by(teacher: Teacher, loss: Callable[..., Any]) -> Callable[..., Any]:
    """Make a loss take the teacher's network as its fourth argument, and follow its velocity."""

    def taught(model: Any, batch: Any, key: Any, network: Any) -> Any:
        return loss(model, batch, key, teacher=teacher.velocity(network))

    return taught


def open_teacher(
    reference: str,
    scale: float | None,
    *,
    network: ModelConfig,
    conditioning: Conditioning,
    space: Space,
    fsdp: int,
) -> Teacher:
    """Open the teacher of a network.

    Args:
        reference: a run's folder, `RUN@STEP` for an earlier checkpoint of it, or a published model.
        scale: its guidance scale, by default its own.
        network, conditioning, space: of the student.

    Raises:
        UserError: there is no such model, it is no flow, or it is of other data.
    """
    try:
        model = _open_model(reference, fsdp)
        weights = model.params
    except UserError as error:
        raise UserError(f"--teacher {reference}: {error}") from None
    if not isinstance(model.method, RectifiedFlow):
        raise UserError(f"--teacher {reference}: a teacher is a flow, not {model.method.title}")
    if model.full_width and not conditioning.full_width:
        raise UserError(
            f"--teacher {reference}: it takes captions as SD3 does; start this run from it too "
            "(--init_from), so that it takes the same"
        )
    theirs = _facts(model.model, model.conditioning)
    theirs["noise_scale"] = model.method.noise_scale
    ours = _facts(network, conditioning) | {"noise_scale": 1.0}
    if "" in (theirs["classes"], ours["classes"]):  # one has no names: their number must do
        theirs["classes"] = ours["classes"] = ""
    if name := next((name for name in ours if ours[name] != theirs[name]), None):
        raise UserError(
            f"--teacher {reference}: its {name} is {str(theirs[name])[:60]}, this run's is "
            f"{str(ours[name])[:60]}: they must be the same"
        )
    if differences := compare_spaces(space, model.space):
        raise UserError(f"--teacher {reference}: {differences[0]}")
    scale = model.default_cfg_scale if scale is None else scale
    if scale != 1 and not (model.null_is_trained and network.is_conditional):
        raise UserError(
            f"--teacher_scale {scale:g}: {model.name} has no null label to be guided by; leave it "
            "at 1"
        )
    config = replace(model.model, dtype=network.dtype, fp8=False, remat=network.remat)
    is_whole = split_reference(reference)[1] is not None or model.step is None
    full = reference if is_whole else f"{reference}@{model.step}"
    return Teacher(config, model.method, weights, float(scale), full, conditioning.null)


def _open_model(reference: str, fsdp: int) -> TrainedModel:
    if run := find_run(reference, "--teacher"):
        folder, step = run
        return TrainedModel.from_run(folder, step=step, fsdp=fsdp)
    with processes.first_then_others():
        return TrainedModel.from_pretrained(reference, fsdp=fsdp)


def _facts(network: ModelConfig, conditioning: Conditioning) -> dict[str, Any]:
    """Facts of the data that a teacher and a student must share."""
    return {
        "size": (network.image_size, network.channels),
        "number of classes": network.n_classes,
        "classes": ", ".join(conditioning.names),
        "text encoders": [Path(path).name for path in conditioning.encoders],
        "caption width": (network.text_width, network.pooled_width),
        "way to encode captions": "SD3's" if conditioning.full_width else "ours",
    }
