"""The web page of `demo.py`, in Gradio: its fields, tabs and messages.

Samples nothing itself: see `service.py`. Each visitor sees only what he requested. Images travel as
files of unguessable names in a folder that is removed with the process, and the only state that
visitors share is a model's weights.
"""

import json
import os
import random
import re
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pandas as pd
from PIL import Image

from inference import curves, grids, progress
from inference.app import service
from inference.app.service import MAX_IMAGES, ModelLibrary, SampleJob
from inference.sampler import MAX_SEED
from inference.trained_model import TrainedModel
from runtime.errors import UserError
from runtime.run_folder import read_config

MAX_QUEUED = 20  # jobs that wait for the device; more are refused
MAX_GRIDS = 24  # of a run's samples during training
MAX_CFG_SCALE = 15  # of the slider, unless the model's own is larger
WARNING_SECONDS = 30  # that it is shown: another size compiles another program first
FILE_SECONDS = 3600  # how long an image stays available to its visitor
# Grids keep their proportions, where thumbnails would be squares, and captions stay below them. All
# of a gallery is shown, without a scroll bar.
CSS = """
footer {display: none !important}
#grids button {aspect-ratio: auto !important; padding-bottom: 2.2rem !important}
.grid-wrap {max-height: none !important}
"""
IMAGE_BUTTONS = ["download", "fullscreen"]  # the default has one that uploads to a public site
GRID_SCALES = "1 2 4 8"  # of the comparison grid, unless a visitor says otherwise
# Settings that identify a run come first in its table.
LEADING_SETTINGS = (
    "dataset_name",
    "model",
    "objective",
    "n_steps",
    "batch_size",
    "learning_rate",
    "seed",
)


def launch_page(page: gr.Blocks, *, port: int | None, host: str, share: bool) -> str:
    """Serve the page in the background and return its address.

    Raises:
        UserError: the port is taken, the host is not this machine's, or it cannot be reached.
    """
    bypass_proxies(host)
    page.queue(max_size=MAX_QUEUED)
    try:
        _, local_url, public_url = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            css=CSS,
            footer_links=[],
            ssr_mode=False,
            enable_monitoring=False,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=0,
        )
    except (OSError, ValueError, httpx.HTTPError) as error:
        address = f"{host}:{port}" if port else host
        raise UserError(f"cannot open the page at {address}: {error}") from None
    return public_url or local_url


def bypass_proxies(host: str) -> None:
    """Exclude this machine from the proxies: Gradio requests its own page to see if it is up."""
    excluded = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    hosts = ",".join(filter(None, (excluded, "localhost,127.0.0.1", host.strip("[]"))))
    os.environ["no_proxy"] = hosts
    os.environ["NO_PROXY"] = hosts


@contextmanager
def show_errors() -> Generator[None]:
    """Show errors as messages in the page; the traceback of a bug goes to the terminal."""
    try:
        yield
    except UserError as error:
        message = re.sub(r"--(?=\w)", "", str(error))  # what is a flag elsewhere is a field here
        raise gr.Error(message, print_exception=False) from None
    except gr.Error:
        raise
    except Exception:
        traceback.print_exc()
        message = "Internal error: the terminal that runs demo.py shows the traceback."
        raise gr.Error(message, print_exception=False) from None


def build_page(models: ModelLibrary) -> gr.Blocks:
    """Build the page."""
    names = models.names()
    with gr.Blocks(
        title=names[0] if len(names) == 1 else "Diffusion transformers",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(FILE_SECONDS, FILE_SECONDS),
    ) as page:
        title = gr.Markdown(elem_id="title")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                model = gr.Dropdown(names, value=names[0], label="Model", elem_id="model")
                fields = add_request_fields()
            with gr.Column(scale=3):
                with gr.Tab("Generate"):
                    sampling_fields = add_generate_tab(models, model, fields)
                with gr.Tab("Guidance × steps"):
                    scales = add_comparison_tab(models, model, fields)
                with gr.Tab("Run"):
                    history = add_run_tab()

        def on_choose(name: str) -> list[Any]:
            with show_errors():
                opened = models.open(name)
                grid_scales = gr.update(
                    value=GRID_SCALES if opened.method.is_guidable else "1",
                    visible=opened.method.is_guidable,
                )
                return [describe_model(opened), *fields_for_model(opened), grid_scales]

        def on_show_run(name: str) -> list[Any]:
            with show_errors():
                return load_run_history(models.folder(name))

        def on_load() -> Any:
            return gr.update(choices=models.names())

        connect(page.load, on_load, [], [model])
        for event in (page.load, model.change):
            connect(event, on_choose, [model], [title, *fields, *sampling_fields, scales])
            connect(event, on_show_run, [model], history)
    return page


