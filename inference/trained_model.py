"""What pictures are drawn from: weights, the shape of their model, and all that is known of them.

    of = Drawable.of_run(Path("runs/digits"))
    of.sample([3, 7], of.how(Wishes(cfg_scale=2))).x

A command reads a run through this and nowhere else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from data import text_encoders
from data.batch import Caption
from datasets_config import LatentEncoding
from inference import sampler as inference_sampler
from inference.codec import Codec
from inference.sampler import Labels, SamplerConfig, Samples
from model import ModelConfig, init_params
from pretrained import transformer
from runtime import parallel
from runtime.checkpoint import Checkpoints
from runtime.errors import UserError
from runtime.run_folder import read_config


@dataclass(frozen=True)
class SamplingOverrides:
    """How pictures shall be drawn; what is None is as the settings of a `Drawable` say. The flags
    of a command, by their names.
    """

    cfg_scale: float | None = None
    n_steps: int | None = None
    solver: str | None = None
    shift: float | None = None
    interval: tuple[float, ...] | None = None
    eta: float | None = None
    guided_channels: int | None = None

    @classmethod
    def of(cls, config: Any) -> "SamplingOverrides":
        """Those among a command's flags."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


class SamplingPlan(NamedTuple):
    """How pictures will be drawn."""

    sampler: SamplerConfig
    cfg_scale: float

    def at(self, cfg_scale: float) -> "SamplingPlan":
        """The same at another scale of guidance. At 1 there is none that could be limited."""
        unlimited = {"interval": (0.0, 1.0), "guided_channels": None}
        limits = unlimited if cfg_scale == 1 else {}
        return SamplingPlan(replace(self.sampler, **limits), cfg_scale)


