"""The notebook runs from a clean kernel, and its outputs for GitHub are there. Kernels hear of
mistakes and interruptions in a line.
"""

import json
import re

import nbformat
import pytest
from commands import ROOT, run

PATH = ROOT / "docs" / "quickstart.ipynb"
MOST_BYTES = 600_000


def execute(notebook, folder, cache, **how):
    """The notebook after a clean kernel in `folder` has run it, errors and all."""
    source, target = folder / "source.ipynb", folder / "target.ipynb"
    nbformat.write(notebook, source)
    done = run("docs/renew_quickstart.py", source, folder, target, cache=cache, **how)
    assert done.returncode == 0, done.stderr
    return nbformat.read(target, 4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def images(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def failures(notebook):
    return ["\n".join(o.traceback) for o in outputs(notebook) if o.output_type == "error"]


@pytest.fixture
def clone(tmp_path):
    """A folder like a fresh clone, which runs may be written to."""
    for path in ROOT.iterdir():
        if path.name not in ("docs", "runs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs").mkdir()
    return tmp_path


def test_what_is_committed_was_run_in_order_and_went_well():
    notebook, text = nbformat.read(PATH, 4), PATH.read_text()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert failures(notebook) == [] and images(notebook) >= 4
    assert len(text) < MOST_BYTES
    for private in ("/work", "/root", "/home", "/tmp", "/Users"):
        assert private not in json.dumps([cell.source for cell in code] + outputs(notebook))
    assert not [o for o in outputs(notebook) if o.get("name") == "stderr"]


@pytest.mark.slow
def test_the_notebook_runs_from_a_clean_kernel(clone, cache):
    """Its trainings are cut short, and its networks are tiny."""
    committed = nbformat.read(PATH, 4)
    for cell in committed.cells:
        cell.source = re.sub(r"n_steps=[1-9]\d\d\b", "n_steps=60", cell.source)
        cell.source = cell.source.replace("DiT-Ti/4", "DiT-Nano/4")
    first = next(cell for cell in committed.cells if cell.cell_type == "code")
    first.source += "\nsys.path.append('../tests/support')\nimport nano"
    ran = execute(committed, clone / "docs", cache)
    assert failures(ran) == []
    assert images(ran) == images(committed)
    assert len(outputs(ran)) == len(outputs(committed))


CELLS = {
    "mistake": "from runtime.errors import UserError\nraise UserError('no such thing')",
    "failed": "from runtime.errors import RunError\nraise RunError('it burst')",
    "interrupted": """
import os, signal
from runtime.signals import catch_stop_signals

before = signal.getsignal(signal.SIGINT)
with catch_stop_signals() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    print("the step is finished")
stop.raise_exit()
""",
    "after": "print(signal.getsignal(signal.SIGINT) == before)",
}


@pytest.mark.slow
def test_a_kernel_shows_a_mistake_in_one_line(tmp_path, cache):
    """And its own handler of interruptions is back."""
    start = f"import sys\nsys.path.insert(0, {str(ROOT)!r})"
    cells = [nbformat.v4.new_code_cell(source) for source in (start, *CELLS.values())]
    ran = execute(nbformat.v4.new_notebook(cells=cells), tmp_path, cache)
    assert failures(ran) == [
        "error: no such thing",
        "error: it burst",
        "stopped, and all is saved; fit() resumes from here",
    ]
    printed = "".join(o.text for o in outputs(ran) if o.get("name") == "stdout")
    assert "the step is finished" in printed and printed.endswith("True\n")
