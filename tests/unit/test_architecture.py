"""Imports point down, devices are known in one place, and importing does nothing else."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A room imports from the floors below its own and from itself. Benchmarks and tests stand outside.
FLOORS = (
    ("runtime",),
    ("datasets_config",),
    ("networks", "sampling", "data"),
    ("model", "methods"),
    ("pretrained",),
    ("evaluation",),
    ("inference",),
    ("training",),
    ("train", "generate", "evaluate", "figures", "export", "demo", "convert_imagenet", "train_vae"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
COMMANDS = FLOORS[-1]
OUTSIDE = ("benchmarks", "tests", "docs", ".venv", "runs")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] not in OUTSIDE
    and path.stem != "__init__"
    and "digits" not in path.parts
}
ENTRIES = 27
# Words that a reader of DiT or SD3 would have to translate, and names with them that are on disk.
PRIVATE_WORDS = (r"\b_*told", r"\b_*said\b", "unsaid", "picture", "tower")
ON_DISK = ("text_towers", "towers.json", '"pictures"', "['pictures']")
ON_DISK += ("self.picture", '"picture"', '"picture.')  # weights of an MMDiT's image stream
SHADOWS = {"datasets", "types", "math", "random", "logging", "profile"}
DRAWERS = {"utils", "common", "helpers"}
REQUIRED = [
    re.split(r"[<>=\[ ]", line)[0].replace("-", "_")
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
SHARDING = ("shard_map", "PartitionSpec", "NamedSharding", r"Mesh\(")
DEVICES = r"jax\.(devices|device_count|default_backend|process_index|process_count)\("


def imports(path):
    """Every module that a file imports, inside functions and for type checkers too, by its whole
    name and by its room.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (part for name in node.names for part in (name.name, room(name.name)))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from (module, room(module), *(f"{module}.{name.name}" for name in node.names))


def room(module):
    return module.partition(".")[0]


def test_every_room_has_a_floor():
    assert {room(name) for name in FILES} == set(FLOOR_OF)


def test_the_root_is_read_at_a_glance():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    assert len([name for name in names if not name.startswith(".")]) <= ENTRIES


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    own = room(name)
    up = {
        other
        for other in imports(FILES[name])
        if room(other) in FLOOR_OF
        and (FLOOR_OF[room(other)] >= FLOOR_OF[own] or room(other) in COMMANDS)
        and (room(other) != own or own in COMMANDS)
    }
    assert up == set()


def test_no_modules_import_each_other():
    """Not even for types: a circle is one module in two files."""
    below = {name: set(imports(path)) & set(FILES) - {name} for name, path in FILES.items()}
    while ready := {name for name, others in below.items() if not others & set(below)}:
        for name in ready:
            del below[name]
    assert below == {}


def test_data_and_records_know_nothing_of_jax():
    without = {"inference.curves", "inference.progress", "training.tracking", "training.wandb_sink"}
    found = {
        name: set(map(room, imports(path))) & {"jax", "flax", "optax", "model", "networks"}
        for name, path in FILES.items()
        if room(name) == "data" or name in without
    }
    assert {name: libraries for name, libraries in found.items() if libraries} == {}


METHOD_NEEDS = {"methods.method", "sampling", "runtime.flags", "runtime.errors"}


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("sampling", set()),
        ("methods.method", METHOD_NEEDS),
        ("methods.rectified_flow", METHOD_NEEDS),
        ("methods.ddpm", METHOD_NEEDS),
        ("runtime.flags", {"runtime.errors"}),
        ("networks.ops", set()),
        ("networks.layers", {"networks.ops"}),
        ("training.optim", set()),
        ("runtime.parallel", set()),
    ],
)
def test_the_method_can_be_lifted_into_another_project(name, others):
    assert set(imports(FILES[name])) & set(FILES) <= others


@pytest.mark.parametrize("word", SHARDING)
def test_sharding_is_spoken_of_in_one_file(word):
    speaking = {name for name, path in FILES.items() if re.search(word, path.read_text())}
    assert speaking <= {"runtime.parallel"}


@pytest.mark.parametrize("name", FILES)
def test_docstrings_open_with_a_verb_or_a_noun(name):
    """Not with a question word, which leaves the reader to build the sentence."""
    opening = re.compile(r"(What|Of|How|Where|Whether|That|Which|When|Who|Why)\b")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [
        node for node in ast.walk(ast.parse(FILES[name].read_text())) if isinstance(node, kinds)
    ]
    texts = [text for node in nodes if (text := ast.get_docstring(node))]
    assert [text for text in texts if opening.match(text)] == []


@pytest.mark.parametrize("name", FILES)
def test_words_are_the_fields_own(name):
    """Flags and keys that people have on disk keep their names."""
    text = FILES[name].read_text()
    for key in ON_DISK:
        text = text.replace(key, "")
    assert re.findall(rf"(?i)\b\w*(?:{'|'.join(PRIVATE_WORDS)})\w*\b", text) == []


def test_devices_are_asked_for_in_one_place():
    """Attention asks for itself, so that it can be lifted into another project."""
    asking = {name for name, path in FILES.items() if re.search(DEVICES, path.read_text())}
    assert asking <= {"runtime.parallel", "runtime.processes", "networks.ops"}


def test_no_module_shadows_a_library_or_is_a_drawer():
    assert not {name.rpartition(".")[2] for name in FILES} & (SHADOWS | DRAWERS)
    # What lies in this folder is found before what is installed.
    assert not set(map(room, FILES)) & (set(sys.stdlib_module_names) | set(REQUIRED))


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


TESTS = ROOT / "tests"
PLACES = ("unit", "run", "system", "support")


def test_every_test_is_in_make_test_or_in_make_proofs():
    """`make test` is tests/unit and the golden path, `make proofs` all other tests."""
    makefile = (ROOT / "Makefile").read_text()
    assert "tests/unit tests/system/test_golden_path.py" in makefile
    assert "tests/run tests/system --ignore tests/system/test_golden_path.py" in makefile
    places = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}
    assert places == {"unit", "run", "system"}
    assert {path.name for path in TESTS.iterdir() if path.is_dir()} - {"__pycache__"} == set(PLACES)
    stems = [path.stem for path in TESTS.rglob("test_*.py")]
    assert len(stems) == len(set(stems)), "pytest would take one for the other"


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.name)
def test_no_test_module_imports_another(path):
    assert [name for name in imports(path) if re.match(r"(tests\.)?(\w+\.)*test_", name)] == []


@pytest.mark.parametrize("path", sorted((TESTS / "unit").rglob("*.py")), ids=lambda path: path.name)
def test_a_unit_test_starts_no_process_and_no_run(path):
    if path.stem in ("test_architecture", "test_pages"):  # they ask git and ruff
        return
    text = path.read_text()
    assert not re.search(
        r"\bsubprocess\b|\bfrom commands import .*\b(run|start|convert)\b|\.fit\(", text
    )
