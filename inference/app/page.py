"""The page of `demo.py`, in Gradio: fields, tabs, messages. What is drawn is in `studio.py`.

Each visitor sees what he asked for and nothing else: pictures travel as files of unguessable names
in a folder that goes with the process, and no state is shared but a model's weights.
"""

import json
import os
import random
import re
import tempfile
import traceback
from collections.abc import Iterator
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
from methods.ddpm import DDPM_SOLVERS
from runtime.errors import UserError
from runtime.run_folder import read_config
from sampling import SOLVERS

# One drawing at a time, whoever asked for it; the others wait in a queue that has an end.
DEVICE = {"concurrency_id": "device", "concurrency_limit": 1, "api_visibility": "private"}
BESIDE = {"concurrency_limit": 4, "api_visibility": "private", "show_progress": "hidden"}
MAX_QUEUED = 20
MAX_GRIDS = 24  # of samples over time
FILE_SECONDS = 3600  # how long a picture can be fetched again
# Sheets are wide, and thumbnails would be squares.
STYLE = "footer {display: none !important} #sheets button {aspect-ratio: auto !important}"
STYLE += ".grid-wrap {max-height: none !important}"  # all of a gallery is seen
SAFE: list[Any] = [
    "download",
    "fullscreen",
]  # of a picture's buttons; another would send it to a site
GALLERY: dict[str, Any] = {"show_label": False, "height": "auto", "object_fit": "contain"}
GALLERY |= {"format": "png", "buttons": SAFE, "interactive": False}
SHOWN = ("dataset_name", "model", "objective", "n_steps", "batch_size", "learning_rate", "seed")


def launch_page(page: gr.Blocks, *, port: int | None, host: str, share: bool) -> str:
    """Open it, and return its address.

    Raises:
        UserError: the port is taken, or the host is not this machine's, or it cannot be reached.
    """
    bypass_proxies(host)
    page.queue(max_size=MAX_QUEUED)
    how = {"footer_links": [], "ssr_mode": False, "css": STYLE, "enable_monitoring": False}
    how |= {"prevent_thread_lock": True, "quiet": True, "max_file_size": 0}
    try:
        _, local, public = page.launch(server_name=host, server_port=port, share=share, **how)
    except (OSError, ValueError, httpx.HTTPError) as error:
        where = f"{host}:{port}" if port else host
        raise UserError(f"no page can be opened at {where}: {error}") from None
    return public or local


