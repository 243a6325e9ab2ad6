"""Sample images from a model's weights: labels and noise in, images out.

    sampler = SamplerConfig(n_steps=50)
    sample_images(params, config, [3, 7], sampler=sampler, mesh=parallel.make_mesh())

A batch is one compiled program. Where weights come from and where images go is not known here: see
`trained_model.py` and `sample_files.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from data.batch import EncodedCaption
from inference.guidance import unguidable_error
from methods.method import Method, TimeSteps
from methods.rectified_flow import RectifiedFlow
from methods.registry import METHODS
from model import Label, ModelConfig, model_graphdef
from networks.routing import check_share, choose_tokens
from runtime import parallel
from runtime.errors import UserError, unknown_name
from runtime.flags import check_interval
from sampling import (
    ALWAYS,
    Solution,
    Velocity,
    extrapolate,
    extrapolate_pair,
    guided,
    initial_noise,
    step_noise,
)

Labels = Sequence[int] | Int[np.ndarray, "n"] | EncodedCaption
MAX_SEED = 2**31 - 1
ROUTE_RATES = (0.0, 0.5)
# Folded into a seed's key for the choice of tokens.
# 2**32 − 1 is for the noise of steps, 2**32 − 2 for random labels.
ROUTE_TAG = 2**32 - 3
ToImages = Callable[[Float[np.ndarray, "*b h w c"]], Float[np.ndarray, "*b H W C"]]


@dataclass(frozen=True)
class SamplerConfig:
    """Settings of a sampler; hashable and static under `jax.jit`: each combination compiles once.

    Args:
        solver: one of the method's.
        n_steps: solver steps.
        method: how the model was trained, which says what its output means.
        shift: shift of the time grid; above 1 spends more steps near the noise.
        interval: guidance interval: the two times between which guidance acts.
        inner_interval: the same of inner guidance.
        route_rates: of guidance by the route, the shares of tokens that go around it in the strong
            and in the weak prediction.
        eta: fresh noise of ddim, from 0 (none) to 1 (as much as ddpm).
        guided_channels: guide only the first so many channels; by default all.
        clip: the data lie in −1 … 1, as pixels do.

    Raises:
        UserError: an unknown solver, or a number out of range.
    """

    solver: str = "euler"
    n_steps: int = 50
    method: Method = RectifiedFlow()  # noqa: RUF009  (immutable)
    shift: float = 1.0
    interval: tuple[float, ...] = ALWAYS
    inner_interval: tuple[float, ...] = ALWAYS
    route_rates: tuple[float, ...] = ROUTE_RATES
    eta: float = 0.0
    guided_channels: int | None = None
    clip: bool = False

    def __post_init__(self):
        known = [name for method in (*METHODS.values(), self.method) for name in method.solvers]
        if self.solver not in known:
            raise unknown_name("solver", self.solver, dict.fromkeys(known))
        self.method.check_sampler(
            solver=self.solver, n_steps=self.n_steps, shift=self.shift, eta=self.eta
        )
        for name in ("interval", "inner_interval"):
            check_interval(name, getattr(self, name))
        if len(self.route_rates) != 2 or not self.route_rates[0] < self.route_rates[1]:
            raise UserError(
                f"--route_rates {' '.join(f'{rate:g}' for rate in self.route_rates)}: takes two "
                "shares of tokens, the smaller first, such as 0 0.5"
            )

    def time_steps(self, start: float = 1.0) -> TimeSteps:
        """Discretize time from `start` to the data."""
        return self.method.time_steps(
            self.n_steps, solver=self.solver, shift=self.shift, start=start
        )

    def state_times(self, start: float = 1.0) -> Float[np.ndarray, "times"]:
        """The time of each state of a trajectory, from `start` or a step near it to the data."""
        return self.method.state_times(self.time_steps(start))


class StartFrom(NamedTuple):
    """Data to start sampling from in place of pure noise.

    Args:
        data: images or scaled latents, as the model sees them. Noise is added to them.
        time_steps: `SamplerConfig.time_steps(t)`; its first time says how much noise.
    """

    data: Float[Any, "b h w c"]
    time_steps: Any


class WeakModel(NamedTuple):
    """The weights and the network of a model that another is guided by."""

    params: Any
    config: ModelConfig


@partial(jax.jit, static_argnames=("config", "sampler", "guide", "trajectory", "weak_config"))
def sample_batch(
    params: Any,
    label: Label,
    index: Int[Array, "b"],
    seed: Int[Array, "..."],
    cfg_scale: Float[Array, ""],
    negative: Label | None = None,
    start_from: StartFrom | None = None,
    weak_params: Any = None,
    weak_scale: Float[Array, ""] | float = 1.0,
    inner_guidance: Float[Array, ""] | float | None = None,
    route_guidance: Float[Array, ""] | float | None = None,
    *,
    config: ModelConfig,
    sampler: SamplerConfig,
    guide: bool,
    trajectory: bool,
    weak_config: ModelConfig | None = None,
) -> Solution:
    """Sample one batch from noise, as one compiled program.

    Args:
        index: of each sample: its noise is a function of seed and index.
        negative: labels in place of the null label of classifier-free guidance.
        guide: use guidance at `cfg_scale`; False runs the conditional model alone.
        trajectory: return all states and x0 predictions too.
        weak_params, weak_scale, weak_config: a weak model to guide by, at this scale.
        inner_guidance: scale of guidance by the inner head; None runs without that head.
        route_guidance: scale of guidance by the route; None computes all tokens.
    """
    model = nnx.merge(model_graphdef(config), params)
    # A learned variance is not guided.
    has_variance = config.out_channels > config.channels
    all_channels = config.channels if has_variance else None
    channels = sampler.guided_channels or all_channels

    predict = _predict
    if inner_guidance is not None:
        predict = partial(
            _predict_by_inner_head,
            scale=inner_guidance,
            interval=sampler.inner_interval,
            channels=all_channels,
        )
    elif route_guidance is not None:
        predict = partial(
            _predict_by_route,
            keys_at=partial(route_keys, seed, index),
            rates=sampler.route_rates,
            scale=route_guidance,
            channels=all_channels,
        )
    predict = partial(predict, model)
    if guide:
        null = jax.tree.map(lambda x: jnp.full_like(x, config.n_classes), label)
        predict_guided = guided(
            predict,
            label,
            null if negative is None else negative,
            cfg_scale,
            interval=sampler.interval,
            channels=channels,
            one_call=parallel.devices().platform != "cpu",
        )
    else:
        predict_guided = partial(predict, label=label)
    if weak_config:
        weak_model = nnx.merge(model_graphdef(weak_config), weak_params)
        predict_guided = extrapolate(
            partial(_predict, weak_model, label=label),
            predict_guided,
            weak_scale,
            interval=sampler.interval,
            channels=channels,
        )
    return integrate_from_noise(
        predict_guided,
        index,
        seed,
        config.image_shape,
        start_from,
        sampler=sampler,
        trajectory=trajectory,
    )


def _predict(model: Any, x: Array, t: Any, label: Any, span: Any = None) -> Array:
    """Predict by the model alone; `span` is that of a step of MeanFlow."""
    options = {} if span is None else {"span": jnp.full(x.shape[0], span)}
    return model(x, jnp.full(x.shape[0], t), label, **options)


def _predict_by_inner_head(
    model: Any, x: Array, t: Any, label: Any, *, scale: Any, interval: Any, channels: int | None
) -> Array:
    """Predict by both heads of the model, the inner one as the weaker."""

    def both(x: Array, t: Any) -> tuple[Array, Array]:
        final, inner = model(x, jnp.full(x.shape[0], t), label, inner=True)
        return inner, final

    return extrapolate_pair(both, scale, interval=interval, channels=channels)(x, t)


def _predict_by_route(
    model: Any,
    x: Array,
    t: Any,
    label: Any,
    *,
    keys_at: Callable[[Any], Key[Array, "b"]],
    rates: tuple[float, ...],
    scale: Any,
    channels: int | None,
) -> Array:
    """Predict with two shares of tokens that go around the route, the larger as the weaker."""
    keys = keys_at(t)
    keys = jnp.tile(keys, x.shape[0] // len(keys))  # guidance may double the batch

    def at_rate(rate: float) -> Array:
        token_ids = choose_tokens(keys, model.config.grid, rate) if rate else None
        return model(x, jnp.full(x.shape[0], t), label, token_ids=token_ids)

    def both(x: Array, t: Any) -> tuple[Array, Array]:
        strong, weak = map(at_rate, rates)
        return weak, strong

    return extrapolate_pair(both, scale, channels=channels)(x, t)


def route_keys(
    seed: Int[Array, "..."], index: Int[Array, "b"], t: Float[Array, ""]
) -> Key[Array, "b"]:
    """Derive the key of each image's choice of tokens at a time, from its seed, its index and t."""

    def key_of(seed: Any, index: Any) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), ROUTE_TAG)
        bits = jax.lax.bitcast_convert_type(jnp.float32(t), jnp.uint32)
        return jax.random.fold_in(jax.random.fold_in(key, index), bits)

    return jax.vmap(key_of)(jnp.broadcast_to(seed, index.shape), index)


