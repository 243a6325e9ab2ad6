"""A trained model to sample from: its weights, its config and all that sampling needs besides.

    trained = TrainedModel.from_run(Path("runs/digits"))
    trained.sample([3, 7], trained.plan(SamplingOverrides(cfg_scale=2))).x

Commands read a run through this class and nowhere else. It writes nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from data import caption_cache, text_encoders
from data.batch import EncodedCaption
from data.caption_cache import CaptionStore
from inference import grids, guidance
from inference.codec import Codec
from inference.conditioning import Captions, Conditioning, conditioning_of
from inference.grids import NotFiniteError
from inference.labels import RequestRows
from inference.run_weights import (
    Weights,
    check_average,
    load_merged,
    load_params,
    read_model_config,
)
from inference.sampler import (
    ROUTE_RATES,
    Labels,
    SamplerConfig,
    Samples,
    StartFrom,
    WeakModel,
    check_guidance,
    check_inner_guidance,
    check_route_guidance,
    sample_images,
)
from inference.spaces import Space, space_of
from methods.method import Method
from methods.rectified_flow import RectifiedFlow
from methods.registry import method_of
from model import ModelConfig
from pretrained import transformer
from pretrained.lora import with_adapter
from runtime import parallel, processes
from runtime.errors import UserError
from runtime.image_size import ImageSize, WrittenSize
from runtime.run_folder import read_config
from sampling import ALWAYS


@dataclass(frozen=True)
class SamplingOverrides:
    """Sampling flags of a command, under their names. None leaves a setting to the model."""

    cfg_scale: float | None = None
    n_steps: int | None = None
    solver: str | None = None
    shift: float | None = None
    time_grid: str | None = None
    interval: tuple[float, ...] | None = None
    eta: float | None = None
    guided_channels: int | None = None
    inner_guidance: float | None = None
    inner_interval: tuple[float, ...] | None = None
    route_guidance: float | None = None
    route_rates: tuple[float, ...] | None = None
    guide: str | None = None
    guide_scale: float | None = None

    @classmethod
    def from_flags(cls, config: Any) -> "SamplingOverrides":
        """Pick these flags out of a command's config."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


class Guide(NamedTuple):
    """A weak model to guide by, and the scale of that; see `inference.autoguidance`."""

    model: "TrainedModel"
    scale: float


class SamplingPlan(NamedTuple):
    """A sampler and the scales of guidance, complete and checked against the model."""

    sampler: SamplerConfig
    cfg_scale: float
    guide: Guide | None = None
    inner_guidance: float = 1.0
    route_guidance: float = 1.0

    def with_cfg_scale(self, cfg_scale: float) -> "SamplingPlan":
        """The same plan at another guidance scale; at 1, without the limits of guidance."""
        if cfg_scale != 1 or self.guide:
            return self._replace(cfg_scale=cfg_scale)
        unlimited = replace(self.sampler, interval=ALWAYS, guided_channels=None)
        return self._replace(sampler=unlimited, cfg_scale=cfg_scale)


