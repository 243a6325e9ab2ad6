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
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from inference.app.service import ModelLibrary
from runtime import cli, parallel, processes
from runtime.errors import UserError
from runtime.flags import Derived, check_values, flag
from runtime.run_folder import RUNS
from training.flag_groups import MovedFlags, SourceFlags


@dataclass(frozen=True, kw_only=True)
class LibraryFlags(SourceFlags):
    """Model."""

    runs: Path | None = flag(Derived(RUNS), "a folder of runs; the page offers them all")


@dataclass(frozen=True, kw_only=True)
class PageFlags:
    """Page."""

    port: int | None = flag(
        Derived("the first free one from 7860"), "port of the page", at_least=1, at_most=65535
    )
    host: str = flag(
        "127.0.0.1",
        "who can open the page: 127.0.0.1 this machine only, 0.0.0.0 its whole network",
    )
    share: bool = flag(False, "also request a public address from gradio.live; needs the network")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(LibraryFlags, MovedFlags, PageFlags):
    """Open a web page to sample from trained models."""


def main(config: DemoConfig) -> None:
    """Open the page and wait for Ctrl-C, SIGTERM or SIGHUP."""
    check_flags(config)
    processes.start_backend()
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
        while True:  # a signal that another thread receives does not wake this one
            time.sleep(0.5)
    finally:
        shutil.rmtree(files, ignore_errors=True)


def check_flags(config: DemoConfig) -> None:
    """Raise UserError for flags that cannot work, before anything is loaded."""
    sources = [n for n in ("run", "runs", "pretrained") if getattr(config, n) is not None]
    if len(sources) > 1:
        raise UserError(f"--{sources[0]} and --{sources[1]} are mutually exclusive")
    check_values(config, vars(config))
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
    cli.run_command(lambda: main(cli.parse_flags(DemoConfig)))
