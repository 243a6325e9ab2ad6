"""Starting a run from existing weights: those of another run, or of a published model.

`load_starting_weights` loads them, `with_source_flags` takes the model's flags from them, and
`fit_weights` fits them to the model to train. The classes, the image size and the patches may
differ, which is reported; everything else must match. Resuming a run is not done here.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from datasets_config import DATASET_CONFIGS, DatasetConfig
from inference.guidance import null_is_trained
from inference.spaces import compare_spaces, space_of
from inference.trained_model import TrainedModel
from methods.registry import DEFAULT_METHOD, find_method, method_of
from model import ModelConfig
from pretrained import transformer
from runtime import parallel, processes
from runtime.errors import UserError
from runtime.run_folder import find_run
from training.config import TrainConfig

# Flags of the model that default to the source's value.
MODEL_FLAGS = ("block", "position", "rope", "qk_norm", "mlp", "norm", "bottleneck")
# Fields of a ModelConfig that no flag sets; always the source's.
FIELDS_WITHOUT_FLAG = (
    *("n_class_tokens", "mlp_ratio"),
    *("caption_norm", "n_dual", "position_side", "position_base", "time_endpoint"),
)
# Fields of a ModelConfig that must match the source's; of the text encoders, their widths.
MUST_MATCH = ("width", "depth", "n_heads", *MODEL_FLAGS, "text_width", "pooled_width")
FreshPart = Callable[[str], dict[str, Any]]  # name of a part of the model → its fresh weights
PartsAndNotices = tuple[dict[str, Any], list[str]]  # changed parts of the weights, lines to print


@dataclass(frozen=True)
class StartingWeights:
    """Weights that a run starts from, and the settings of the model they come from.

    Args:
        params: whole, in host memory.
        name: for messages.
        reference: where they are: `RUN@STEP`, or a published model.
    """

    config: ModelConfig
    params: dict[str, Any] = field(repr=False)
    settings: Mapping[str, Any]
    name: str
    reference: str

    @property
    def label_names(self) -> Sequence[str]:
        return self.settings["dataset"].get("label_names") or ()


def load_starting_weights(path_or_id: str) -> StartingWeights:
    """Load the averaged weights of a run, of `RUN@STEP`, or a published model.

    Raises:
        UserError: neither is found, or the weights are not finite.
    """
    weights = _load_weights(path_or_id)
    if not parallel.is_finite(weights.params):
        raise UserError(
            f"--init_from {path_or_id}: the weights of {weights.name} hold NaN or infinity",
            how="pass another checkpoint",
        )
    return weights


def _load_weights(path_or_id: str) -> StartingWeights:
    try:
        run_and_step = find_run(path_or_id, "--init_from")
    except UserError as error:
        raise UserError(f"--init_from {path_or_id}: {error}") from None
    if run_and_step is None:
        with processes.first_then_others():
            published = transformer.load_transformer(path_or_id)
        return StartingWeights(
            published.config, published.params, published.settings, published.id, path_or_id
        )
    folder, step = run_and_step
    # Sharded over all devices while loading: the whole is in host memory only.
    run = TrainedModel.from_run(folder, step=step, fsdp=parallel.devices().count)
    return StartingWeights(
        run.model,
        parallel.fetch_to_host(run.params),
        run.settings,
        f"step {run.step} of {folder}",
        f"{folder.resolve()}@{run.step}",
    )


def with_source_flags(config: TrainConfig, source: StartingWeights) -> TrainConfig:
    """Fill in the flags of the model and of the objective from the source; given flags win.

    Raises:
        UserError: no preset has the source's shape.
    """
    s = source.config
    given = {name: value for name, value in vars(config).items() if value is not None}
    preset = transformer.find_preset(s)
    if preset is None:
        raise UserError(
            f"--init_from {source.name}: no preset has width {s.width}, depth {s.depth} and "
            f"{s.n_heads} heads; add one to MODELS in model.py"
        )
    objective = source.settings.get("objective") or DEFAULT_METHOD
    is_guidable = find_method(given.get("objective", objective)).is_guidable
    inherited: dict[str, Any] = {"model": preset}
    if "model" not in given:
        inherited["patch_size"] = s.patch_size
    if _size_of_preset(given.get("model", preset)) == _size_of_preset(preset):
        inherited |= {flag: getattr(s, flag) for flag in (*MODEL_FLAGS, "time_scale")}
        inherited["inner_head"] = s.inner_head if is_guidable else 0
    if given.get("objective", objective) == objective:
        method = method_of(source.settings)
        inherited["objective"] = objective
        inherited |= {flag: getattr(method, flag) for flag in method.output_flags}
        if source.settings.get("full_width"):  # SD3, whose times of training are shifted as well
            shift = source.settings["sample_shift"]
            time_shift = source.settings.get("time_shift") or shift
            inherited |= {"time_shift": time_shift, "sample_shift": shift}
    if s.text_width and _has_captions(config):
        inherited["text_towers"] = tuple(source.settings["text_towers"])
    return replace(config, **inherited | given)


def _size_of_preset(model: str) -> str:
    """Return a preset's name without the patch size, if it has one: DiT-S/2 → DiT-S."""
    return model.partition("/")[0]


