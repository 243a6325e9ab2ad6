"""Imports point down, devices are known in one place, and importing does nothing else."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module imports from lower ranks only, and from the neighbours named below.
RANKS = {
    **dict.fromkeys(("errors", "diffusion"), -1),
    **dict.fromkeys(("cli", "images", "layers", "objectives", "sampling", "parallel", "optim"), 0),
    **dict.fromkeys(("datasets_config", "interrupts", "run_folder", "text", "workers"), 0),
    **dict.fromkeys(("processes", "lanes", "streams", "latents"), 0),
    **dict.fromkeys(("vae.losses", "pretrained.torch_file", "metrics.fid", "metrics.inception"), 0),
    **dict.fromkeys(("captions", "model", "sources", "pipeline", "tracking", "profiling"), 1),
    **dict.fromkeys(("curves", "film", "weights_and_biases"), 1),
    **dict.fromkeys(("vae.autoencoder", "pretrained.weights", "pretrained.loose"), 1),
    "metrics.reference": 1,
    **dict.fromkeys(("checkpoint", "train_config", "showcase", "resident", "scaling"), 2),
    "train_state": 2,
    **dict.fromkeys(("pretrained.autoencoder", "pretrained.lpips", "pretrained.inception"), 2),
    **dict.fromkeys(("pretrained.dit", "pretrained.sd3", "pretrained.transformer"), 2),
    "metrics.pictures": 2,
    "metrics.extraction": 3,
    **dict.fromkeys(("codec", "doctor", "drawing", "open_run", "train_vae_config"), 3),
    "yardstick": 3,
    **dict.fromkeys(("convert_imagenet", "drawable", "range_test", "train_profile"), 4),
    **dict.fromkeys(("export", "subjects", "warm_start"), 5),
    **dict.fromkeys(("drawn", "sheets", "train"), 6),
    **dict.fromkeys(("evaluate", "generate_config", "studio", "train_vae"), 7),
    **dict.fromkeys(("figures", "generate", "page"), 8),
    "demo": 9,
}
NEIGHBOURS = {
    ("pipeline", "captions"),
    ("pipeline", "sources"),
    ("drawing", "codec"),
    ("doctor", "codec"),
    ("pretrained.transformer", "pretrained.autoencoder"),
    ("pretrained.transformer", "pretrained.dit"),
    ("pretrained.transformer", "pretrained.sd3"),
}
NEIGHBOURS |= {("train", "train_profile"), ("yardstick", "metrics.extraction")}
WINGS = ("metrics", "pretrained", "vae")
FILES = {path.stem: path for path in sorted(ROOT.glob("*.py"))} | {
    f"{wing}.{path.stem}": path
    for wing in WINGS
    for path in sorted((ROOT / wing).glob("*.py"))
    if path.stem != "__init__"
}
SHADOWS = {"datasets", "types", "math", "random", "logging", "profile"}
DRAWERS = {"utils", "common", "helpers"}
REQUIRED = [
    re.split(r"[<>=\[ ]", line)[0].replace("-", "_")
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def imports(path):
    """Every module that is imported when the code runs, also inside functions, by whole name and
    by first part; not what only a type checker sees.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (part for name in node.names for part in (name.name, top(name.name)))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from (module, top(module), *(f"{module}.{name.name}" for name in node.names))


def top(module):
    return module.partition(".")[0]


def test_every_module_has_a_rank():
    assert set(FILES) == set(RANKS)


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    up = {
        other
        for other in imports(FILES[name])
        if other in RANKS and RANKS[other] >= RANKS[name] and (name, other) not in NEIGHBOURS
    }
    assert up == set()


@pytest.mark.parametrize(
    "name", ["diffusion", "sampling", "objectives", "parallel", "layers", "optim"]
)
def test_the_method_can_be_lifted_into_another_project(name):
    """Alone, or with the arithmetic of diffusion."""
    assert set(imports(FILES[name])) & set(RANKS) <= {"diffusion"} - {name}


@pytest.mark.parametrize(
    "name",
    (
        *("datasets_config", "sources", "streams", "lanes", "pipeline", "workers", "latents"),
        *("images", "tracking", "text", "captions", "metrics.pictures", "curves", "film"),
        "weights_and_biases",
    ),
)
def test_data_and_pictures_know_nothing_of_jax(name):
    assert not set(imports(FILES[name])) & {"jax", "flax", "optax", "model", "layers"}


@pytest.mark.parametrize("word", ["shard_map", "PartitionSpec", "NamedSharding", r"Mesh\("])
def test_sharding_is_spoken_of_in_one_file(word):
    speaking = {name for name, path in FILES.items() if re.search(word, path.read_text())}
    assert speaking <= {"parallel"}


def test_no_module_shadows_a_library_or_is_a_drawer():
    assert not {name.rpartition(".")[2] for name in FILES} & (SHADOWS | DRAWERS)
    # What lies in this folder is found before what is installed.
    assert not set(map(top, FILES)) & (set(sys.stdlib_module_names) | set(REQUIRED))


IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
import jax
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a backend was started"
assert jax.config.jax_compilation_cache_dir is None, "a compilation cache was set"
assert not jax.config.jax_enable_x64
"""


def test_importing_prints_nothing_and_touches_no_device():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA"))}
    command = [sys.executable, "-c", IMPORT_ALL, *FILES]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


def test_every_name_is_defined():
    """Ruff and pyright do not look, because the shapes of jaxtyping are strings that look like
    names: those are left out here.
    """
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821"]
    command += ["--output-format", "json", "."]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout)
    undefined = []
    for problem in found:
        place, name = problem["location"], problem["message"].split("`")[1]
        line = Path(problem["filename"]).read_text().splitlines()[place["row"] - 1]
        if not re.search(rf'\[[^\]]*"[^"]*\b{name}\b[^"]*"\]', line):
            undefined.append((problem["filename"], place["row"], name))
    assert undefined == []