def connect(
    event: Callable[..., Any], function: Callable[..., Any], inputs: list[Any], outputs: list[Any]
) -> None:
    """Call a function that does not need the device; several may run at a time."""
    event(
        function,
        inputs,
        outputs,
        concurrency_limit=4,
        api_visibility="private",
        show_progress="hidden",
    )


def connect_to_device(
    event: Callable[..., Any], function: Callable[..., Any], inputs: list[Any], outputs: list[Any]
) -> None:
    """Call a function that samples. One runs at a time, whoever requested it; the others queue.

    Progress is shown on the first of the outputs.
    """
    event(
        function,
        inputs,
        outputs,
        concurrency_id="device",
        concurrency_limit=1,
        api_visibility="private",
        show_progress_on=outputs[0],
    )


# --- fields ---------------------------------------------------------------------------------------


def add_request_fields() -> list[Any]:
    """Add the fields that every tab reads, in the order that `read_job` expects."""
    labels = gr.Dropdown([], label="Class", multiselect=True, elem_id="labels", visible=False)
    prompt = gr.Textbox(label="Prompt", lines=3, elem_id="prompt", visible=False)
    negative = gr.Textbox(label="Negative prompt", elem_id="negative", visible=False)
    solver = gr.Dropdown([], label="Sampler", elem_id="solver")
    with gr.Row():
        low = gr.Number(0, label="Guidance from t", step=0.1, min_width=80, elem_id="low")
        high = gr.Number(1, label="to t (1 is noise)", step=0.1, min_width=80, elem_id="high")
    with gr.Row():
        guide = gr.Dropdown([], label="Weak guide", elem_id="guide", visible=False)
        guide_scale = gr.Number(
            2, label="its scale", step=0.1, min_width=80, elem_id="guide-scale", visible=False
        )
    with gr.Row():
        inner, inner_low, inner_high = (
            gr.Number(value, label=label, step=0.1, min_width=80, elem_id=name, visible=False)
            for name, label, value in (
                ("inner", "Inner guidance", 1),
                ("inner-low", "from t", 0),
                ("inner-high", "to t", 1),
            )
        )
    size = gr.Dropdown([], label="Size", allow_custom_value=True, elem_id="size", visible=False)
    seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
    random_seed = gr.Button("Random seed", size="sm", elem_id="random-seed")
    connect(random_seed.click, lambda: random.randrange(MAX_SEED), [], [seed])
    guidance = [low, high, guide, guide_scale, inner, inner_low, inner_high]
    return [labels, prompt, negative, solver, *guidance, size, seed]


def fields_for_model(model: TrainedModel) -> list[Any]:
    """Update the fields of `add_request_fields`, the guidance scale and the steps for a model."""
    has_captions, classes = model.conditioning.takes_prompts, list(model.conditioning.choices)
    guides, sizes = service.guides_of(model), service.sizes_of(model)
    prompt = gr.update(visible=True) if has_captions else gr.update(visible=False, value="")
    cfg_scale = model.default_cfg_scale
    return [
        gr.update(choices=classes, value=[], visible=bool(classes), info="empty: all classes"),
        prompt,
        prompt if model.method.is_guidable else gr.update(visible=False, value=""),
        gr.update(choices=list(model.method.solvers), value=model.settings["solver"]),
        gr.update(visible=model.method.is_guidable),
        gr.update(visible=model.method.is_guidable),
        gr.update(choices=[("none", ""), *guides.items()], value="", visible=bool(guides)),
        gr.update(visible=bool(guides)),
        *(gr.update(value=v, visible=bool(model.model.inner_head)) for v in (1, 0, 1)),
        gr.update(
            choices=sizes,
            value=sizes[0] if sizes else "",
            visible=bool(sizes),
            info="height x width; choose one or write another",
        ),
        gr.skip(),
        gr.update(
            value=cfg_scale,
            maximum=max(MAX_CFG_SCALE, cfg_scale),
            visible=model.method.is_guidable,
        ),
        gr.update(value=model.settings["n_sample_steps"], maximum=service.max_steps(model)),
    ]


