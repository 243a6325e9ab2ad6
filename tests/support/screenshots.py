"""The pictures of the page in README.md: python tests/screenshots.py --run runs/digits-…"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from browser import Visitor, browser  # noqa: E402
from PIL import Image  # noqa: E402

from runtime import cli  # noqa: E402


@dataclass(frozen=True)
class ScreenshotConfig:
    """Photograph the page.

    Args:
        run: what it shows, a run on the digits.
        out: the folder of demo-draw.png, demo-table.png and demo-run.png.
    """

    run: Path
    out: Path = ROOT / "docs/images"


def main(config: ScreenshotConfig) -> None:
    """Open the page, use it, and keep what it looks like."""
    command = [sys.executable, "demo.py", "--run", str(config.run.absolute())]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        url = re.findall(r"http://\S+", process.stdout.readline())[0]
        with browser((1200, 1000)) as driver:
            visit(Visitor(driver, url), config.out)
    finally:
        process.terminate()


def visit(visitor: Visitor, out: Path) -> None:
    """Each tab in turn."""
    visitor.write("n", 20)
    visitor.write("scale", 2)
    visitor.click("draw")
    visitor.all_of("pictures", 20)
    keep(visitor, out / "demo-draw.png", 826)
    visitor.choose("labels", "3")
    visitor.tab("Guidance × steps")
    visitor.write("columns", "1 2 3 5 10 25 50")
    visitor.click("fill")
    visitor.wait(lambda: visitor.find("#table img"))
    visitor.wait(visitor.settled)
    keep(visitor, out / "demo-table.png", 590)
    visitor.tab("The run")
    visitor.wait(lambda: len(visitor.find("#sheets img")) > 1)
    visitor.wait(visitor.settled)
    keep(visitor, out / "demo-run.png", 826)


def keep(visitor: Visitor, path: Path, height: int) -> None:
    """The upper part of what is seen, in few colours: a file for a page."""
    visitor.driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    visitor.driver.save_screenshot(str(path))
    with Image.open(path) as found:
        small = (
            found.convert("RGB")
            .crop((0, 0, found.width, height))
            .quantize(128, dither=Image.Dither.NONE)
        )
    small.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    cli.run_command(lambda: main(cli.parse_flags(ScreenshotConfig)))
