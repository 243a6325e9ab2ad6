"""Eight virtual devices, shapes in signatures checked at run time, no silent broadcasting."""

import ctypes
import gc
import os
import signal
import sys

# Before jax is imported. Unoptimised programs compile three times faster, and tests mostly compile.
FAST = "--xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{FAST} --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

CHECKED = ("data", "evaluation", "generate", "inference", "methods", "model", "networks")
CHECKED += ("pretrained", "sampling", "training", "evaluate", "convert_imagenet", "export")
install_import_hook  # noqa: E402

CHECKED = ("layers", "model", "objectives", "optim", "sampling", "images", "generate", "vae")
CHECKED += ("latents", "codec", "convert_imagenet", "resident", "metrics", "drawn", "evaluate")
CHECKED += ("diffusion", "drawing", "drawable", "subjects", "sheets", "generate_config")
CHECKED += ("diffusion", "pretrained.sd3", "warm_start", "export", "studio")
install_import_hook(CHECKED, "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Compiled programs, shared by all tests of a session and the processes they start."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder


def give_memory_back():
    """Frees what was compiled, to the machine: it would be several GB in the end."""
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module", autouse=True)
def memory_given_back():
    yield
    give_memory_back()


@pytest.fixture
def room():
    """For a process that needs most of a machine of 24 GB."""
    give_memory_back()


@pytest.fixture(autouse=True)
def no_arrow_cache_at_home(tmp_path_factory, monkeypatch):
    """`load_dataset` copies local folders into its cache: not into the person's."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "arrow"))


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """An autoencoder of grey pictures that reconstructs; see averaging.py."""
    import averaging

    return averaging.save(tmp_path_factory.mktemp("autoencoder") / "vae")


@pytest.fixture(scope="session")
def latent_digits(vae, cache, tmp_path_factory):
    """The digits as `convert_imagenet.py` makes them, with their mirrored views."""
    from commands import convert

    folder = tmp_path_factory.mktemp("latents") / "digits"
    done = convert("--vae", vae, "--mirror", "--out", folder, cache=cache)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def server(cache, tmp_path_factory):
    """What forks commands off; see test_faults.py."""
    from test_faults import Forks

    forks = Forks(cache, tmp_path_factory.mktemp("forks"))
    with forks.server:
        yield forks
        forks.server.kill()


@pytest.fixture
def forks(server):
    """The same, of which no run is left behind."""
    from test_faults import children

    yield server
    if not server.ended:
        for child in children(server.server.pid):
            os.killpg(child, signal.SIGKILL)
        server.end()