def bypass_proxies(host: str) -> None:
    """Gradio looks whether its page is there: a proxy would look on another machine."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    past = ",".join(filter(None, (known, "localhost,127.0.0.1", host.strip("[]"))))
    os.environ |= {"no_proxy": past, "NO_PROXY": past}


@contextmanager
def show_errors() -> Iterator[None]:
    """Turns what goes wrong into a message in the page; a bug keeps its traceback, which the
    terminal shows.
    """
    try:
        yield
    except UserError as error:
        said = re.sub(r"--(?=\w)", "", str(error))  # here they are fields
        raise gr.Error(said, print_exception=False) from None
    except gr.Error:
        raise
    except Exception:
        traceback.print_exc()
        said = "something went wrong; the terminal that the page was started from shows what"
        raise gr.Error(said, print_exception=False) from None


def build_page(models: ModelLibrary) -> gr.Blocks:
    """The page."""
    names = models.names()
    with gr.Blocks(
        title="Diffusion transformers",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(FILE_SECONDS, FILE_SECONDS),
    ) as page:
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                model = gr.Dropdown(names, value=names[0], label="Model", elem_id="model")
                fields = add_request_fields()
            with gr.Column(scale=3):
                with gr.Tab("Draw"):
                    own = add_generate_tab(models, model, fields)
                with gr.Tab("Guidance × steps"):
                    add_comparison_tab(models, model, fields)
                with gr.Tab("The run"):
                    shown = add_run_tab()
        outputs = [*fields, *own]

        def choose(name: str) -> list[Any]:
            with show_errors():
                return fields_for_model(models.open(name))

        def look(name: str) -> list[Any]:
            with show_errors():
                return load_run_history(models.folder(name))

        def arrive() -> Any:
            return gr.update(choices=models.names())

        page.load(arrive, None, model, **BESIDE)
        for happens in (page.load, model.change):
            happens(choose, model, outputs, **BESIDE)
            happens(look, model, shown, **BESIDE)
    return page


# --- fields ---------------------------------------------------------------------------------------


def add_request_fields() -> list[Any]:
    """What all pictures depend on: `order` reads them in this order."""
    labels = gr.Dropdown([], label="Classes", multiselect=True, elem_id="labels", visible=False)
    prompt = gr.Textbox(label="Prompt", lines=3, elem_id="prompt", visible=False)
    negative = gr.Textbox(label="Away from", info="a caption", elem_id="negative", visible=False)
    solver = gr.Dropdown(list(SOLVERS), label="Sampler", elem_id="solver")
    with gr.Row():
        low = gr.Number(0, label="Guided from t", step=0.1, min_width=80, elem_id="low")
        high = gr.Number(1, label="to (1 is noise)", step=0.1, min_width=80, elem_id="high")
    seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
    another = gr.Button("Another seed", size="sm", elem_id="another")
    another.click(lambda: random.randrange(MAX_SEED), None, seed, **BESIDE)
    return [labels, prompt, negative, solver, low, high, seed]


def fields_for_model(drawable: TrainedModel) -> list[Any]:
    """The fields as they fit a model: of `subject_fields`, then guidance and steps."""
    model, settings = drawable.model, drawable.settings
    told = bool(model.text_width)
    names = [] if told else drawable.label_names or [str(i) for i in range(model.n_classes)]
    fitting = list(DDPM_SOLVERS if settings.get("prediction") else SOLVERS)
    words = gr.update(visible=True) if told else gr.update(visible=False, value="")
    return [
        gr.update(choices=names, value=[], visible=bool(names), info="all, if none is chosen"),
        words,
        words,
        gr.update(choices=fitting, value=settings["solver"]),
        *(gr.skip() for _ in range(3)),
        settings["cfg_scale"],
        settings["n_sample_steps"],
    ]


def read_job(values: tuple[Any, ...], **more: Any) -> SampleJob:
    """What the fields of `subject_fields` say, and more.

    Raises:
        UserError: a number is missing.
    """
    labels, prompt, negative, solver, low, high, seed = values
    low, high = (0 if low is None else low), (1 if high is None else high)
    for name, value in {"seed": seed, "number of pictures": more.get("n", 1)}.items():
        if value is None:
            raise UserError(f"the {name} is missing")
    return SampleJob(
        labels=tuple(labels or ()),
        prompt=prompt or "",
        negative_prompt=negative or "",
        solver=solver,
        interval=(low, high),
        seed=int(seed),
        **more,
    )


# --- tabs -----------------------------------------------------------------------------------------


def add_generate_tab(models: ModelLibrary, model: gr.Dropdown, fields: list[Any]) -> list[Any]:
    """Pictures, and their way from noise. Returns the fields for guidance and steps."""
    with gr.Row():
        n = gr.Number(16, label="Pictures", precision=0, elem_id="n", info=f"1 … {MAX_IMAGES}")
        steps = gr.Number(label="Steps", precision=0, elem_id="steps", info="of the sampler")
        scale = gr.Number(label="Guidance", elem_id="scale", step=0.5, info="1 is none")
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", elem_id="draw")
        animate = gr.Button("Show the way from noise", elem_id="animate")
    gallery = gr.Gallery(columns=6, elem_id="pictures", **GALLERY)
    movie = gr.Image(
        label="The way from noise", visible=False, buttons=SAFE, interactive=False, elem_id="way"
    )

    def on_draw(name: str, n: int | None, steps: int | None, scale: float | None, *values: Any):
        with show_errors():
            asked, shown = read_job(values, n=n, n_steps=steps, cfg_scale=scale), []
            for pictures in service.run_job(models.keep(name), asked):
                shown += pictures
                yield shown

    def on_animate(name: str, n: int | None, steps: int | None, scale: float | None, *values: Any):
        with show_errors():
            asked = read_job(values, n=n, n_steps=steps, cfg_scale=scale)
            frames = service.sample_trajectory_frames(models.keep(name), asked)
            # Gradio takes a copy before this goes on.
            with tempfile.TemporaryDirectory() as folder:
                grids.save_gif(frames, Path(folder) / "way.gif")
                yield gr.update(value=str(Path(folder) / "way.gif"), visible=True)

    inputs = [model, n, steps, scale, *fields]
    draw.click(on_draw, inputs, gallery, **DEVICE)
    animate.click(on_animate, inputs, movie, show_progress_on=gallery, **DEVICE)
    return [scale, steps]


def add_comparison_tab(models: ModelLibrary, model: gr.Dropdown, fields: list[Any]) -> None:
    """A picture for each scale of guidance and number of steps."""
    with gr.Row():
        scales = gr.Textbox("1 2 4 8", label="Guidance (rows)", elem_id="scales")
        steps = gr.Textbox("2 5 10 25", label="Steps (columns)", elem_id="columns")
    fill = gr.Button("Fill the table", variant="primary", elem_id="fill")
    sheet = gr.Image(
        label="From the same noise", format="png", buttons=SAFE, interactive=False, elem_id="table"
    )

    def on_fill(name: str, scales: str, steps: str, *values: Any):
        with show_errors():
            wanted = parse_numbers(scales, float), parse_numbers(steps, int)
            yield from service.sample_comparison_grid(models.keep(name), read_job(values), *wanted)

    fill.click(on_fill, [model, scales, steps, *fields], sheet, **DEVICE)


def parse_numbers(words: str, kind: type) -> list[Any]:
    """The numbers in a line, between spaces or commas.

    Raises:
        UserError: one is none.
    """
    try:
        return [kind(word) for word in re.split(r"[\s,;]+", words.strip()) if word]
    except ValueError:
        said = "whole numbers" if kind is int else "numbers"
        raise UserError(f"'{words[:40]}': write {said}, with spaces between them") from None


# --- the run itself -------------------------------------------------------------------------------


def add_run_tab() -> list[Any]:
    """Where `history` goes."""
    with gr.Row():
        loss = gr.LinePlot(
            x="step", y="loss", color="of", color_title=" ", label="Loss", elem_id="loss"
        )
        told = {"headers": ["setting", "value"], "interactive": False, "max_height": 360}
        settings = gr.Dataframe(elem_id="settings", label="Settings", **told)
    gr.Markdown("Samples over time")
    sheets = gr.Gallery(columns=2, elem_id="sheets", **GALLERY)
    return [loss, settings, sheets]


def load_run_history(run: Path | None) -> list[Any]:
    """A run's curves, settings and samples; nothing for a model without one.

    Raises:
        UserError: its settings cannot be read.
    """
    if run is None:
        return [None, None, None]
    settings, file = read_config(run), run / "metrics.jsonl"
    record = curves.read_metrics(file) if file.exists() else []
    said = [name for name in settings if settings[name] not in (None, "", [], ())]
    rows = [[name, format_setting(settings[name])] for name in sorted(said, key=setting_rank)]
    last = max((line["step"] for line in record), default=None)
    sheets = progress.thin_out(progress.find_grids(run / "samples", last), MAX_GRIDS)
    # As pictures, not as paths: the run's folder stays closed to visitors.
    return [loss_table(record), rows, [(Image.open(file), f"step {step}") for step, file in sheets]]


def setting_rank(setting: str) -> int:
    """Of a setting: those that tell most come first."""
    return SHOWN.index(setting) if setting in SHOWN else len(SHOWN)


def format_setting(value: Any) -> str:
    """A setting in one short line."""
    words = value if isinstance(value, str) else json.dumps(value)
    return words if len(words) <= 80 else f"{words[:80]}…"


def loss_table(record: curves.Record) -> pd.DataFrame:
    """Those of a metrics.jsonl."""
    names = {"loss": "training", "eval_loss": "evaluation"}
    points = [
        (line["step"], line[n], of) for line in record for n, of in names.items() if line.get(n)
    ]
    return pd.DataFrame(points, columns=["step", "loss", "of"])