@dataclass(frozen=True)
class TrainedModel:
    """A trained model and what goes with it. Its weights and its VAE are loaded when they are first
    asked for, so that what cannot be drawn is refused before.

    Args:
        name: in messages, and in records of what was drawn.
        settings: as in a run's config.json: how it was trained and is sampled, and on what.
        model: the weights' shape.
        mesh: where they are to be.
        load: what loads them, and tells of which step of training they are, if that is known.
        ema: whether they are averaged, if that is known.
        vae: where the VAE of latents is now, if it has moved.
        text_towers: where the towers that encode captions are now, if they have moved.
        revision: the commit of a model of the hub.
    """

    name: str
    settings: dict[str, Any]
    model: ModelConfig
    mesh: parallel.Mesh
    load: Callable[[], tuple[int | None, Any]] = field(repr=False)
    ema: bool | None = None
    vae: str | None = None
    text_towers: Sequence[str] = ()
    revision: str | None = None

    def __post_init__(self):
        if self.vae and not self.encoding:
            raise UserError(f"--vae {self.vae}: the model is of pictures, not of latents")
        known, n = len(self.settings.get("text_revisions") or ()), len(self.text_towers)
        # The published SD3 does without the last of its towers, T5.
        if n and n not in (known, known - bool(self.full_width)):
            raise UserError(f"--text_towers: the model has {known}, not {n}")

    @classmethod
    def of_run(
        cls,
        folder: Path,
        *,
        ema: bool = True,
        step: int | None = None,
        vae: str | None = None,
        text_towers: Sequence[str] = (),
        fsdp: int | None = None,
    ) -> "TrainedModel":
        """A run's checkpoint, the newest if no step is named. Reads its `config.json` only.

        Args:
            fsdp: devices that share one copy of the weights; by default as many as in the run, as
                far as there are so many.

        Raises:
            UserError: the folder is not a run, or `config.json` does not describe one.
        """
        settings = read_config(folder)
        try:
            model = ModelConfig(**settings["model_config"])
        except TypeError as error:
            raise UserError(f"the config.json of '{folder}' is damaged: {error}") from None
        mesh = parallel.make_mesh(fsdp or math.gcd(settings["fsdp"], jax.device_count()))
        load = partial(load_params, folder, model, mesh, ema=ema, step=step)
        return cls(str(folder), settings, model, mesh, load, ema, vae, text_towers)

    @classmethod
    def of_pretrained(
        cls,
        path_or_id: str,
        *,
        vae: str | None = None,
        text_towers: Sequence[str] = (),
        fsdp: int | None = None,
    ) -> "TrainedModel":
        """A model of `pretrained.transformer.load`: of the hub, a folder or a file.

        Raises:
            UserError: it is not to be had, or cannot be computed here.
        """
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        found, mesh = transformer.load(path_or_id, dtype=dtype), parallel.make_mesh(fsdp or 1)

        def load() -> tuple[None, Any]:
            return None, parallel.shard(found.params, mesh)

        where = {"vae": vae, "text_towers": text_towers, "revision": found.revision}
        return cls(found.id, found.settings, found.config, mesh, load, **where)

    @cached_property
    def _loaded(self) -> tuple[int | None, Any]:
        return self.load()

    @property
    def params(self) -> Any:
        return self._loaded[1]

    @property
    def step(self) -> int | None:
        return self._loaded[0]

    @property
    def encoding(self) -> LatentEncoding | None:
        """How the pictures became latents, if the model is of latents."""
        record = self.settings["dataset"].get("encoding")
        return LatentEncoding.of(record) if record else None

    @cached_property
    def codec(self) -> Codec | None:
        """What makes pictures of its latents; None where it draws pictures.

        Raises:
            UserError: the VAE cannot be read, or is another one.
        """
        if not (encoding := self.encoding):
            return None
        return Codec.of(encoding, self.mesh, vae=self.vae or self.settings.get("vae"))

    @property
    def full_width(self) -> int | None:
        """Of the published SD3, channels of a token: see `text.Towers`. None for our own models."""
        return self.settings.get("full_width")

    @property
    def label_names(self) -> list[str]:
        return list(self.settings["dataset"].get("label_names") or ())

    @property
    def towers(self) -> list[str]:
        """Where what encodes captions is; none for a model of classes."""
        return list(self.text_towers or self.settings.get("text_towers") or ())

    def encode(self, captions: Sequence[str]) -> Caption:
        """Captions as the model's text towers see them.

        Raises:
            UserError: a tower is not to be had, is not the one that was trained with, or takes less
                than a whole caption; the towers are of another width than the model.
        """
        towers, model = self.towers, self.model
        revisions = self.settings["text_revisions"][: len(towers)]
        how = {"length": model.text_length, "full_width": self.full_width}
        encoded = text_encoders.encode(captions, towers, revisions, **how)
        widths = encoded.tokens.shape[-1], encoded.pooled.shape[-1]
        if widths != (model.text_width, model.pooled_width):
            raise UserError(
                f"the text towers {', '.join(towers)} give {widths[0]} channels of a token and "
                f"{widths[1]} of the pooled vector; the model takes {model.text_width} and "
                f"{model.pooled_width}"
            )
        return encoded

    def how(self, wishes: SamplingOverrides) -> SamplingPlan:
        """How it is drawn from: as its settings say, but for what is wished.

        Raises:
            UserError: what cannot be, or does not fit the model.
        """
        w, s = wishes, self.settings
        if w.interval is not None and len(w.interval) != 2:
            raise UserError("--interval takes two times: the lowest and the highest")
        low, high = w.interval or (0.0, 1.0)
        scale = s["cfg_scale"] if w.cfg_scale is None else w.cfg_scale
        channels = w.guided_channels
        if channels is None and scale != 1:
            channels = s.get("guided_channels")
        sampler = SamplerConfig(
            solver=w.solver or s["solver"],
            n_steps=s["n_sample_steps"] if w.n_steps is None else w.n_steps,
            shift=(s.get("sample_shift") or 1.0) if w.shift is None else w.shift,
            interval=(low, high),
            prediction=s.get("prediction"),  # which runs of rectified flow do without
            eta=w.eta or 0.0,
            guided_channels=channels,
            clip=not self.encoding,
        )
        inference_sampler.check_guidance(sampler, self.model, scale)
        return SamplingPlan(sampler, float(scale))

    def sample(self, labels: Labels, how: SamplingPlan, **more: Any) -> Samples:
        """Pictures by `drawing.sample`, which `more` is for; latents, if its `codec` is None. Its
        `negative` is left out where there is no guidance to lead away.
        """
        if "codec" not in more:
            more["codec"] = self.codec  # a VAE that is gone is said before weights are read
        sampler, scale = how
        if scale == 1:
            more["negative"] = None
        return inference_sampler.sample_images(
            self.params,
            self.model,
            labels,
            sampler=sampler,
            cfg_scale=scale,
            mesh=self.mesh,
            **more,
        )

    @property
    def card(self) -> dict[str, Any]:
        """What its pictures depend on, for the record that goes with them."""
        found = {"run": self.name, "step": self.step, "ema": self.ema}
        found |= {n: self.settings.get(n) for n in ("dataset_name", "model", "ema_decay")}
        found |= {"revision": self.revision, "dtype": self.model.dtype, "text_towers": self.towers}
        codec = self.codec
        return found | {"vae": {"id": codec.id, "hash": codec.hash} if codec else None}


def load_params(
    run: Path,
    config: ModelConfig,
    mesh: parallel.Mesh,
    *,
    ema: bool = True,
    step: int | None = None,
) -> tuple[int, Any]:
    """(step, weights) of a run's checkpoint, the newest if no step is named, averaged or raw."""
    item = "ema" if ema else "params"
    like = {item: parallel.abstract(partial(init_params, config, jax.random.key(0)), mesh)}
    with Checkpoints(run, read_only=True) as checkpoints:
        if step is None:
            step, items, _ = checkpoints.restore_newest(like)
        else:
            items = checkpoints.restore(checkpoints.pick(step), like)
    return step, items[item]
