"""The pages keep their word: recipes run, commands have flags that exist, links lead somewhere."""

import ast
import importlib
import math
import re
import runpy
import shlex
import subprocess
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import ROOT
from datasets import ClassLabel, Dataset, Features, Image
from flax import nnx
from model_cases import TINY, build_with_params, label, t, with_random_weights, x
from pages import PAGES, RECIPES, recipe, run_recipe

import datasets_config
import model
import sampling
from data.load import open_dataset
from methods import rectified_flow, registry
from networks.layers import unpatchify
from runtime import cli, parallel

MAX_LINES = 8  # of a recipe
MAX_README_BYTES, MAX_README_LINES = 9 * 1024, 150
TEXT = "\n".join(PAGES.values())
TEXT_OF_COMMANDS = "\n".join(
    text for path, text in PAGES.items() if path.name not in ("results.md", "scaling.md")
)


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short(name):
    assert sum(bool(line.strip()) for line in recipe(name).splitlines()) <= MAX_LINES


def test_a_dataset_is_opened_by_its_entry(tmp_path, monkeypatch):
    entry = eval(recipe("A dataset"), dict(vars(datasets_config)))
    monkeypatch.setitem(datasets_config.DATASET_CONFIGS, entry.name, entry)
    breeds = ClassLabel(names=[f"breed {i}" for i in range(entry.n_classes)])
    images = [{"bytes": (ROOT / "docs/images/samples.png").read_bytes(), "path": None}] * 12
    columns = {entry.image_column: images, entry.label_column: list(range(12))}
    features = Features({entry.image_column: Image(), entry.label_column: breeds})
    for split in ("train", "test"):
        data = Dataset.from_dict(columns, features=features)
        data.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")

    source = open_dataset(entry.name, data_dir=tmp_path)
    assert source.config.n_classes == entry.n_classes
    assert source.train.decode(np.arange(2)).shape == (2, entry.image_size, entry.image_size, 3)
    assert entry.model in model.MODELS


def test_a_method_is_what_it_says(monkeypatch):
    """Of a model that says 0, Huber's loss of the velocity itself."""
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    robust = run_recipe("A method", rectified_flow, registry, optax=optax)["Robust"]
    assert registry.METHODS["robust"] is robust
    image = jax.random.randint(jax.random.key(0), (64, 8, 8, 1), 0, 256).astype(jnp.uint8)
    batch = SimpleNamespace(row=jnp.arange(64), image=image, label=jnp.zeros(64, int))
    seen = []

    def says_nothing(x, t, label):
        seen.append((t, label))
        return jnp.zeros_like(x)

    says_nothing.config = SimpleNamespace(n_classes=10)
    key = jax.random.key(1)
    found, _ = robust().loss(says_nothing, batch, key, label_dropout=0.1)
    rows = rectified_flow.sample_loss_inputs(batch, key, n_classes=10, label_dropout=0.1)
    v = jnp.abs(rows.noise - rows.data)
    np.testing.assert_allclose(found, jnp.where(v < 1, v**2 / 2, v - 0.5).mean(), rtol=1e-5)
    ((t, label),) = seen
    assert 0 < t.min() < 0.2 and 0.8 < t.max() < 1 and set(label.tolist()) == {0, 10}


def test_a_solver_is_of_second_order(monkeypatch):
    """dx/dt = t·x, from t = 1 to 0, divides x by √e."""
    monkeypatch.setattr(sampling, "SOLVERS", dict(sampling.SOLVERS))
    midpoint = run_recipe("A solver", sampling)["midpoint"]
    assert sampling.SOLVERS["midpoint"] is midpoint

    def error(n_steps):
        with jax.enable_x64(True):
            times = jnp.linspace(1.0, 0.0, n_steps + 1)
            x = midpoint(lambda x, t: t * x, jnp.ones((1, 1)), times).x
            return abs(x.item() - math.exp(-0.5))

    assert error(64) / error(128) == pytest.approx(4, rel=0.05)


def test_a_loss_of_hidden_states_trains_the_blocks_before_the_first():
    config = replace(TINY, depth=4)
    params = nnx.to_pure_dict(nnx.split(with_random_weights(config))[1])
    alignment = run_recipe("A loss of hidden states", jax=jax, optax=optax)["alignment"]

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return alignment(build_with_params(config, params), x, t, label)

    value, grads = loss(params)
    early, late = build_with_params(config, params)(x, t, label, taps=(2, 4))[1]
    norms = (jnp.linalg.norm(h, axis=-1) for h in (early, late))
    np.testing.assert_allclose(value, 1 - ((early * late).sum(-1) / math.prod(norms)).mean(), 1e-5)
    for g in jax.tree.leaves(grads["blocks"]):
        assert g[:2].any() and not g[2:].any()


