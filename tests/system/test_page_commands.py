"""The page in a real browser: each visitor gets what he requests, no one else's images, and nothing
leaves this machine.
"""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from browser import Visitor, open_browser
from commands import NANO, SMALL, run, start
from curves_cases import record, write_grids
from faults_cases import wait_until
from tiny_models import (
    CLASSES,
    DDPM,
    DIGITS,
    MEAN,
    SHAPE,
    SIGMA,
    SPAN,
    UNCONDITIONAL,
    tiny_model,
)

from methods.ddpm import DDPM_SOLVERS
from model import model_config
from runtime.run_folder import REQUIRED_KEYS
from sampling import SOLVERS

# It is not imported here: every worker would, to collect tests that it does not run.
no_gradio = importlib.util.find_spec("gradio") is None
without_gradio = pytest.mark.skipif(no_gradio, reason="no Gradio: pip install --group demo")
pytestmark = [pytest.mark.slow, without_gradio]


@pytest.fixture(scope="module")
def runs(cache, tmp_path_factory):
    """A folder with one short run, and an older one with another number of sampling steps."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--n_steps", 8, "--eval_save_steps", 4, "--sample_every_n", 4, "--log_every", 2]
    done = run(NANO, *SMALL, *flags, "--run_dir", folder / "nano", cache=cache)
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "nano", folder / "other")
    config = json.loads((folder / "nano/config.json").read_text()) | {"n_sample_steps": 7}
    (folder / "other/config.json").write_text(json.dumps(config))
    os.utime(folder / "other/config.json", (0, 0))
    return folder


def start_page(runs, cache):
    """Start the command and wait for the page's address."""
    process = start("demo.py", "--runs", runs, cache=cache)
    assert process.stdout
    line = process.stdout.readline()
    match = re.search(r"http://127\.0\.0\.1:\d+/", line)
    assert match, line or process.communicate()[1]
    return process, match[0]


@pytest.fixture(scope="module")
def url(runs, cache):
    process, url = start_page(runs, cache)
    yield url
    process.terminate()
    _, err = process.communicate()
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")


@pytest.fixture(scope="module")
def driver():
    with open_browser() as driver:
        yield driver


@pytest.fixture
def visitor(driver, url):
    return Visitor(driver, url)


def generate(visitor, n):
    """Generate n images and wait for them."""
    visitor.write("n", n)
    visitor.click("generate")
    return visitor.wait_for_images("images", n)


def test_a_click_generates_the_number_requested_and_a_seed_repeats_its_images(driver, url):
    driver.get_log("performance")
    visitor = Visitor(driver, url)
    assert visitor.value("model") == "nano" and visitor.value("steps") == "2"
    assert visitor.title() == "DiT-Nano/8 trained on digits"
    visitor.choose("labels", "3", "7")
    first = generate(visitor, 6)
    assert len(set(first)) == 6
    assert [c.text for c in visitor.find("#images .caption-label")] == ["3"] * 3 + ["7"] * 3
    more = generate(visitor, 18)  # the fourth now has another label, from the same noise
    assert more[:3] == first[:3] and len(more) == 18
    assert generate(visitor, 6) == first
    visitor.click("random-seed")
    visitor.wait(lambda: visitor.value("seed") != "0")
    visitor.click("generate")
    visitor.wait(lambda: len(images := visitor.images("images")) == 6 and images != first)
    assert not set(visitor.images("images")) & set(first)
    assert visitor.console_errors() == []
    requested = visitor.requested_urls()
    assert url in requested
    assert [a for a in requested if not a.startswith((url, "data:", "blob:"))] == []


def test_another_model_has_its_own_settings(visitor):
    visitor.choose("model", "other")
    visitor.wait(lambda: visitor.value("steps") == "7")
    assert len(generate(visitor, 2)) == 2
    assert visitor.console_errors() == []