def read_job(
    values: tuple[Any, ...],
    *,
    n_images: int | None = 1,
    n_steps: int | None = None,
    cfg_scale: float | None = None,
) -> SampleJob:
    """Build a job from the values of `add_request_fields`; None leaves a setting to the model.

    Raises:
        UserError: the seed or the number of images is empty.
    """
    labels, prompt, negative, solver, low, high, guide, guide_scale, *inner, size, seed = values
    inner_guidance, inner_low, inner_high = inner
    if seed is None:
        raise UserError("the seed is empty: enter a whole number")
    if n_images is None:
        raise UserError("the number of images is empty: enter a whole number")
    return SampleJob(
        labels=tuple(labels or ()),
        prompt=prompt or "",
        negative_prompt=negative or "",
        n_images=n_images,
        n_steps=n_steps,
        cfg_scale=cfg_scale,
        solver=solver,
        interval=(0 if low is None else low, _or_one(high)),
        guide=guide or None,
        guide_scale=guide_scale if guide else None,
        inner_guidance=_or_one(inner_guidance),
        inner_interval=(0 if inner_low is None else inner_low, _or_one(inner_high)),
        size=size or "",
        seed=int(seed),
    )


def _or_one(value: float | None) -> float:
    return 1 if value is None else value


def describe_model(model: TrainedModel) -> str:
    """Describe a model in Markdown: its architecture, dataset, image size and conditioning."""
    settings = model.settings
    architecture = settings.get("model") or model.name
    dataset = settings.get("dataset_name")
    height, width = model.space.image_size(model.model).sides
    conditioning = model.conditioning.title
    heading = f"{architecture} trained on {dataset}" if dataset else str(architecture)
    return f"# {heading}\n{height} × {width} pixels · {conditioning} · {model.method.title}"


# --- tabs -----------------------------------------------------------------------------------------


def add_generate_tab(
    models: ModelLibrary, model: gr.Dropdown, fields: list[Any]
) -> tuple[gr.Slider, gr.Slider]:
    """Add the tab of samples and their trajectory. Returns the guidance scale and the steps."""
    with gr.Row():
        n_images = add_slider("Number of images", "n", value=16, maximum=MAX_IMAGES)
        n_steps = add_slider("Steps", "steps", maximum=service.MAX_STEPS)
        cfg_scale = add_slider("Guidance scale", "scale", maximum=MAX_CFG_SCALE, step=0.1)
    with gr.Row(equal_height=True):
        generate = gr.Button("Generate", variant="primary", elem_id="generate")
        with_trajectory = gr.Checkbox(label="Show the trajectory", elem_id="with-trajectory")
    gallery = add_gallery("images", columns=6)
    animation = add_image("trajectory", visible=False)

    def on_generate(
        name: str,
        n: int | None,
        steps: int | None,
        scale: float | None,
        animate: bool,
        *values: Any,
    ) -> Iterator[list[Any]]:
        with show_errors():
            job = read_job(values, n_images=n, n_steps=steps, cfg_scale=scale)
            loaded = models.load(name)
            warn_of_size(loaded, job)
            images = []
            for batch in service.run_job(loaded, job):
                images += batch
                yield [images, gr.update(visible=False)]
            if animate:
                frames = service.sample_trajectory_frames(loaded, job)
                # Gradio copies the file before the generator continues.
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "trajectory.gif"
                    grids.save_gif(frames, path)
                    yield [gr.skip(), gr.update(value=str(path), visible=True)]

    inputs = [model, n_images, n_steps, cfg_scale, with_trajectory, *fields]
    connect_to_device(generate.click, on_generate, inputs, [gallery, animation])
    return cfg_scale, n_steps


def add_comparison_tab(models: ModelLibrary, model: gr.Dropdown, fields: list[Any]) -> gr.Textbox:
    """Add the tab of one sample at several guidance scales and numbers of steps; return the field
    of the scales.
    """
    with gr.Row():
        scales = gr.Textbox(GRID_SCALES, label="Guidance scales (rows)", elem_id="scales")
        steps = gr.Textbox("2 5 10 25", label="Steps (columns)", elem_id="columns")
    gr.Markdown("One sample per cell, all from the same noise.")
    compare = gr.Button("Generate grid", variant="primary", elem_id="compare")
    grid = add_image("comparison")

    def on_compare(name: str, scales: str, steps: str, *values: Any) -> Iterator[Image.Image]:
        with show_errors():
            loaded, job = models.load(name), read_job(values)
            warn_of_size(loaded, job)
            yield from service.sample_comparison_grid(
                loaded,
                job,
                parse_numbers(scales, float),
                parse_numbers(steps, int),
            )

    connect_to_device(compare.click, on_compare, [model, scales, steps, *fields], [grid])
    return scales


