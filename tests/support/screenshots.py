"""The screenshots in README.md: python tests/support/screenshots.py --run runs/digits-…"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from browser import Visitor, open_browser  # noqa: E402
from PIL import Image  # noqa: E402

from runtime import cli  # noqa: E402
from runtime.flags import flag, required  # noqa: E402


@dataclass(frozen=True)
class ScreenshotConfig:
    """Take screenshots of the page."""

    run: Path = required("the run to show, of the digits")
    out: Path = flag(
        ROOT / "docs/images",
        "the folder for demo-generate.png, demo-comparison.png and demo-run.png",
    )


def main(config: ScreenshotConfig) -> None:
    """Open the page, use it, and photograph each tab."""
    command = [sys.executable, "demo.py", "--run", str(config.run.absolute())]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        url = re.findall(r"http://\S+", process.stdout.readline())[0]
        with open_browser((1200, 1100)) as driver:
            visit_tabs(Visitor(driver, url), config.out)
    finally:
        process.terminate()


def visit_tabs(visitor: Visitor, out: Path) -> None:
    visitor.write("n", 20)
    visitor.write("scale", 2)
    visitor.click("generate")
    visitor.wait_for_images("images", 20)
    visitor.wait(visitor.is_settled)
    save_screenshot(visitor, out / "demo-generate.png", 880)
    visitor.choose("labels", "3")
    visitor.open_tab("Guidance × steps")
    visitor.write("columns", "1 2 3 5 10 25 50")
    visitor.click("compare")
    visitor.wait(lambda: visitor.find("#comparison img"))
    visitor.wait(visitor.is_settled)
    save_screenshot(visitor, out / "demo-comparison.png", 670)
    visitor.open_tab("Run")
    visitor.wait(lambda: len(visitor.find("#grids img")) > 1)
    visitor.wait(visitor.is_settled)
    save_screenshot(visitor, out / "demo-run.png", 900)


def save_screenshot(visitor: Visitor, path: Path, height: int) -> None:
    """Save the upper part of the window, in few colours to keep the file small."""
    visitor.driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    visitor.driver.save_screenshot(str(path))
    with Image.open(path) as screenshot:
        upper = screenshot.convert("RGB").crop((0, 0, screenshot.width, height))
    upper.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    cli.run_command(lambda: main(cli.parse_flags(ScreenshotConfig)))