def test_the_trajectory_is_shown_as_an_animation(visitor):
    visitor.check("with-trajectory")
    generate(visitor, 2)
    (gif,) = visitor.wait_for_images("trajectory", 1)
    assert gif.startswith("data:image/gif")
    visitor.check("with-trajectory")
    generate(visitor, 3)
    assert visitor.find("#trajectory img") == []
    assert visitor.console_errors() == []


def test_the_comparison_grid_fills(visitor):
    visitor.open_tab("Guidance × steps")
    visitor.write("scales", "1 3")
    visitor.write("columns", "2, 4")
    visitor.click("compare")
    seen = set()

    def filled():
        seen.update(visitor.images("comparison"))
        return len(seen) > 1 and visitor.is_idle()

    visitor.wait(filled)
    assert visitor.console_errors() == []


def test_a_run_shows_its_settings_losses_and_samples(visitor):
    visitor.open_tab("Run")
    assert len(visitor.wait_for_images("grids", 2)) == 2
    assert [c.text for c in visitor.find("#grids .caption-label")] == ["step 4", "step 8"]
    visitor.wait(lambda: "DiT-Nano/8" in visitor.find("#settings")[0].text)
    visitor.wait(lambda: visitor.find("#loss svg, #loss canvas"))
    assert visitor.console_errors() == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", -1, "seed -1: must be in 0 … 2147483647"),
        ("low", 1, "interval 1 1: must be two times in 0 … 1"),
    ],
)
def test_invalid_values_are_reported_in_the_page(field, value, message, visitor):
    visitor.write(field, value)
    visitor.click("generate")
    visitor.wait(lambda: message in visitor.messages(), seconds=20)
    assert visitor.images("images") == []


@pytest.mark.parametrize(("field", "value", "limit"), [("n", 65, "64"), ("steps", 251, "250")])
def test_sliders_keep_to_their_limits(field, value, limit, visitor):
    visitor.write(field, value)
    visitor.wait(lambda: visitor.value(field) == limit, seconds=20)


def test_two_visitors_get_their_own(visitor, url):
    alone = generate(visitor, 3)
    with open_browser() as other_driver:
        first, second = Visitor(visitor.driver, url), Visitor(other_driver, url)
        first.write("seed", 9)
        first.write("steps", 200)
        first.write("n", 64)
        second.write("n", 3)
        first.click("generate")
        second.click("generate")
        assert second.wait_for_images("images", 3) == alone
        assert not set(first.wait_for_images("images", 64)) & set(alone)
        assert second.images("images") == alone


