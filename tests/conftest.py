"""Eight virtual devices, shapes in signatures checked at run time, no silent broadcasting."""

import ctypes
import gc
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

# Before jax is imported. Tests mostly compile: unoptimised programs compile three times faster, and
# XLA's older emitters of fusions more than twice as fast again. An unknown flag would end XLA.
UNOPTIMISED = "--xla_backend_optimization_level=0"
OLDER_EMITTERS = ""
if version("jaxlib").startswith("0.10."):
    OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
FAST = f"{UNOPTIMISED} {OLDER_EMITTERS}"
# Of programs whose bits are compared with other programs': the older emitters round by what they
# fuse.
AS_USERS_COMPILE = {"xla_cpu_use_fusion_emitters": True} if OLDER_EMITTERS else {}
os.environ["XLA_FLAGS"] = f"{FAST} --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiled programs, shared by all tests, the processes they start, and the next session. By the
# environment, since a command that a test calls would else set a person's own cache.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "xla"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

CHECKED = ("data", "evaluation", "inference", "methods", "model", "networks", "pretrained")
CHECKED += ("sampling", "generate", "evaluate", "convert_imagenet", "export")
CHECKED += ("training.optim", "training.device_dataset", "training.warm_start")
install_import_hook(CHECKED, "beartype.beartype")

# The same inputs in every run: a test that fails does so for everyone.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))


UNIT, RUN = (Path(__file__).parent / name for name in ("unit", "run"))
# The same tests took 270 to 420 s on machines of one kind: the limits leave room for a slow one.
UNIT_SECONDS = 10  # of one unit test
UNIT_BUDGET = 600  # seconds of all unit tests together


COMPILING = {"seconds": 0.0}  # of this process so far


def add_compiling(event: str, duration_secs: float, **_: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILING["seconds"] += duration_secs


jax.monitoring.register_event_duration_secs_listener(add_compiling)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail a unit test that takes too long: it belongs to tests/run or tests/system.

    The lesser of wall and processor time counts, so that a busy machine fails nothing, and without
    what XLA compiled: tests share programs, and which of them comes first is chance.
    """
    wall, processor, compiling = time.perf_counter(), time.process_time(), COMPILING["seconds"]
    result = yield
    seconds = min(time.perf_counter() - wall, time.process_time() - processor)
    seconds = max(0.0, seconds - (COMPILING["seconds"] - compiling))
    item.user_properties.append(("seconds", seconds))  # for the process that adds them up
    if UNIT in item.path.parents and seconds > UNIT_SECONDS:
        pytest.fail(f"a unit test of {seconds:.1f} s; {UNIT_SECONDS} s are allowed", pytrace=False)
    return result


class UnitBudget:
    """Add up what the unit tests take, as measured above, and fail the session when it is more than
    their budget.
    """

    def __init__(self):
        self.seconds = 0.0

    def pytest_runtest_logreport(self, report):
        if report.nodeid.startswith("tests/unit/") and report.when == "call":
            self.seconds += dict(report.user_properties).get("seconds", 0.0)

    def pytest_sessionfinish(self, session):
        if self.seconds > UNIT_BUDGET and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.seconds:
            terminalreporter.write_line(
                f"the unit tests took {self.seconds:.0f} s; {UNIT_BUDGET} s are allowed",
                red=self.seconds > UNIT_BUDGET,
            )


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(UnitBudget())


def pytest_collection_finish():
    """What is imported by now stays: the collector, which `give_memory_back` calls, need not walk
    it.
    """
    gc.freeze()


@pytest.fixture(scope="session")
def cache():
    """The folder of compiled programs."""
    return CACHE


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


@pytest.fixture(scope="module", autouse=True)
def curves_are_not_plotted(request):
    """In tests/run a plot of each run would take a second. Those of commands are real."""
    with pytest.MonkeyPatch.context() as patch:
        if RUN in request.path.parents:
            from training import session

            stand_in = SimpleNamespace(CURVES_FILE=session.curves.CURVES_FILE, save_curves=leave)
            patch.setattr(session, "curves", stand_in)
        yield


def leave(_, path):
    """Leave an empty file."""
    path.parent.mkdir(exist_ok=True)
    path.touch()


@pytest.fixture(autouse=True)
def no_arrow_cache_at_home(tmp_path_factory, monkeypatch):
    """`load_dataset` copies local folders into its cache: not into the person's."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "arrow"))


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """An autoencoder of grey images that reconstructs; see averaging.py."""
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
    """What runs commands one at a time; see faults_cases.py."""
    from faults_cases import Forks

    return Forks(cache, tmp_path_factory.mktemp("forks"))


@pytest.fixture
def forks(server):
    """The same, of which no run is left behind."""
    yield server
    server.leave_nothing()
