"""Inputs and helpers shared by the tests of inference.curves."""

import json

from PIL import Image

LINES: list[dict] = [
    {"step": 5, "loss": 1.5, "learning_rate": 1e-3, "loss_by_t": [2.0, None, 1.0]},
    {"step": 6, "eval_loss": 1.4},
    {"step": 10, "loss": 0.5, "learning_rate": 5e-4, "loss_by_t": [1.0, 0.5, 0.25]},
    {"step": 15, "loss": None, "learning_rate": 0.0, "loss_by_t": [None, None, None]},
]


def record(folder, lines=LINES, end=""):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + end)
    return folder


# --- grids of samples -----------------------------------------------------------------------------


def write_grids(folder, *names, size=(40, 30)):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", size, (0, 0, 50 * i)).save(folder / name)
    return folder