@dataclass(frozen=True)
class TrainedModel:
    """A trained model and what goes with it.

    Weights and VAE are loaded at their first use, so that a request that does not fit the model is
    refused before.

    Args:
        name: for messages, and for records of what was sampled.
        settings: as in a run's config.json: how it was trained and is sampled, and on what data.
        model: the config of the network.
        mesh: the devices to place the weights on.
        load: loads the weights. Returns the training step they are of, if known, and the weights.
        ema: whether the weights are averaged, if known.
        ema_std: relative width of their average, if it was made of a run's snapshots.
        vae: where the VAE of a latent diffusion model is now, if it has moved.
        text_encoders: where the text encoders are now, if they have moved.
        revision: the commit of a model of the hub.
        trained_size: in pixels, of the images that it was trained on, if it samples others.

    Raises:
        UserError: `vae` or `text_encoders` does not fit the model.
    """

    name: str
    settings: dict[str, Any]
    model: ModelConfig
    mesh: parallel.Mesh
    load: Callable[[], tuple[int | None, Any]] = field(repr=False)
    ema: bool | None = None
    ema_std: float | None = None
    vae: str | None = None
    text_encoders: Sequence[str] = ()
    revision: str | None = None
    trained_size: ImageSize | None = None

    def __post_init__(self):
        if self.vae:
            self.space.check_vae(self.vae)
        n_given = len(self.text_encoders)
        n_trained = len(self.settings.get("text_revisions") or ())
        # SD3 does without the last of its text encoders, T5.
        n_required = n_trained - 1 if self.full_width else n_trained
        if n_given and n_given not in (n_trained, n_required):
            raise UserError(
                f"--text_towers: the model has {n_trained} text encoders, not {n_given}"
            )

    @classmethod
    def from_run(
        cls,
        folder: Path,
        *,
        ema: bool = True,
        ema_std: float | None = None,
        step: int | None = None,
        vae: str | None = None,
        text_encoders: Sequence[str] = (),
        fsdp: int | None = None,
        base: str | None = None,
    ) -> "TrainedModel":
        """Open a run's checkpoint, the newest if no step is given. Reads only its `config.json`.

        Args:
            ema: the averaged weights; False for the raw ones.
            ema_std: relative width of an average that is made of the run's snapshots, in place of
                a checkpoint's weights. `step` is then that of a snapshot.
            fsdp: devices that share one copy of the weights; by default as in the run, or the
                greatest common divisor of that and the number of devices here.
            base: where the base of a run's adapters (LoRA) is now, if it has moved.

        Raises:
            UserError: the folder is not a run, or `config.json` does not describe one; or it kept
                no averages to make others of.
        """
        settings = read_config(folder)
        settings["run_dir"] = str(folder)  # it may have moved
        model = read_model_config(folder, settings)
        mesh = parallel.make_mesh(fsdp or math.gcd(settings["fsdp"], parallel.devices().count))
        which = Weights(ema, ema_std, step)
        load = partial(load_params, folder, model, mesh, which)
        if model.lora:
            load = partial(load_merged, folder, model, mesh, which, settings=settings, base=base)
            model = replace(model, lora=None)
        elif base:
            raise UserError(f"--base {base}: '{folder}' holds whole weights, not adapters (LoRA)")
        if ema_std is not None:
            check_average(str(folder), settings, ema_std, ema=ema)
        return cls(
            name=str(folder),
            settings=settings,
            model=model,
            mesh=mesh,
            load=load,
            ema=ema,
            ema_std=ema_std,
            vae=vae,
            text_encoders=text_encoders,
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str,
        *,
        lora: Path | None = None,
        vae: str | None = None,
        text_encoders: Sequence[str] = (),
        fsdp: int | None = None,
    ) -> "TrainedModel":
        """Open a published model by `transformer.load_transformer`: of the hub, a folder or a file.

        Args:
            lora: a file of adapters to add to it.

        Raises:
            UserError: it cannot be read, or has parts that are not implemented here.
        """
        dtype = "float32" if parallel.devices().platform == "cpu" else "bfloat16"
        published = transformer.load_transformer(path_or_id, dtype=dtype)
        if lora:
            published = with_adapter(published, lora)
        mesh = parallel.make_mesh(fsdp or 1)

        def load() -> tuple[None, Any]:
            return None, parallel.shard_params(published.params, mesh)

        return cls(
            name=published.id,
            settings=published.settings,
            model=published.config,
            mesh=mesh,
            load=load,
            vae=vae,
            text_encoders=text_encoders,
            revision=published.revision,
        )

    def at_size(self, written: WrittenSize) -> "TrainedModel":
        """The same model, with the same weights in memory, for images of another size in pixels
        than those of the training.

        Raises:
            UserError: its patches, or the VAE's latents, do not divide the size, or its positions
                are learned, which are of one size alone.
        """
        size, own = ImageSize.parse(written, "--size"), self.image_size
        if size == own:
            return self
        downsampling = own.height // self.model.size.height
        unit = self.model.patch_size * downsampling
        if not size.divided(unit):
            below, above = (
                ImageSize(*(max(1, rounded(side / unit)) * unit for side in size.sides))
                for rounded in (math.floor, math.ceil)
            )
            nearest = f"{above}" if below == above else f"{below} or {above}"
            raise UserError(f"--size {size}: both sides must be multiples of {unit}, as {nearest}")
        if self.model.position == "learned":
            raise UserError(
                f"--size {size}: the model's positions are learned, for images of {own} alone; "
                "leave it out"
            )
        inner = ImageSize(*(side // downsampling for side in size.sides))
        model = replace(self.model, image_size=inner.written)
        dataset = self.settings["dataset"]
        if encoding := dataset.get("encoding"):
            facts = {"image_size": size.written, "shape": list(model.image_shape)}
            dataset = dataset | {"encoding": encoding | facts}
        settings = self.settings | {"dataset": dataset}
        return replace(
            self,
            model=model,
            settings=settings,
            load=lambda: self._loaded,
            trained_size=self.trained_size or own,
        )

    @cached_property
    def _loaded(self) -> tuple[int | None, Any]:
        return self.load()

    def load_weights(self) -> Any:
        """Load the weights, if they are not loaded yet, and return them.

        Raises:
            UserError: there is no such checkpoint, or it cannot be read.
        """
        return self._loaded[1]

    @property
    def params(self) -> Any:
        """The weights, on the mesh."""
        return self.load_weights()

    @property
    def step(self) -> int | None:
        """The training step that the weights are of, if known."""
        return self._loaded[0]

    @cached_property
    def space(self) -> Space:
        """The space that the model works in. A VAE is read at its first use.

        Raises:
            UserError: the VAE cannot be read, or has other weights than that of the latents.
        """
        vae = self.vae or self.settings.get("vae")
        load = partial(Codec.from_encoding, mesh=self.mesh, vae=vae)
        return space_of(self.settings["dataset"].get("encoding"), load)

    @property
    def image_size(self) -> ImageSize:
        """Height and width of its samples in pixels."""
        return self.space.image_size(self.model)

    @property
    def trained_sizes(self) -> list[ImageSize]:
        """Sizes in pixels of the images that it was trained on: those of its buckets, if any."""
        buckets = [ImageSize.parse(bucket) for bucket in self.settings.get("buckets") or ()]
        return buckets or [self.trained_size or self.image_size]

    @property
    def size_warning(self) -> str:
        """Warning about samples larger than the images of the training; "" about others."""
        longest = [max(sides) for sides in zip(*(size.sides for size in self.trained_sizes))]
        if all(side <= most for side, most in zip(self.image_size.sides, longest)):
            return ""
        return (
            f"size {self.image_size}: the model was trained on images of "
            f"{', '.join(map(str, self.trained_sizes))}, and has seen no place beyond their edges"
        )

    @cached_property
    def conditioning(self) -> Conditioning:
        """The conditioning of the model."""
        captions = Captions(
            self.encode_captions,
            self.text_encoder_paths,
            open_store=self.open_caption_store,
            full_width=self.full_width,
        )
        return conditioning_of(self.model, self.label_names, captions)

    @cached_property
    def method(self) -> Method:
        """The method that the model was trained by.

        Raises:
            UserError: it is not known here.
        """
        return method_of(self.settings)

    @property
    def full_width(self) -> int | None:
        """Channels of a token of SD3, published or trained on, whose text encoders are padded to
        it; None for other models.
        """
        return self.settings.get("full_width")

    @property
    def label_names(self) -> list[str]:
        """Class names, if the dataset has them."""
        return list(self.settings["dataset"].get("label_names") or ())

    @property
    def text_encoder_paths(self) -> list[str]:
        """Folders or hub ids of the text encoders; empty for a model without captions."""
        return list(self.text_encoders or self.settings.get("text_towers") or ())

    @property
    def null_is_trained(self) -> bool:
        """False if no label was dropped in training: there is then nothing to guide by."""
        return guidance.null_is_trained(self.settings)

    @property
    def default_cfg_scale(self) -> float:
        """The guidance scale to sample with if none is given."""
        return guidance.default_scale(self.settings)

    def check_scale(self, cfg_scale: float, *, negative: bool = False) -> None:
        """Raise UserError for guidance of a method that has none, or by a null label that was never
        trained.

        Args:
            negative: a negative prompt stands in for the null label.
        """
        if cfg_scale != 1 and not self.method.is_guidable:
            raise guidance.unguidable_error(self.method.title, f"cfg_scale {cfg_scale:g}")
        is_guided = cfg_scale != 1 and self.model.is_conditional and not negative
        if is_guided and not self.null_is_trained:
            raise guidance.untrained_null_error(self.name, cfg_scale)

    def encode_captions(self, captions: Sequence[str]) -> EncodedCaption:
        """Encode captions with the model's text encoders.

        Raises:
            UserError: a text encoder cannot be read, is not the one that was trained with, or takes
                less than a whole caption; their widths are not the model's.
        """
        model = self.model
        paths = self.text_encoder_paths
        encoded = text_encoders.encode_captions(
            captions,
            paths,
            self.settings["text_revisions"][: len(paths)],
            length=model.text_length,
            full_width=self.full_width,
        )
        width, pooled_width = encoded.tokens.shape[-1], encoded.pooled.shape[-1]
        if (width, pooled_width) != (model.text_width, model.pooled_width):
            raise UserError(
                f"the text encoders {', '.join(paths)} give {width} channels of a token and "
                f"{pooled_width} of the pooled vector; the model takes {model.text_width} and "
                f"{model.pooled_width}"
            )
        return encoded

    def open_caption_store(self, captions: Sequence[str]) -> CaptionStore:
        """Open the encoded captions of the run's dataset, cut and padded as in training. What was
        encoded for training is not encoded again.

        Raises:
            UserError: a text encoder is needed and cannot be read, or is not the one that was
                trained with.
        """
        settings, paths = self.settings, self.text_encoder_paths
        data_dir = settings.get("data_dir")
        folder = settings.get("caption_cache") or caption_cache.default_cache_folder(
            settings["dataset_name"], Path(data_dir) if data_dir else None
        )
        with processes.first_then_others():  # each would load the text encoders
            store = CaptionStore.open(
                Path(folder),
                captions,
                paths,
                revisions=settings["text_revisions"][: len(paths)],
                max_length=self.model.text_length,
                full_width=self.full_width,
            )
        store.length = self.model.text_length
        return store

    def plan(
        self, overrides: SamplingOverrides, *, negative: bool = False, guide: Guide | None = None
    ) -> SamplingPlan:
        """Complete the overrides with the model's own settings.

        Args:
            negative: a negative prompt is given.
            guide: a weak model, which `overrides.guide` names.

        Raises:
            UserError: a value is out of range, or does not fit the model.
        """
        settings = self.settings
        inner_guidance = 1.0 if overrides.inner_guidance is None else overrides.inner_guidance
        route_guidance = 1.0 if overrides.route_guidance is None else overrides.route_guidance
        default = 1.0 if guide else self.default_cfg_scale
        cfg_scale = default if overrides.cfg_scale is None else overrides.cfg_scale
        self.check_scale(cfg_scale, negative=negative)
        n_steps = settings["n_sample_steps"] if overrides.n_steps is None else overrides.n_steps
        own_shift = settings.get("sample_shift") or 1.0
        guided_channels = overrides.guided_channels
        if guided_channels is None and (cfg_scale != 1 or guide):
            guided_channels = settings.get("guided_channels")
        sampler = SamplerConfig(
            solver=overrides.solver or settings["solver"],
            n_steps=n_steps,
            shift=own_shift if overrides.shift is None else overrides.shift,
            interval=tuple(overrides.interval or ALWAYS),
            inner_interval=tuple(overrides.inner_interval or ALWAYS),
            route_rates=self.route_rates(route_guidance, overrides.route_rates),
            method=self.sampling_method(overrides.time_grid),
            eta=overrides.eta or 0.0,
            guided_channels=guided_channels,
            clip=self.space.is_bounded,
        )
        check_guidance(sampler, self.model, cfg_scale, has_guide=bool(guide))
        check_inner_guidance(sampler, self.model, inner_guidance)
        check_route_guidance(sampler, self.model, route_guidance, inner_guidance=inner_guidance)
        is_guided = guide is not None and guide.scale != 1
        return SamplingPlan(
            sampler,
            float(cfg_scale),
            guide if is_guided else None,
            float(inner_guidance),
            float(route_guidance),
        )

    def sampling_method(self, time_grid: str | None) -> Method:
        """The method with this grid of times, or with the model's own.

        Raises:
            UserError: the grid is given, and the method is not rectified flow.
        """
        if time_grid is None:
            return self.method
        if not isinstance(self.method, RectifiedFlow):
            raise UserError(
                f"--time_grid {time_grid} is for rectified flow, not for a model trained by "
                f"{self.method.title}"
            )
        return replace(self.method, time_grid=time_grid)

    def route_rates(
        self, route_guidance: float, given: tuple[float, ...] | None
    ) -> tuple[float, ...]:
        """The rates of route guidance: if none are given, none and the share of the training."""
        share = self.settings.get("route_share")
        if given or route_guidance == 1 or not share:
            return tuple(given or ROUTE_RATES)
        return (0.0, share)

    def sample(
        self,
        labels: Labels,
        plan: SamplingPlan,
        *,
        seed: int | Sequence[int] = 0,
        first_index: int = 0,
        negative: Labels | None = None,
        start_from: StartFrom | None = None,
        batch_size: int = 256,
        trajectory: bool = False,
        estimates: bool = False,
        decode: bool = True,
    ) -> Samples:
        """Sample images by `sample_images`, which explains the arguments.

        Args:
            negative: by default the model's null label. It has no effect at a guidance scale of 1.
            decode: decode latents to images; False returns them as the model sees them.

        Raises:
            UserError: weights or VAE cannot be read, or the request does not fit the model.
        """
        self.check_scale(plan.cfg_scale, negative=negative is not None)
        if negative is None and plan.cfg_scale != 1:
            negative = self.conditioning.null
        if decode:
            self.space.open()  # a missing VAE is reported before weights are read
        return sample_images(
            self.params,
            self.model,
            labels,
            sampler=plan.sampler,
            mesh=self.mesh,
            cfg_scale=plan.cfg_scale,
            seed=seed,
            first_index=first_index,
            negative=None if plan.cfg_scale == 1 else negative,
            weak=plan.guide and WeakModel(plan.guide.model.params, plan.guide.model.model),
            weak_scale=plan.guide.scale if plan.guide else 1.0,
            inner_guidance=plan.inner_guidance,
            route_guidance=plan.route_guidance,
            start_from=start_from,
            batch_size=batch_size,
            trajectory=trajectory,
            estimates=estimates,
            to_images=self.space.to_images if decode else None,
        )

    def sample_rows(self, rows: RequestRows, plan: SamplingPlan, **options: Any) -> Samples:
        """Sample rows of a request by `sample`, which explains the options."""
        return self.sample(
            rows.labels,
            plan,
            seed=rows.seed,
            first_index=rows.first_index,
            negative=rows.negative,
            **options,
        )

    def to_uint8(
        self, x: Float[np.ndarray, "*n h w c"], *, first: int = 0, rounding: str = "nearest"
    ) -> UInt8[np.ndarray, "*n h w c"]:
        """Convert decoded samples in −1 … 1 to bytes, as `grids.to_uint8` does.

        Raises:
            NotFiniteError: a sample holds NaN or infinity. The message names it, the model and the
                step, and says whether the weights are the reason.
        """
        try:
            return grids.to_uint8(x, first=first, rounding=rounding)
        except NotFiniteError as error:
            step = "" if self.step is None else f", step {self.step}"
            reason = "its weights are finite: lower --cfg_scale, raise --n_steps, or check the VAE"
            if not parallel.is_finite(self.params):
                reason = "its weights are not finite either: use another checkpoint"
            raise NotFiniteError(f"{self.name}{step}: {error}; {reason}") from None

    @property
    def card(self) -> dict[str, Any]:
        """All that the model's samples depend on, for the record beside them."""
        step = self.step
        self.space.open()
        return {
            "run": self.name,
            "step": step,
            "ema": self.ema,
            "dataset_name": self.settings.get("dataset_name"),
            "model": self.settings.get("model"),
            "ema_decay": self.settings.get("ema_decay"),
            "revision": self.revision,
            "dtype": self.model.dtype,
            "text_towers": self.text_encoder_paths,
            "vae": self.space.card,
            # Cards of older versions do not have it.
            **({} if self.ema_std is None else {"ema_std": self.ema_std}),
            **({"time_endpoint": True} if self.model.time_endpoint else {}),
            **({"image_size": self.image_size.written} if self.trained_size else {}),
        }
