"""Run the notebook in a clean kernel and keep what it shows: `python docs/renew_quickstart.py`.

Or another notebook, in a folder, into a file: `python docs/renew_quickstart.py SOURCE FOLDER TARGET`. A
cell that ends in an error is kept too; whether there is one is for a test to say.
"""

import sys
from pathlib import Path

import nbclient
import nbformat

QUICKSTART = Path(__file__).parent / "quickstart.ipynb"


def renew(source: Path, folder: Path, target: Path) -> None:
    """Without what differs from one time to the next, or is there twice."""
    notebook = nbformat.read(source, 4)
    how = {"timeout": 600, "kernel_name": "python3", "record_timing": False, "allow_errors": True}
    nbclient.NotebookClient(
        notebook, resources={"metadata": {"path": str(folder)}}, **how
    ).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # not which one
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/jpeg", None)  # of Pillow's, which also gives a PNG
    nbformat.write(notebook, target)


if __name__ == "__main__":
    renew(*map(Path, sys.argv[1:] or (QUICKSTART, QUICKSTART.parent, QUICKSTART)))