def _has_captions(config: TrainConfig) -> bool:
    dataset = DATASET_CONFIGS.get(config.dataset_name)
    has_text = dataset is not None and dataset.conditioning == "text"
    configured = config.caption_column or config.caption or has_text
    return config.conditioning == "text" or (config.conditioning is None and bool(configured))


def keep_fields_without_flag(config: ModelConfig, record: Mapping[str, Any]) -> ModelConfig:
    """Take the fields that no flag sets from the record of another ModelConfig."""
    return replace(config, **{name: record[name] for name in FIELDS_WITHOUT_FLAG if name in record})


# --- fitting one model's weights to another -------------------------------------------------------


def fit_weights(
    source: StartingWeights, config: ModelConfig, dataset: DatasetConfig, fresh: FreshPart
) -> tuple[dict[str, Any], list[str]]:
    """Fit the source's weights to a model with `config`.

    Returns the weights, and lines that tell a person what was changed, and whether the source was
    trained on other latents.

    Raises:
        UserError: a field that must match does not.
    """
    for name in MUST_MATCH:
        theirs, ours = getattr(source.config, name), getattr(config, name)
        if theirs != ours:
            raise UserError(
                f"--init_from {source.name}: its {name} is {theirs}, this run's is {ours}"
            )
    params, notices = dict(source.params), [f"starting from the weights of {source.name}"]
    if source.config.inner_head and not config.inner_head:
        del params["inner"]
        notices.append("its inner head is left out")
    if source.config.takes_span and not config.takes_span:
        del params["span"]
        notices.append("its embedding of spans is left out")
    for fit in (_fit_patches, _fit_outputs, _fit_inner_head, _fit_times, _fit_positions):
        changed, notice = fit(source, config, fresh)
        params |= changed
        notices += notice
    if not config.text_width:
        changed, notice = _fit_classes(source, config, dataset.label_names, fresh)
        params |= changed
        notices += notice
    theirs = space_of(source.settings["dataset"].get("encoding"))
    return params, notices + compare_spaces(space_of(dataset.encoding), theirs)


def _patches_differ(source: ModelConfig, config: ModelConfig) -> bool:
    return (source.patch_size, source.channels) != (config.patch_size, config.channels)


def _fit_patches(source: StartingWeights, config: ModelConfig, fresh: FreshPart) -> PartsAndNotices:
    """Replace the patch embedding if the patches differ."""
    if not _patches_differ(source.config, config):
        return {}, []
    theirs, ours = (f"{m.patch_size}×{m.patch_size}×{m.channels}" for m in (source.config, config))
    return {"patch": fresh("patch")}, [
        f"patches are {ours}, not {theirs}: the patch embedding and the output layer start fresh"
    ]


def _fit_outputs(source: StartingWeights, config: ModelConfig, fresh: FreshPart) -> PartsAndNotices:
    """Resize the output layer, which has more channels with a learned variance than without."""
    s, c, final = source.config, config, source.params["final"]
    if _patches_differ(s, c):
        return {"final": final | {"out": fresh("final")["out"]}}, []
    if s.out_channels == c.out_channels:
        return {}, []

    def resize(x: np.ndarray) -> np.ndarray:
        pixels = np.asarray(x).reshape(*x.shape[:-1], c.patch_size**2, s.out_channels)
        n_new = max(0, c.out_channels - s.out_channels)
        pixels = np.pad(pixels, [(0, 0)] * (pixels.ndim - 1) + [(0, n_new)])
        return pixels[..., : c.out_channels].reshape(*x.shape[:-1], -1)

    out = {name: resize(x) for name, x in final["out"].items()}
    change = "new ones start at zero" if c.out_channels > s.out_channels else "last are dropped"
    return {"final": final | {"out": out}}, [
        f"output channels are {c.out_channels}, not {s.out_channels}: the {change}"
    ]


def _fit_inner_head(
    source: StartingWeights, config: ModelConfig, fresh: FreshPart
) -> PartsAndNotices:
    """Start an inner head fresh unless the source has the same at the same place."""
    s, c = source.config, config
    is_same = s.inner_head == c.inner_head and s.out_channels == c.out_channels
    if not c.inner_head or (is_same and not _patches_differ(s, c)):
        return {}, []
    return {"inner": fresh("inner")}, [f"the head after block {c.inner_head} starts fresh"]