def warn_of_size(model: TrainedModel, job: SampleJob) -> None:
    """Show a warning about images larger than those of the training.

    Raises:
        UserError: the model cannot sample this size.
    """
    if warning := service.at_size(model, job).size_warning:
        gr.Warning(warning, duration=WARNING_SECONDS)


def parse_numbers(text: str, kind: type) -> list[Any]:
    """Parse numbers separated by spaces or commas.

    Raises:
        UserError: a word is not a number of this kind.
    """
    try:
        return [kind(word) for word in re.split(r"[\s,;]+", text.strip()) if word]
    except ValueError:
        expected = "whole numbers" if kind is int else "numbers"
        raise UserError(f"'{text[:40]}': enter {expected} separated by spaces") from None


# --- components -----------------------------------------------------------------------------------


def add_slider(
    label: str, elem_id: str, *, maximum: float, value: float = 1, step: float = 1
) -> gr.Slider:
    """Add a slider from 1, or from 0 for fractions."""
    minimum = 1 if step == 1 else 0
    return gr.Slider(minimum, maximum, value, step=step, label=label, elem_id=elem_id, buttons=[])


def add_gallery(elem_id: str, *, columns: int) -> gr.Gallery:
    """Add a gallery of images that keep their proportions."""
    return gr.Gallery(
        columns=columns,
        elem_id=elem_id,
        show_label=False,
        height="auto",
        object_fit="contain",
        format="png",
        buttons=IMAGE_BUTTONS,  # pyright: ignore
        interactive=False,
    )


def add_image(elem_id: str, *, visible: bool = True) -> gr.Image:
    """Add a single image. Gradio would lay a label over its corner."""
    return gr.Image(
        show_label=False,
        elem_id=elem_id,
        format="png",
        buttons=IMAGE_BUTTONS,  # pyright: ignore
        interactive=False,
        visible=visible,
    )


# --- history of a run -----------------------------------------------------------------------------


def add_run_tab() -> list[Any]:
    """Add the components that `load_run_history` fills."""
    with gr.Row():
        loss = gr.LinePlot(
            x="step", y="loss", color="curve", color_title=" ", label="Loss", elem_id="loss"
        )
        settings = gr.Dataframe(
            headers=["setting", "value"],
            label="Settings",
            elem_id="settings",
            interactive=False,
            max_height=360,
        )
    gr.Markdown("### Samples during training")
    return [loss, settings, add_gallery("grids", columns=2)]


def load_run_history(run: Path | None) -> list[Any]:
    """Load a run's losses, settings and grids of samples; nothing for a pretrained model.

    Raises:
        UserError: its config.json cannot be read.
    """
    if run is None:
        return [None, None, None]
    settings = read_config(run)
    metrics_file = run / "metrics.jsonl"
    record = curves.read_metrics(metrics_file) if metrics_file.exists() else []
    names = [name for name in settings if settings[name] not in (None, "", [], ())]
    rows = [[name, format_setting(settings[name])] for name in sorted(names, key=setting_rank)]
    last = max((line["step"] for line in record), default=None)
    files = progress.thin_out(progress.find_grids(run / "samples", last), MAX_GRIDS)
    # Opened here, not passed as paths: the run's folder stays closed to visitors.
    images = [(Image.open(file), f"step {step}") for step, file in files]
    return [loss_table(record), rows, images]


def setting_rank(name: str) -> int:
    """Rank a setting for the table: `LEADING_SETTINGS` first, the others after them."""
    return LEADING_SETTINGS.index(name) if name in LEADING_SETTINGS else len(LEADING_SETTINGS)


def format_setting(value: Any) -> str:
    """Format a setting as one short line."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def loss_table(record: curves.Record) -> pd.DataFrame:
    """Collect the losses of a metrics.jsonl as points of two curves."""
    curve_names = {"loss": "training", "eval_loss": "evaluation"}
    points = [
        (line["step"], line[key], curve)
        for line in record
        for key, curve in curve_names.items()
        if line.get(key)
    ]
    return pd.DataFrame(points, columns=["step", "loss", "curve"])
