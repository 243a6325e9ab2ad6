"""How pictures are drawn from a model's weights: labels and noise in, pictures out.

    drawing.sample(params, config, [3, 7], sampler=Sampler(n_steps=50), mesh=parallel.make_mesh())

Where weights come from and where pictures go is known elsewhere (`drawable.py`, `drawn.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from data.batch import Caption
from inference.codec import Codec
from methods import ddpm, rectified_flow
from methods.ddpm import DESCENTS, Chain
from model import Label, ModelConfig, graphdef
from runtime import parallel
from runtime.errors import UserError, unknown
from sampling import SOLVERS, Solution, Velocity, guided, initial_noise, step_noise, time_grid

Labels = Sequence[int] | Int[np.ndarray, "n"] | Caption
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class SamplerConfig:
    """How pictures are drawn from a model; static, so each combination is compiled once.

    Args:
        solver: euler or heun; ddpm or ddim for a model that is trained by DDPM.
        n_steps: steps of the solver.
        shift: of the time grid; above 1 spends more steps near the noise.
        interval: times between which guidance acts.
        prediction: of `diffusion.PREDICTIONS`; None for a velocity.
        eta: of ddim: how much fresh noise, from 0 to 1.
        guided_channels: how many of a picture's channels are guided; by default all.
        clip: what ddpm and ddim take the data for, to where pictures are.
    """

    solver: str = "euler"
    n_steps: int = 50
    shift: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    prediction: str | None = None
    eta: float = 0.0
    guided_channels: int | None = None
    clip: bool = False

    def __post_init__(self):
        fitting = DESCENTS if self.prediction else SOLVERS
        if self.solver not in SOLVERS | DESCENTS:
            raise unknown("solver", self.solver, SOLVERS | DESCENTS)
        if self.prediction not in (None, *ddpm.PREDICTIONS):
            raise unknown("prediction", self.prediction, ddpm.PREDICTIONS)
        if self.solver not in fitting:
            trained = "DDPM" if self.prediction else "rectified flow"
            raise UserError(
                f"--solver {self.solver} is not for a model trained by {trained}, which takes one "
                f"of: {', '.join(fitting)}"
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.n_steps < 1:
            raise UserError(
                f"the number of sampling steps is {self.n_steps}; it must be at least 1"
            )
        if self.prediction and self.n_steps > ddpm.N_STEPS:
            raise UserError(
                f"the number of sampling steps is {self.n_steps}; DDPM has {ddpm.N_STEPS}"
            )
        if self.prediction and self.shift != 1:
            raise UserError(
                f"--shift {self.shift:g} is for rectified flow; the steps of DDPM are even"
            )
        if not 0 < self.shift < math.inf:
            raise UserError(f"--shift {self.shift:g}: must be above 0")
        if self.eta and self.solver != "ddim":
            raise UserError(f"--eta {self.eta} is for --solver ddim")
        if not 0 <= self.eta <= 1:
            raise UserError(f"--eta {self.eta}: must be between 0 and 1")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise UserError(
                f"--interval {low:g} {high:g}: must be two times in 0 … 1, the earlier first"
            )

    def route(self, t: float = 1.0) -> Float[Array, "times"] | Chain:
        """The way of x from time t, or from the step of a chain that is nearest to it, to the data:
        times of a flow, or a chain.
        """
        if self.prediction is None:
            return time_grid(self.n_steps, shift=self.shift, start=t)
        return ddpm.up_to(ddpm.chain(self.n_steps), t)

    def times(self) -> Float[np.ndarray, "times"]:
        """The time of each state on the way from pure noise to the data."""
        route = self.route()
        if isinstance(route, Chain):
            return np.append(route.step[::-1] / ddpm.N_STEPS, 0.0)
        return np.asarray(route)

    def begins_at(self, t: float) -> float:
        """The time at which `route` begins."""
        if self.prediction is None:
            return t
        return float(ddpm.up_to(ddpm.chain(self.n_steps), t).step[-1]) / ddpm.N_STEPS


class StartFrom(NamedTuple):
    """Where drawing begins, if not with pure noise: with data that noise is added to, at the start
    of a `Sampler.route`.
    """

    data: Float[Any, "b h w c"]
    route: Any


@partial(jax.jit, static_argnames=("config", "sampler", "guide", "trajectory"))
def sample_batch(
    params: Any,
    label: Label,
    index: Int[Array, "b"],
    seed: Int[Array, "..."],
    cfg_scale: Float[Array, ""],
    negative: Label | None = None,
    begin: StartFrom | None = None,
    *,
    config: ModelConfig,
    sampler: SamplerConfig,
    guide: bool,
    trajectory: bool,
) -> Solution:
    """One batch, from noise to pictures, as one compiled program. `negative` takes the place of the
    null label.
    """
    model = nnx.merge(graphdef(config), params)

    def predict(x, t, label):
        return model(x, jnp.full(x.shape[0], t), label)

    if guide:
        null = jax.tree.map(lambda x: jnp.full_like(x, config.n_classes), label)
        # A variance is not guided.
        more = config.channels if config.out_channels > config.channels else None
        how = {"interval": sampler.interval, "channels": sampler.guided_channels or more}
        how["together"] = jax.default_backend() != "cpu"
        bound = guided(predict, label, null if negative is None else negative, cfg_scale, **how)
    else:
        bound = partial(predict, label=label)
    shape = (config.image_size, config.image_size, config.channels)
    return solve(bound, index, seed, shape, begin, sampler=sampler, trajectory=trajectory)


def solve(
    predict: Velocity,
    index: Int[Array, "b"],
    seed: Int[Array, "..."] | int,
    shape: tuple[int, int, int],
    begin: StartFrom | None = None,
    *,
    sampler: SamplerConfig,
    trajectory: bool,
) -> Solution:
    """From noise to pictures by `predict(x, t)`: a velocity, or what else the sampler says."""
    x, route = initial_noise(seed, index, shape), begin.route if begin else sampler.route()
    if sampler.prediction is None:
        if begin:
            x, _ = rectified_flow.interpolate(begin.data, x, jnp.full(len(x), route[0]))
        return SOLVERS[sampler.solver](predict, x, route, trajectory=trajectory)

    def read(x, at):
        how = {"prediction": sampler.prediction, "clip": sampler.clip}
        return ddpm.estimate(predict(x, ddpm.model_time(at.step)), x, at, **how)

    if begin:
        x = ddpm.diffuse(begin.data, x, jax.tree.map(lambda table: table[-1], route))
    renew = step_noise(seed, index, shape)
    how = {"trajectory": trajectory} | ({"eta": sampler.eta} if sampler.eta else {})
    return DESCENTS[sampler.solver](read, x, route, renew, **how)


class Samples(NamedTuple):
    """A `Solution` on the host: float32 in about −1 … 1."""

    x: Float[np.ndarray, "b h w c"]
    trajectory: Float[np.ndarray, "n+1 b h w c"] | None
    estimates: Float[np.ndarray, "n b h w c"] | None


def sample_images(
    params: Any,
    config: ModelConfig,
    labels: Labels,
    *,
    sampler: SamplerConfig,
    mesh: parallel.Mesh,
    cfg_scale: float = 1.0,
    seed: int | Sequence[int] = 0,
    first: int = 0,
    negative: Labels | None = None,
    begin: StartFrom | None = None,
    batch_size: int = 256,
    trajectory: bool = False,
    estimates: bool = False,
    codec: Codec | None = None,
) -> Samples:
    """Pictures of `labels`: ids of classes, or encoded captions; of a model of latents, as its
    `codec` decodes them.

    A picture is a function of the weights, its label, its seed and its place: that in `labels`,
    counted from `first`, or 0 where each has a seed of its own. Neither `batch_size` nor the number
    of devices changes it. Label `config.n_classes` is "no class"; `cfg_scale` 1 samples the
    conditional model in half the time.

    Args:
        negative: the label of one picture, from which guidance leads away; by default the null.
        begin: data to add noise to, as the model sees them, and the way from there.
        trajectory: whether all states are wanted too.
        estimates: whether that is what each step takes the picture for.

    Raises:
        UserError: no labels, or numbers that cannot be.
    """
    labels = as_arrays(labels)
    if not (n := len(jax.tree.leaves(labels)[0])):
        raise UserError("no labels to draw")
    check_guidance(sampler, config, cfg_scale, negative=negative is not None)
    size = -(-min(batch_size, n) // mesh.size) * mesh.size
    each = labels, *noise_origins(seed, n, first), begin and begin.data
    away = None
    if negative is not None:
        away = parallel.spread(take_rows(as_arrays(negative), np.zeros(size, int)), mesh)
    static = {"config": replace(config, remat=False, unroll=1), "sampler": sampler}
    static |= {"guide": cfg_scale != 1, "trajectory": trajectory or estimates}

    def part(start: int) -> Solution:
        # The last batch is filled up with its last picture.
        rows = np.minimum(np.arange(start, start + size), n - 1)
        label, place, seeds, data = parallel.spread(take_rows(each, rows), mesh)
        x = begin and StartFrom(data, begin.route)
        return parallel.fetch(
            sample_batch(params, label, place, seeds, cfg_scale, away, x, **static)
        )

    parts = [part(start) for start in range(0, n, size)]

    def whole(field: str, axis: int) -> Float[np.ndarray, "..."]:
        x = np.concatenate([getattr(part, field) for part in parts], axis=axis)
        x = np.take(x, range(n), axis=axis)
        return codec.decode(x) if codec else x

    return Samples(
        whole("x", 0),
        whole("trajectory", 1) if trajectory else None,
        whole("estimates", 1) if estimates else None,
    )


def noise_origins(
    seed: int | Sequence[int], n: int, first: int = 0
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """The place and the seed of each of n pictures, which its noise is a function of.

    Raises:
        UserError: a seed that cannot be.
    """
    one = not isinstance(seed, Sequence)
    seeds = [seed] * n if one else list(seed)
    if wrong := [s for s in seeds if not 0 <= s <= MAX_SEED]:
        raise UserError(f"seed {wrong[0]}: must be in 0 … {MAX_SEED}")
    places = np.arange(first, first + n) if one else np.zeros(n)
    return places.astype(np.int32), np.asarray(seeds, np.int32)


def check_guidance(
    sampler: SamplerConfig, config: ModelConfig, cfg_scale: float, *, negative: bool = False
) -> None:
    """Raises UserError if a model cannot be guided so, or need not be told how."""
    if not abs(cfg_scale) <= float(np.finfo(np.float32).max):
        raise UserError(f"cfg_scale {cfg_scale}: must be finite in float32")
    guide, n = cfg_scale != 1, sampler.guided_channels
    if guide and not (config.n_classes or config.text_width):
        raise UserError(
            f"cfg_scale {cfg_scale}: an unconditional model has no label to be guided by; "
            "leave it at 1"
        )
    if n is not None and not guide:
        raise UserError(f"--guided_channels {n}: without guidance (cfg_scale 1) none is guided")
    if n is not None and not 1 <= n <= config.channels:
        raise UserError(f"--guided_channels {n}: the model's pictures have {config.channels}")
    if not guide and sampler.interval != (0, 1):
        raise UserError("--interval: without guidance (cfg_scale 1) there is none to limit")
    if not guide and negative:
        raise UserError("--negative_prompt: without guidance (cfg_scale 1) nothing leads away")


# --- labels ---------------------------------------------------------------------------------------


def take_rows(tree: Any, rows: Int[np.ndarray, "b"]) -> Any:
    """These rows of all arrays."""
    return jax.tree.map(lambda x: x[rows], tree)


def as_arrays(labels: Labels) -> Int[np.ndarray, "n"] | Caption:
    """Labels that can be taken by rows."""
    return labels if isinstance(labels, Caption) else np.asarray(labels, np.int32)
