"""A method of training and sampling, and the inputs that the losses of all methods share.

A method is one object: it makes a loss of a batch, and it knows what a network's output means, so
it also leads from noise to data. Rectified flow (`methods/rectified_flow.py`) is the one to read
first. Time runs from data (t = 0) to noise (t = 1) in all of them.

Each row of a batch has its own random keys, folded from its index in the global batch, so the
numbers do not depend on how rows are spread over devices. Nothing here knows of networks,
optimizers or devices.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from runtime.errors import UserError
from runtime.flags import flags_of
from sampling import FreshNoise, Solution, Velocity

N_TIME_BINS = 10
Metrics = dict[str, Array]
Loss = Callable[[Any, Any, Any], tuple[Array, Metrics]]  # (model, batch, key) →
# The `image` of a batch → the data that a model sees, given one key for each row.
ToModelInput = Callable[[Array, Key[Array, "b"]], Float[Array, "b h w c"]]
MethodType = TypeVar("MethodType", bound="Method")
TimeSteps = Any  # of a solver, from noise to data: a tree of arrays of the method's own


@dataclass(frozen=True)
class Method(ABC):
    """A way to train a network and to sample from it.

    A subclass is a frozen dataclass. Its fields are its flags, declared by `runtime.flags.setting`;
    one that is None gets its default. A plain field is a fact of published models, which no flag of
    training sets. Its solvers see what `predict(x, t)` returns: the network's
    output at the noisy data x and the time t, guided or not.

    Attributes:
        title: the method's name in a sentence.
        solvers: its solvers by name, the default first.
        output_flags: the fields that say what the network's output means.
        sampling_flags: flags of the samples of a run that only this method reads.
        max_steps: the most steps of its solvers, if there is a limit.
        noise_scale: standard deviation of the noise that it samples from.
        takes_span: its network predicts over a span of time: `model(x, t, label, span=…)`, and
            `predict(x, t, span=…)` in its solvers.
        is_guidable: its samples can be guided; else guidance is in the weights, if anywhere.
        default_steps: of its solvers, by default.
        default_time_scale: of its network, by default.

    Raises:
        UserError: the value of a field is out of range.
    """

    title: ClassVar[str]
    solvers: ClassVar[Mapping[str, Callable[..., Solution]]]
    output_flags: ClassVar[tuple[str, ...]] = ()
    sampling_flags: ClassVar[tuple[str, ...]] = ()
    max_steps: ClassVar[int | None] = None
    noise_scale = 1.0  # no field here: a method may have a flag of this name
    takes_span: ClassVar[bool] = False
    is_guidable: ClassVar[bool] = True
    default_steps: ClassVar[int] = 50
    default_time_scale: ClassVar[float] = 1000.0

    def __post_init__(self):
        for name, known in flags_of(self).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, known.default)
            known.check(name, getattr(self, name))

    @classmethod
    def from_flags(cls: type[MethodType], flags: Mapping[str, Any]) -> MethodType:
        """Make the method from all flags of a run, or from its `config.json`."""
        names = [field.name for field in fields(cls) if flags.get(field.name) is not None]
        values = {name: flags[name] for name in names}
        # JSON has no tuples.
        return cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})

    @abstractmethod
    def loss(
        self,
        model: Any,
        batch: Any,
        key: Key[Array, ""],
        *,
        label_dropout: float = 0.0,
        to_input: ToModelInput | None = None,
        null: Any = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """The mean loss over the rows of a batch, and means to report beside it.

        Args:
            model: `model(x, t, label)`, with a `config`.
            batch: has `row`, `image` and `label`; a label is any tree of arrays.
            label_dropout: fraction of rows whose label is replaced by the null label, which
                classifier-free guidance needs (Ho & Salimans 2022, alg. 1).
            to_input: converts a batch's `image` to the data that the model sees, by default
                `pixels_to_input`.
            null: one row that stands in for the null label, as in `drop_labels`.
        """

    def out_channels(self, channels: int) -> int:
        """The number of channels of the network's output, for data of `channels`."""
        return channels

    def extra_passes(self, *, is_taught: bool) -> int:
        """Count the forward passes of the network in the loss, besides the one that is
        differentiated.
        """
        del is_taught
        return 0

    def check_training(self, *, time_scale: float, label_dropout: float, is_taught: bool) -> None:
        """Reject what this method cannot train with.

        Args:
            time_scale: of the network.
            label_dropout: share of rows without a label; 0 if there are no labels.
            is_taught: there is a teacher; the loss takes it as `teacher`.

        Raises:
            UserError: the first one found.
        """
        del time_scale, label_dropout
        if is_taught:
            raise UserError(f"--teacher is not for {self.title}: it is for --objective meanflow")

    @abstractmethod
    def describe(self) -> str:
        """Sentences on time and on the network's output, for readers of exported weights."""

    # --- from noise to data -----------------------------------------------------------------------

    def check_sampler(self, *, solver: str, n_steps: int, shift: float, eta: float) -> None:
        """Raises UserError if this method cannot be sampled from so."""
        if solver not in self.solvers:
            raise UserError(
                f"--solver {solver} is not for a model trained by {self.title}, which takes one "
                f"of: {', '.join(self.solvers)}"
            )
        if n_steps < 1:
            raise UserError(f"the number of sampling steps is {n_steps}; it must be at least 1")
        if self.max_steps and n_steps > self.max_steps:
            raise UserError(
                f"the number of sampling steps is {n_steps}; {self.title} has {self.max_steps}"
            )

    @abstractmethod
    def time_steps(
        self, n_steps: int, *, solver: str = "", shift: float = 1.0, start: float = 1.0
    ) -> TimeSteps:
        """Discretize time from `start` to the data, as the solver takes it."""

    @abstractmethod
    def state_times(self, steps: TimeSteps) -> Float[np.ndarray, "times"]:
        """The time t of each state of a trajectory through `steps`, the data's 0 last."""

    @abstractmethod
    def add_noise(
        self, data: Float[Array, "b *s"], noise: Float[Array, "b *s"], steps: TimeSteps
    ) -> Float[Array, "b *s"]:
        """Noise the data up to the time at which `steps` begin."""

    @abstractmethod
    def solve(
        self,
        predict: Velocity,
        noise: Float[Array, "b *s"],
        steps: TimeSteps,
        fresh_noise: FreshNoise,
        *,
        solver: str,
        eta: float = 0.0,
        clip: bool = False,
        trajectory: bool = False,
    ) -> Solution:
        """Lead from noise to data along `steps`.

        Args:
            predict: `predict(x, t)`, the network's output.
            fresh_noise: noise of a step, for solvers that add some.
            solver: a key of `solvers`.
            eta: fraction of fresh noise, for solvers that leave it open.
            clip: the data lie in −1 … 1.
            trajectory: return all states too.
        """


