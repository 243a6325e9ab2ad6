"""A page in the browser to draw from trained models, and to look at their runs.

    python demo.py                                     # all of runs/
    python demo.py --run runs/digits
    python demo.py --pretrained facebook/DiT-XL-2-256

The page is for this machine alone unless --host or --share says otherwise. It asks the network for
nothing. Ctrl-C ends it.
"""

import os
import shutil
import signal
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from inference.app.service import ModelLibrary
from runtime import cli, parallel
from runtime.errors import UserError
from runtime.run_folder import RUNS


@dataclass(frozen=True)
class DemoConfig:
    """Open a page to draw from trained models.

    Args:
        run: one run's folder.
        runs: a folder of runs, among which a visitor chooses.
        pretrained: a published model in their place: an id of the hub, a folder or a file.
        vae: where the VAE of a model of latents is now, if it has moved.
        text_towers: where its text encoders are now, if they have moved.
        port: of the page; by default the first free one from 7860.
        host: who can open it: 127.0.0.1 is this machine, 0.0.0.0 everyone in its network.
        share: ask gradio.live for a public address too; needs the network.
    """

    run: Path | None = None
    runs: Path | None = None
    pretrained: str | None = None
    vae: str | None = None
    text_towers: tuple[str, ...] = ()
    port: int | None = None
    host: str = "127.0.0.1"
    share: bool = False


def check_flags(config: DemoConfig) -> None:
    """Refuse what cannot work before anything is loaded."""
    named = [n for n in ("run", "runs", "pretrained") if getattr(config, n) is not None]
    if len(named) > 1:
        raise UserError(f"--{named[0]} and --{named[1]} both say what to draw from; pass one")
    if config.port is not None and not 1 <= config.port <= 65535:
        raise UserError(f"--port {config.port}: must be in 1 … 65535")
    if (config.vae or config.text_towers) and not (config.run or config.pretrained):
        raise UserError("--vae and --text_towers are of one model: name it by --run")


def main(config: DemoConfig) -> None:
    """Open the page and wait for Ctrl-C, SIGTERM or the terminal's end."""
    check_flags(config)
    c = config
    files = Path(tempfile.mkdtemp(prefix="dit-demo-"))
    tempfile.tempdir = str(files)  # all that is temporary goes with it
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, lambda number, _: exit_now(number, files))
    try:
        page = import_page(files)
        parallel.enable_compilation_cache()
        models = ModelLibrary(c.run, c.runs or RUNS, c.pretrained, c.vae, c.text_towers)
        url = page.launch(page.build(models), port=c.port, host=c.host, share=c.share)
        print(f"the page: {url}   (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    finally:
        shutil.rmtree(files, ignore_errors=True)


def exit_now(number: int, files: Path) -> NoReturn:
    """As the signal would, without what visitors were sent. At once: an exit of the usual kind
    would wait for a thread that draws just now.
    """
    shutil.rmtree(files, ignore_errors=True)
    os._exit(128 + number)


def import_page(files: Path) -> ModuleType:
    """The module `page`. Gradio reads its settings when it is imported.

    Args:
        files: for pictures on their way to a visitor.

    Raises:
        UserError: Gradio is not installed.
    """
    os.environ |= {"GRADIO_TEMP_DIR": str(files / "sent"), "GRADIO_ANALYTICS_ENABLED": "False"}
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        from inference.app import page as app_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError(
            "the page is made by Gradio: .venv/bin/pip install --group demo"
        ) from None
    return app_page


if __name__ == "__main__":
    cli.run_command(lambda: main(cli.parse_flags(DemoConfig, shown_defaults={"runs": RUNS, "port": "the first free"})))