def _fit_times(source: StartingWeights, config: ModelConfig, fresh: FreshPart) -> PartsAndNotices:
    """Replace the embedding of t if its features turn at another speed, and add that of the span,
    whose zeros leave the prediction as it is.
    """
    s, c, parts, notices = source.config, config, {}, []
    is_same = s.time_scale == c.time_scale
    if not is_same:
        parts["time"] = fresh("time")
        change = f"time_scale is {c.time_scale:g}, not {s.time_scale:g}"
        notices.append(f"{change}: the embedding of t starts fresh")
    if c.takes_span and not (s.takes_span and is_same):
        parts["span"] = fresh("span")
        notices.append("the embedding of spans starts fresh, without effect")
    return parts, notices


def _fit_positions(
    source: StartingWeights, config: ModelConfig, fresh: FreshPart
) -> PartsAndNotices:
    """Resize a learned table of positions; other positions are computed and have no weights."""
    s, c = source.config, config
    if s.grid == c.grid:
        return {}, []
    grids = f"patches are {c.grid[0]}×{c.grid[1]}, not {s.grid[0]}×{s.grid[1]}"
    if c.position != "learned":
        return {}, [f"{grids}: positions are recomputed"]
    table = resize_position_table(np.asarray(source.params["position"]["table"]), s.grid, c.grid)
    return {"position": {"table": table}}, [f"{grids}: the learned positions are resized"]


def resize_position_table(
    table: Float[np.ndarray, "n d"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[np.ndarray, "m d"]:
    """Resize a table over a grid by cubic interpolation (Dosovitskiy et al. 2021, §3.2)."""
    image = jnp.asarray(table).reshape(*grid, -1)
    resized = jax.image.resize(image, (*new_grid, image.shape[-1]), "cubic")
    return np.asarray(resized.reshape(-1, image.shape[-1]))


def _fit_classes(
    source: StartingWeights, config: ModelConfig, label_names: Sequence[str], fresh: FreshPart
) -> PartsAndNotices:
    """Keep the embeddings of classes that both models have; the null label stays last. It starts
    fresh if the source was trained without label dropout.
    """
    n, m = source.config.n_classes, config.n_classes
    rows = match_classes(source.label_names, n, label_names, m)
    null_is_fresh = bool(n and m) and not null_is_trained(source.settings)
    if rows == list(range(n)) and not null_is_fresh:
        return {}, []
    rows_and_null = np.array([*rows, -1 if null_is_fresh else n])
    fresh_label = fresh("label")
    label = {
        name: np.where(
            _as_column(rows_and_null >= 0, x), np.asarray(x)[rows_and_null], fresh_label[name]
        )
        for name, x in source.params["label"].items()
    }
    notices = ["the source has no trained null label: it starts fresh"] if null_is_fresh else []
    if rows != list(range(n)):
        n_kept = sum(row >= 0 for row in rows)
        start = f"{n_kept} of {m} classes are among the source's {n}; the others start fresh"
        notices.insert(0, start)
    return {"label": label}, notices


def _as_column(x: np.ndarray, like: Any) -> np.ndarray:
    return x.reshape(-1, *[1] * (like.ndim - 1))


def match_classes(source_names: Sequence[str], n: int, names: Sequence[str], m: int) -> list[int]:
    """Return the source's class of each of this run's m classes, −1 if it has none.

    Classes match by their whole name, else by the first of its synonyms. If a side has no names,
    the classes match in order, provided that there are equally many.

    Args:
        source_names: names of the source's n classes, or empty.
        names: names of this run's m classes, or empty.
    """
    if len(source_names) != n or len(names) != m or not (n and m):
        return list(range(n)) if n == m else [-1] * m
    if _comparison_keys(source_names) == _comparison_keys(names):
        return list(range(n))
    by_name = _match_unique_names(_lower_case(source_names), _lower_case(names))
    by_synonym = _match_unique_names(_first_synonyms(source_names), _first_synonyms(names))
    return [synonym if name < 0 else name for name, synonym in zip(by_name, by_synonym)]


def _match_unique_names(source_names: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the index of each name in the source, −1 unless it is unique on both sides."""
    n_source, n_here = Counter(source_names), Counter(names)
    index = {name: i for i, name in enumerate(source_names)}
    return [index[name] if n_source[name] == n_here[name] == 1 else -1 for name in names]


def _comparison_keys(names: Sequence[str]) -> list[str]:
    """Return names in lower case and, if no other name has the same first synonym, only that."""
    whole, first = _lower_case(names), _first_synonyms(names)
    return [short if first.count(short) == 1 else long for short, long in zip(first, whole)]


def _lower_case(names: Sequence[str]) -> list[str]:
    return [str(name).lower() for name in names]


def _first_synonyms(names: Sequence[str]) -> list[str]:
    return [name.split(",")[0].strip() for name in _lower_case(names)]