# --- inputs of a loss -----------------------------------------------------------------------------


def to_float(image: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Bytes 0 … 255 → −1 … 1, on the device: a quarter of the bytes cross the wire."""
    return image.astype(jnp.float32) / 127.5 - 1


def pixels_to_input(
    image: UInt8[Array, "b h w c"], keys: Key[Array, "b"]
) -> Float[Array, "b h w c"]:
    """The `ToModelInput` of pixels, which needs no random numbers."""
    return to_float(image)


class RowKeys(NamedTuple):
    """One key per row of the batch and per use."""

    time: Key[Array, "b"]
    noise: Key[Array, "b"]
    drop: Key[Array, "b"]
    data: Key[Array, "b"]


def derive_row_keys(key: Key[Array, ""], row: Int[Array, "b"]) -> RowKeys:
    """Keys that depend on the step's key and the row's index in the global batch alone."""
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 4))(row)
    return RowKeys(time=keys[:, 0], noise=keys[:, 1], drop=keys[:, 2], data=keys[:, 3])


def drop_labels(
    label: PyTree[Array],
    drop: Bool[Array, "b"],
    n_classes: int | Int[Array, ""],
    null: Any = None,
) -> PyTree[Array]:
    """Replace the label by the null label in the rows to drop: class `n_classes` or, without
    classes, the empty caption, which is all zeros.

    Args:
        null: one row of labels in its place, such as the encoded "" of SD3.
    """
    if null is None:
        null = jax.tree.map(lambda _: n_classes, label)

    def drop_rows(x: Array, null: Any) -> Array:
        return jnp.where(drop.reshape(-1, *[1] * (x.ndim - 1)), jnp.asarray(null, x.dtype), x)

    return jax.tree.map(drop_rows, label, null)


class LossInputs(NamedTuple):
    """Inputs of a loss, except for the times. `keys.time` is left for these."""

    keys: RowKeys
    data: Float[Array, "b h w c"]
    noise: Float[Array, "b h w c"]
    label: PyTree[Array]


def sample_loss_inputs(
    batch: Any,
    key: Key[Array, ""],
    *,
    n_classes: int | Int[Array, ""],
    label_dropout: float,
    to_input: ToModelInput = pixels_to_input,
    null: Any = None,
) -> LossInputs:
    """Convert a batch's images to data, sample noise of the same shape, and drop some labels."""
    keys, data, noise = sample_data_and_noise(batch, key, to_input)
    drop = jax.vmap(lambda key: jax.random.bernoulli(key, label_dropout))(keys.drop)
    return LossInputs(keys, data, noise, drop_labels(batch.label, drop, n_classes, null))


def sample_data_and_noise(
    batch: Any, key: Key[Array, ""], to_input: ToModelInput = pixels_to_input
) -> tuple[RowKeys, Float[Array, "b *s"], Float[Array, "b *s"]]:
    """Convert a batch's images to data, and sample noise of the same shape. Returns the keys of the
    rows too: `keys.time` and `keys.drop` are left.
    """
    keys = derive_row_keys(key, batch.row)
    data = to_input(batch.image, keys.data)
    noise = jax.vmap(lambda key: jax.random.normal(key, data.shape[1:]))(keys.noise)
    return keys, data, noise


def loss_by_time(t: Float[Array, "b"], error: Float[Array, "b"]) -> Metrics:
    """The loss in ten equal bins of t, as two means that can be averaged over devices and steps
    before they are divided.

    `binned_loss / bin_share` is the mean loss of a bin.
    """
    bins = jnp.minimum((t * N_TIME_BINS).astype(jnp.int32), N_TIME_BINS - 1)
    one_hot = jax.nn.one_hot(bins, N_TIME_BINS)
    return {"binned_loss": (one_hot * error[:, None]).mean(0), "bin_share": one_hot.mean(0)}