def test_a_guidance_extrapolates_from_a_head_of_hidden_states_to_the_prediction():
    model = with_random_weights(replace(TINY, depth=4))

    def head(hidden):
        return unpatchify(hidden[..., :12], 2, 4)

    guided_by_depth = run_recipe("A guidance", sampling)["guided_by_depth"]
    v = jax.jit(guided_by_depth(model, head, label, 1.9, (0.3, 1.0)))
    for time, scale in ((0.5, 1.9), (0.2, 1.0)):
        strong, (hidden,) = model(x, jnp.full(4, time), label, taps=(2,))
        expected = head(hidden) + scale * (strong - head(hidden))
        np.testing.assert_allclose(v(x, time), expected, rtol=1e-4, atol=1e-4)


def test_a_teacher_teaches_on_any_mesh():
    """The gradient is 0 for a student that is its teacher, and no other."""
    config = replace(TINY, depth=1)
    params = nnx.to_pure_dict(nnx.split(with_random_weights(config))[1])
    distill = run_recipe("A teacher", parallel, model)["distill"]
    mesh, graphs = parallel.make_mesh(4, devices=jax.devices()[:4]), [model.model_graphdef(config)]
    step = jax.jit(partial(distill, graphs=2 * graphs, mesh=mesh))
    for factor in (1.0, 0.9):
        student = jax.tree.map(lambda p, factor=factor: factor * p, params)
        (loss, _), grads = step(student, params, (x, t, label), jax.random.key(0))
        learns = [bool(g.any()) for g in jax.tree.leaves(grads)]
        assert (loss > 1e-3 and all(learns)) if factor < 1 else (loss == 0 and not any(learns))


# --- commands -------------------------------------------------------------------------------------


def commands():
    """Yield the words of every command on the pages: script first, then its flags.

    The results are a record of what was run once, and not meant to be typed.
    """
    pages = [text for path, text in PAGES.items() if path.name != "results.md"]
    blocks = "\n".join(re.findall(r"(?s)```sh\n(.*?)```", "\n".join(pages))).replace("\\\n", " ")
    prose = re.sub(r"(?s)```.*?```", "", "\n".join(pages))
    for line in blocks.splitlines() + re.findall(r"`([^`]+)`", prose):
        line = line.replace("\n", " ")
        for words in re.findall(r"(?:^|[\s/])python ((?:\w+/)*\w+\.py\b.*)", line):
            # Placeholders of a scheduler or a reader, $RANK and N; a quote may end its line.
            words = re.sub(r"\$\w+|\b[A-Z]\b", "1", words).rstrip("\"'")
            yield tuple(shlex.split(words, comments=True))


def config_of(script):
    """The dataclass that a script parses its command line into."""
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "cli.parse_flags":
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            return getattr(module, ast.unparse(node.args[0]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "train.main":
            return config_of("train.py")
    raise AssertionError(f"{script} parses no flags")


def test_commands_are_found():
    """Or the tests of each would pass for want of any."""
    found = {words[0] for words in commands()}
    assert {"train.py", "generate.py", "evaluate.py", "benchmarks/digits.py"} <= found


@pytest.mark.parametrize("words", dict.fromkeys(commands()), ids=" ".join)
def test_a_command_has_flags_that_there_are(words):
    script, *flags = words
    if "--help" in flags:
        with pytest.raises(SystemExit):
            cli.parse_flags(config_of(script), flags)
    else:
        cli.parse_flags(config_of(script), flags)


def test_every_flag_on_the_page_is_a_command_s():
    """On the pages of this project's commands alone: schedulers have flags of their own."""
    scripts = {words[0] for words in commands()}
    known = {name for script in scripts for name in config_of(script).__dataclass_fields__}
    ours = re.sub(r"(?m)^.*(pip|hf) .*$", "", TEXT_OF_COMMANDS)
    named = set(re.findall(r"--([a-z]\w*)", ours)) - {"help", "config"}
    assert {name for name in named if name not in known} == set()


def test_every_target_of_make_on_the_page_is_there():
    targets = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text()))
    assert set(re.findall(r"(?m)(?:^|`)make ([\w-]+)", TEXT)) <= targets


# --- the pages ------------------------------------------------------------------------------------


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= MAX_README_BYTES and len(text.splitlines()) <= MAX_README_LINES


def test_the_readme_names_every_command_and_room():
    code = PAGES[ROOT / "README.md"].split("\n## The code\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`([\w/.]+)`", code))
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    there = {re.sub("/.*", "/", path) for path in listed.stdout.split()}
    assert there - named == set() and [path for path in named if not (ROOT / path).exists()] == []


def test_the_flags_on_the_page_of_training_are_the_codes():
    names = runpy.run_path(str(ROOT / "docs" / "renew_flags.py"))
    page = PAGES[ROOT / "docs" / "training.md"]
    assert names["renewed"](page) == page
    listed = re.findall(r"(?m)^\| `--(\w+)` \|", page)
    assert sorted(listed) == sorted(names["flags_of"](names["TrainConfig"]))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    def anchors(text):
        titles = re.findall(r"(?m)^#+ (.+)$", text)
        return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}

    for link in re.findall(r"\]\(([^)]+)\)", PAGES[path]):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
