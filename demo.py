"""A web page to sample from trained models and to look at their runs.

    python demo.py                                     # every run in runs/
    python demo.py --run runs/digits
    python demo.py --pretrained facebook/DiT-XL-2-256

Only this machine can open the page unless --host or --share says otherwise. The page makes no
requests to other sites. Ctrl-C ends it.
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
    """Open a web page to sample from trained models.

    Args:
        run: a run's folder.
        runs: a folder of runs; the page offers them all.
        pretrained: a published model instead: an id on the hub, a folder or a file.
        vae: where the VAE of a latent model is now, if it has moved.
        text_towers: where its text encoders are now, if they have moved.
        port: port of the page; defaults to the first free one from 7860.
        host: who can open the page: 127.0.0.1 this machine only, 0.0.0.0 its whole network.
        share: also request a public address from gradio.live; needs the network.
    """

    run: Path | None = None
    runs: Path | None = None
    pretrained: str | None = None
    vae: str | None = None
    text_towers: tuple[str, ...] = ()
    port: int | None = None
    host: str = "127.0.0.1"
    share: bool = False


def main(config: DemoConfig) -> None:
    """Open the page and wait for Ctrl-C, SIGTERM or SIGHUP."""
    check_flags(config)
    files = Path(tempfile.mkdtemp(prefix="dit-demo-"))
    tempfile.tempdir = str(files)  # every temporary file of this process is removed with the folder
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, lambda number, _: exit_now(number, files))
    try:
        page = import_page(files)
        parallel.enable_compilation_cache()
        models = ModelLibrary(
            run=config.run,
            runs=config.runs or RUNS,
            pretrained=config.pretrained,
            vae=config.vae,
            text_encoders=config.text_towers,
        )
        url = page.launch_page(
            page.build_page(models), port=config.port, host=config.host, share=config.share
        )
        print(f"page: {url}   (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    finally:
        shutil.rmtree(files, ignore_errors=True)


def check_flags(config: DemoConfig) -> None:
    """Raise UserError for flags that cannot work, before anything is loaded."""
    sources = [n for n in ("run", "runs", "pretrained") if getattr(config, n) is not None]
    if len(sources) > 1:
        raise UserError(f"--{sources[0]} and --{sources[1]} are mutually exclusive")
    if config.port is not None and not 1 <= config.port <= 65535:
        raise UserError(f"--port {config.port}: must be in 1 … 65535")
    if (config.vae or config.text_towers) and not (config.run or config.pretrained):
        raise UserError("--vae and --text_towers belong to one model: name it by --run")


def exit_now(number: int, files: Path) -> NoReturn:
    """Remove the temporary files and exit with a signal's status.

    Does not go through `sys.exit`, which would wait for the thread that is sampling.
    """
    shutil.rmtree(files, ignore_errors=True)
    os._exit(128 + number)


def import_page(files: Path) -> ModuleType:
    """Import `inference.app.page`. Gradio reads its environment at import.

    Args:
        files: folder for images on their way to a visitor.

    Raises:
        UserError: Gradio is not installed.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(files / "sent")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        from inference.app import page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the page needs Gradio: .venv/bin/pip install --group demo") from None
    return page


if __name__ == "__main__":
    help_defaults = {"runs": RUNS, "port": "the first free"}
    cli.run_command(lambda: main(cli.parse_flags(DemoConfig, shown_defaults=help_defaults)))
