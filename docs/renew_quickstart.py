"""Run the notebook in a clean kernel and save its outputs: `python docs/renew_quickstart.py`.

To run another notebook, in a folder, into a file: `python docs/renew_quickstart.py SOURCE FOLDER
TARGET`. A cell that ends in an error is saved too; a test checks that there is none.
"""

import sys
from pathlib import Path

import nbclient
import nbformat

QUICKSTART = Path(__file__).parent / "quickstart.ipynb"


def renew(source: Path, folder: Path, target: Path) -> None:
    """Run a notebook, and save it without outputs that vary from run to run or are duplicates."""
    notebook = nbformat.read(source, 4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}  # without the version
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/jpeg", None)  # Pillow also gives a PNG
    nbformat.write(notebook, target)


if __name__ == "__main__":
    renew(*map(Path, sys.argv[1:] or (QUICKSTART, QUICKSTART.parent, QUICKSTART)))