def test_ctrl_c_while_sampling_exits_at_once_and_leaves_nothing_behind(
    runs, cache, driver, monkeypatch, tmp_path
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    # A shell's background ignores SIGINT, and so would what is started there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process, url = start_page(runs, cache)
    signal.signal(signal.SIGINT, before)
    visitor = Visitor(driver, url)
    visitor.write("n", 64)
    visitor.write("steps", 249)
    visitor.click("generate")
    wait_until(lambda: not visitor.is_idle(), 20)
    assert list(tmp_path.glob("dit-demo-*"))
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - began < 10
    assert "Traceback" not in out + err
    assert not list(tmp_path.glob("dit-demo-*"))


def test_a_signal_that_another_thread_receives_ends_the_page(runs, cache):
    """The kernel may give a process's signal to any thread, but only the main one acts on it."""
    process, _ = start_page(runs, cache)
    threads = sorted(int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir())
    other = next(thread for thread in threads if thread != process.pid)
    ctypes.CDLL(None).tgkill(process.pid, other, signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")


def test_a_port_that_is_taken_is_reported_in_one_line(runs, cache, url):
    port = url.rstrip("/").rpartition(":")[2]
    done = run("demo.py", "--run", runs / "nano", "--port", port, cache=cache)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"cannot open the page at 127.0.0.1:{port}" in done.stderr


def test_fields_fit_the_model():
    from inference.app.page import fields_for_model

    widths = {"text_length": 5, "text_width": 6, "pooled_width": 4}
    captions = model_config("MMDiT-Nano/4", **SHAPE, out_channels=1, n_classes=0, **widths)
    for config, settings, visible, solvers in (
        (CLASSES, {}, (True, False, False), [*SOLVERS]),
        (SIGMA, DDPM, (True, False, False), [*DDPM_SOLVERS]),
        (UNCONDITIONAL, {"cfg_scale": 1.0}, (False, False, False), [*SOLVERS]),
        # Captions made from labels.
        (
            captions,
            {"dataset": {"encoding": None, "label_names": DIGITS}},
            (False, True, True),
            [*SOLVERS],
        ),
    ):
        fields = fields_for_model(tiny_model(config, **settings))
        assert tuple(field["visible"] for field in fields[:3]) == visible
        assert fields[3]["choices"] == solvers
        # A hidden field is emptied; a visible one keeps its text.
        assert [field.get("value") for field in fields[1:3]] == [None if visible[1] else ""] * 2
        assert fields[-1]["maximum"] == (1000 if "objective" in settings else 250)


def test_fields_of_guidance_are_hidden_where_it_is_in_the_weights():
    from inference.app.page import fields_for_model

    for model, visible in ((tiny_model(), True), (tiny_model(SPAN, **MEAN), False)):
        _, _, _, solver, low, high, *_, scale, n_steps = fields_for_model(model)
        assert [f["visible"] for f in (low, high, scale)] == [visible] * 3
    assert (solver["value"], n_steps["value"]) == ("map", 1)


def test_the_history_of_a_run_is_its_newest_grids_and_the_readable_lines_of_its_record(tmp_path):
    from inference.app.page import MAX_GRIDS, load_run_history

    names = [f"{step:07d}.png" for step in range(1, 2 * MAX_GRIDS)]
    write_grids(tmp_path / "samples", *names, "final.png")
    record(tmp_path, end='null\n3\n{"loss": 1.0}\n')
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\n{"step": 99, "loss": 2.0}\n')
    config = dict.fromkeys(REQUIRED_KEYS, "digits")
    (tmp_path / "config.json").write_text(json.dumps(config))
    losses, _, grids = load_run_history(tmp_path)
    assert len(grids) == MAX_GRIDS and grids[-1][1] == "step 99"
    for image, _ in grids:
        image.close()
    assert losses["step"].tolist() == [5, 6, 10, 99]


def test_the_page_is_requested_without_a_proxy(monkeypatch):
    from urllib.request import getproxies

    from inference.app.page import bypass_proxies

    monkeypatch.setattr(os, "environ", {"HTTP_PROXY": "http://proxy:1", "NO_PROXY": "there"})
    bypass_proxies("[::1]")
    assert getproxies()["no"] == "there,localhost,127.0.0.1,::1"


def test_a_page_that_cannot_be_reached_is_reported_in_one_line(monkeypatch):
    import gradio as gr
    import httpx

    from inference.app.page import launch_page
    from runtime.errors import UserError

    monkeypatch.setattr(os, "environ", os.environ.copy())
    for error in (httpx.ConnectError("refused"), ValueError("localhost is not accessible")):

        def fail(error=error, **_):
            raise error

        page = gr.Blocks.__new__(gr.Blocks)  # constructed, it would leave resources open
        monkeypatch.setattr(page, "queue", lambda **_: None)
        monkeypatch.setattr(page, "launch", fail)
        with pytest.raises(UserError, match=f"cannot open the page at here: {error}"):
            launch_page(page, port=None, host="here", share=False)


def test_the_traceback_of_a_bug_goes_to_the_terminal(capsys):
    import gradio as gr

    from inference.app.page import show_errors
    from runtime.errors import UserError

    with pytest.raises(gr.Error, match="the terminal"), show_errors():
        raise ZeroDivisionError
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(gr.Error, match="seed 7"), show_errors():
        raise UserError("--seed 7")
    assert capsys.readouterr().err == ""