def integrate_from_noise(
    predict: Velocity,
    index: Int[Array, "b"],
    seed: Int[Array, "..."] | int,
    shape: tuple[int, int, int],
    start_from: StartFrom | None = None,
    *,
    sampler: SamplerConfig,
    trajectory: bool,
) -> Solution:
    """Integrate from noise to images. `predict(x, t)` returns the network's output."""
    scale, fresh_noise = sampler.method.noise_scale, step_noise(seed, index, shape)
    x = scale * initial_noise(seed, index, shape)
    time_steps = start_from.time_steps if start_from else sampler.time_steps()
    if start_from:
        x = sampler.method.add_noise(start_from.data, x, time_steps)
    return sampler.method.solve(
        predict,
        x,
        time_steps,
        lambda step: scale * fresh_noise(step),
        solver=sampler.solver,
        eta=sampler.eta,
        clip=sampler.clip,
        trajectory=trajectory,
    )


class Samples(NamedTuple):
    """A `Solution` on the host, float32: images in about −1 … 1, or latents as the model sees them.

    Args:
        x: the samples.
        trajectory: all states, noise first and `x` last.
        estimates: the x0 prediction of each step.
    """

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
    first_index: int = 0,
    negative: Labels | None = None,
    weak: WeakModel | None = None,
    weak_scale: float = 1.0,
    inner_guidance: float = 1.0,
    route_guidance: float = 1.0,
    start_from: StartFrom | None = None,
    batch_size: int = 256,
    trajectory: bool = False,
    estimates: bool = False,
    to_images: Callable[[Float[np.ndarray, "*b h w c"]], Float[np.ndarray, "*b H W C"]]
    | None = None,
) -> Samples:
    """Sample an image for each label: class ids, or encoded captions.

    A sample is a function of the weights, its label, its seed and its index, and of nothing else:
    neither `batch_size` nor the number of devices changes it. Label `config.n_classes` is the null
    label. `cfg_scale` 1 runs the conditional model alone, in half the time.

    Args:
        seed: one for all samples, which are then numbered from `first_index`; or one for each,
            whose index is then 0.
        negative: one label in place of the null label of guidance.
        weak: a weak model to guide by, at `weak_scale`; see `sampling.extrapolate`.
        inner_guidance: scale of guidance by the model's inner head, which acts first, on each
            label's prediction.
        route_guidance: scale of guidance by the model's route, in place of the inner head.
        start_from: data to add noise to and start from, as the model sees them, a row per label.
        batch_size: samples at a time, on all devices together.
        trajectory: return all states too.
        estimates: return the x0 prediction of each step too.
        to_images: converts the model's output; by default it is returned as it is.

    Raises:
        UserError: there are no labels, a seed is out of range, or guidance does not fit the model.
    """
    labels = labels_as_arrays(labels)
    n = len(jax.tree.leaves(labels)[0])
    if n == 0:
        raise UserError("there are no labels to sample")
    check_guidance(
        sampler, config, cfg_scale, negative=negative is not None, has_guide=weak is not None
    )
    check_inner_guidance(sampler, config, inner_guidance)
    check_route_guidance(sampler, config, route_guidance, inner_guidance=inner_guidance)
    # Devices get equal shares of a batch.
    size = -(-min(batch_size, n) // mesh.size) * mesh.size
    index, seeds = noise_indices_and_seeds(seed, n, first_index)
    data = start_from.data if start_from else None
    negative_batch = None
    if negative is not None:
        repeated = take_rows(labels_as_arrays(negative), np.zeros(size, int))
        negative_batch = parallel.shard_rows(repeated, mesh)

    def sample_rows_from(start: int) -> Solution:
        # The last batch is filled up with the last row.
        rows = np.minimum(np.arange(start, start + size), n - 1)
        batch = take_rows((labels, index, seeds, data), rows)
        batch_labels, batch_index, batch_seeds, batch_data = parallel.shard_rows(batch, mesh)
        solution = sample_batch(
            params,
            batch_labels,
            batch_index,
            batch_seeds,
            cfg_scale,
            negative_batch,
            StartFrom(batch_data, start_from.time_steps) if start_from else None,
            weak.params if weak else None,
            weak_scale,
            None if inner_guidance == 1 else inner_guidance,
            None if route_guidance == 1 else route_guidance,
            config=for_sampling(config),
            weak_config=for_sampling(weak.config) if weak else None,
            sampler=sampler,
            guide=cfg_scale != 1,
            trajectory=trajectory or estimates,
        )
        return parallel.fetch_to_host(solution)

    batches = [sample_rows_from(start) for start in range(0, n, size)]
    convert = to_images or (lambda x: x)
    return Samples(
        x=convert(join_batches(batches, "x", n)),
        trajectory=convert(join_batches(batches, "trajectory", n)) if trajectory else None,
        estimates=convert(join_batches(batches, "estimates", n)) if estimates else None,
    )


def for_sampling(config: ModelConfig) -> ModelConfig:
    """Return a network's config without what serves training. In eight bits, the largest number of
    a batch would touch all of its samples.
    """
    return replace(config, fp8=False, remat=False, unroll=1)


def join_batches(
    batches: Sequence[Solution], field: Literal["x", "trajectory", "estimates"], n: int
) -> Float[np.ndarray, "..."]:
    """Join one field of the batches of n samples, without the rows that filled the last one up."""
    axis = 0 if field == "x" else 1
    return np.take(np.concatenate([getattr(b, field) for b in batches], axis), range(n), axis)


def check_seeds(seed: int | Sequence[int]) -> None:
    """Raises UserError if a seed is out of range."""
    seeds = seed if isinstance(seed, Sequence) else [seed]
    if invalid := [s for s in seeds if not 0 <= s <= MAX_SEED]:
        raise UserError(f"seed {invalid[0]}: must be in 0 … {MAX_SEED}")


def noise_indices_and_seeds(
    seed: int | Sequence[int], n: int, first_index: int = 0
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """The index and the seed of each of n samples, of which its noise is a function.

    Raises:
        UserError: a seed is out of range.
    """
    check_seeds(seed)
    if isinstance(seed, Sequence):
        return np.zeros(n, np.int32), np.asarray(seed, np.int32)
    return np.arange(first_index, first_index + n).astype(np.int32), np.full(n, seed, np.int32)


def check_guidance(
    sampler: SamplerConfig,
    config: ModelConfig,
    cfg_scale: float,
    *,
    negative: bool = False,
    has_guide: bool = False,
) -> None:
    """Raises UserError if the model cannot be guided so, or if a flag of guidance has no effect.

    Args:
        negative: a negative prompt is given.
        has_guide: a weak model guides too.
    """
    if not abs(cfg_scale) <= float(np.finfo(np.float32).max):
        raise UserError(f"cfg_scale {cfg_scale}: must be finite in float32")
    guide = cfg_scale != 1
    if (guide or has_guide) and not sampler.method.is_guidable:
        given = f"cfg_scale {cfg_scale:g}" if guide else "--guide"
        raise unguidable_error(sampler.method.title, given)
    if guide and not config.is_conditional:
        raise UserError(
            f"cfg_scale {cfg_scale}: an unconditional model cannot be guided; leave it at 1"
        )
    n_guided = sampler.guided_channels
    if n_guided is not None and not (guide or has_guide):
        raise UserError(
            f"--guided_channels {n_guided}: has no effect without guidance (cfg_scale 1)"
        )
    if n_guided is not None and not 1 <= n_guided <= config.channels:
        raise UserError(f"--guided_channels {n_guided}: the model has {config.channels} channels")
    if not (guide or has_guide) and sampler.interval != ALWAYS:
        raise UserError("--interval: has no effect without guidance (cfg_scale 1)")
    if not guide and negative:
        raise UserError("--negative_prompt: has no effect without guidance (cfg_scale 1)")


def check_inner_guidance(sampler: SamplerConfig, config: ModelConfig, scale: float) -> None:
    """Raises UserError if the model has no inner head to be guided by, or if its interval has no
    effect.
    """
    if not abs(scale) <= float(np.finfo(np.float32).max):
        raise UserError(f"--inner_guidance {scale}: must be finite in float32")
    if scale != 1 and not sampler.method.is_guidable:
        raise unguidable_error(sampler.method.title, f"--inner_guidance {scale:g}")
    if scale != 1 and not config.inner_head:
        raise UserError(
            f"--inner_guidance {scale:g}: the model has no inner head; train one by --inner_head"
        )
    if scale == 1 and sampler.inner_interval != ALWAYS:
        raise UserError("--inner_interval: has no effect without --inner_guidance")


def check_route_guidance(
    sampler: SamplerConfig, config: ModelConfig, scale: float, *, inner_guidance: float = 1.0
) -> None:
    """Raises UserError if the model has no route to be guided by, or if its rates do not fit its
    grid or have no effect.
    """
    if not abs(scale) <= float(np.finfo(np.float32).max):
        raise UserError(f"--route_guidance {scale}: must be finite in float32")
    if scale == 1:
        if sampler.route_rates != ROUTE_RATES:
            raise UserError("--route_rates: has no effect without --route_guidance")
        return
    if not sampler.method.is_guidable:
        raise unguidable_error(sampler.method.title, f"--route_guidance {scale:g}")
    if not config.route:
        raise UserError(f"--route_guidance {scale:g}: the model has no route; train one by --route")
    if inner_guidance != 1:
        raise UserError(
            f"--route_guidance {scale:g} and --inner_guidance {inner_guidance:g}: choose one"
        )
    for rate in sampler.route_rates:
        check_share("--route_rates", rate, config.grid)


# --- labels ---------------------------------------------------------------------------------------


def take_rows(tree: Any, rows: Int[np.ndarray, "b"]) -> Any:
    """Index all arrays of a tree by rows."""
    return jax.tree.map(lambda x: x[rows], tree)


def labels_as_arrays(labels: Labels) -> Int[np.ndarray, "n"] | EncodedCaption:
    """Labels as arrays that can be indexed by rows."""
    return labels if isinstance(labels, EncodedCaption) else np.asarray(labels, np.int32)
