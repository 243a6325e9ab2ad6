"""The page in a real browser: what a visitor asks for comes, to him alone, and nothing leaves this
machine.
"""

import json
import os
import re
import shutil
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
from browser import Visitor, browser
from commands import NANO, SMALL, run, start
from curves_cases import record, sheets
from drawables import CLASSES, DDPM, DIGITS, NOTHING, SHAPE, SIGMA, drawable
from faults_cases import wait_until

from model import model_config
from runtime.run_folder import REQUIRED_KEYS

pytest.importorskip("gradio", reason="no Gradio: pip install --group demo")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(cache, tmp_path_factory):
    """A folder with one short run, and an older one that is sampled otherwise."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--n_steps", 8, "--eval_save_steps", 4, "--sample_every_n", 4, "--log_every", 2]
    done = run(NANO, *SMALL, *flags, "--run_dir", folder / "nano", cache=cache)
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "nano", folder / "other")
    config = json.loads((folder / "nano/config.json").read_text()) | {"n_sample_steps": 7}
    (folder / "other/config.json").write_text(json.dumps(config))
    os.utime(folder / "other/config.json", (0, 0))
    return folder


def opened(runs, cache):
    """The command's process, and the page's address once there is one."""
    process = start("demo.py", "--runs", runs, cache=cache)
    assert process.stdout
    said = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+/", said)
    assert found, said or process.communicate()[1]
    return process, found[0]


@pytest.fixture(scope="module")
def url(runs, cache):
    process, url = opened(runs, cache)
    yield url
    process.terminate()
    _, err = process.communicate()
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")


@pytest.fixture(scope="module")
def driver():
    with browser() as driver:
        yield driver


@pytest.fixture
def visitor(driver, url):
    return Visitor(driver, url)


def pictures(visitor, n):
    """What comes of a click: n pictures."""
    visitor.write("n", n)
    visitor.click("draw")
    return visitor.all_of("pictures", n)


def test_a_click_makes_as_many_pictures_as_asked_and_the_same_seed_the_same(driver, url):
    driver.get_log("performance")
    visitor = Visitor(driver, url)
    assert visitor.value("model") == "nano" and visitor.value("steps") == "2"
    visitor.choose("labels", "3", "7")
    first = pictures(visitor, 6)
    assert len(set(first)) == 6
    assert [c.text for c in visitor.find("#pictures .caption-label")] == ["3"] * 3 + ["7"] * 3
    more = pictures(visitor, 18)  # its places are others' labels, of the same noise
    assert more[:3] == first[:3] and len(more) == 18
    assert pictures(visitor, 6) == first
    visitor.click("another")
    visitor.wait(lambda: visitor.value("seed") != "0")
    visitor.click("draw")
    visitor.wait(lambda: len(found := visitor.pictures("pictures")) == 6 and found != first)
    assert not set(visitor.pictures("pictures")) & set(first)
    assert visitor.complaints() == []
    asked_for = visitor.addresses()
    assert url in asked_for
    assert [a for a in asked_for if not a.startswith((url, "data:", "blob:"))] == []


def test_another_model_has_fields_of_its_own(visitor):
    visitor.choose("model", "other")
    visitor.wait(lambda: visitor.value("steps") == "7")
    assert len(pictures(visitor, 2)) == 2
    assert visitor.complaints() == []


def test_the_way_from_noise_moves(visitor):
    visitor.click("animate")
    (gif,) = visitor.all_of("way", 1)
    assert gif.startswith("data:image/gif")
    assert visitor.complaints() == []


def test_the_table_fills(visitor):
    visitor.tab("Guidance × steps")
    visitor.write("scales", "1 3")
    visitor.write("columns", "2, 4")
    visitor.click("fill")
    seen = set()

    def filled():
        seen.update(visitor.pictures("table"))
        return len(seen) > 1 and visitor.idle()

    visitor.wait(filled)
    assert visitor.complaints() == []


def test_a_run_tells_its_settings_losses_and_samples(visitor):
    visitor.tab("The run")
    assert len(visitor.all_of("sheets", 2)) == 2
    assert [c.text for c in visitor.find("#sheets .caption-label")] == ["step 4", "step 8"]
    visitor.wait(lambda: "DiT-Nano/8" in visitor.find("#settings")[0].text)
    visitor.wait(lambda: visitor.find("#loss svg, #loss canvas"))
    assert visitor.complaints() == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("n", 65, "65 pictures: ask for 1 … 64 at a time"),
        ("steps", 251, "251 steps: ask for 1 … 250"),
        ("seed", -1, "seed -1: must be in 0 … 2147483647"),
        ("low", 1, "interval 1 1: must be two times in 0 … 1"),
    ],
)
def test_what_cannot_be_is_told_in_the_page(field, value, said, visitor):
    visitor.write(field, value)
    visitor.click("draw")
    visitor.wait(lambda: said in visitor.told(), seconds=20)
    assert visitor.pictures("pictures") == []


def test_two_visitors_get_their_own(visitor, url):
    alone = pictures(visitor, 3)
    with browser() as another:
        first, second = Visitor(visitor.driver, url), Visitor(another, url)
        first.write("seed", 9)
        first.write("steps", 200)
        first.write("n", 64)
        second.write("n", 3)
        first.click("draw")
        second.click("draw")
        assert second.all_of("pictures", 3) == alone
        assert not set(first.all_of("pictures", 64)) & set(alone)
        assert second.pictures("pictures") == alone


def test_ctrl_c_leaves_at_once_and_nothing_behind_while_something_is_drawn(
    runs, cache, driver, monkeypatch, tmp_path
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    # A shell's background ignores SIGINT, and so would what is started there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process, url = opened(runs, cache)
    signal.signal(signal.SIGINT, before)
    visitor = Visitor(driver, url)
    visitor.write("n", 64)
    visitor.write("steps", 249)
    visitor.click("draw")
    wait_until(lambda: not visitor.idle(), 20)
    assert list(tmp_path.glob("dit-demo-*"))
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - began < 10
    assert "Traceback" not in out + err
    assert not list(tmp_path.glob("dit-demo-*"))


def test_a_port_that_is_taken_is_said_in_one_line(runs, cache, url):
    port = url.rstrip("/").rpartition(":")[2]
    done = run("demo.py", "--run", runs / "nano", "--port", port, cache=cache)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"no page can be opened at 127.0.0.1:{port}" in done.stderr


def test_fields_fit_the_model():
    from inference.app.page import fields_for_model

    told = {"text_length": 5, "text_width": 6, "pooled_width": 4}
    captions = model_config("MMDiT-Nano/4", **SHAPE, out_channels=1, n_classes=0, **told)
    for config, settings, seen, solvers in (
        (CLASSES, {}, (True, False, False), ["euler", "heun"]),
        (SIGMA, DDPM, (True, False, False), ["ddpm", "ddim"]),
        (NOTHING, {"cfg_scale": 1.0}, (False, False, False), ["euler", "heun"]),
        # Captions that were made of labels.
        (
            captions,
            {"dataset": {"encoding": None, "label_names": DIGITS}},
            (False, True, True),
            ["euler", "heun"],
        ),
    ):
        fields = fields_for_model(drawable(config, **settings))
        assert tuple(field["visible"] for field in fields[:3]) == seen
        assert fields[3]["choices"] == solvers
        # What is not seen is empty, and what is written stays.
        assert [field.get("value") for field in fields[1:3]] == [None if seen[1] else ""] * 2


def test_of_a_run_the_newest_sheets_are_seen_and_what_can_be_read_of_its_record(tmp_path):
    from inference.app.page import MAX_GRIDS, load_run_history

    names = [f"{step:07d}.png" for step in range(1, 2 * MAX_GRIDS)]
    sheets(tmp_path / "samples", *names, "final.png")
    record(tmp_path, end='null\n3\n{"loss": 1.0}\n')
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\n{"step": 99, "loss": 2.0}\n')
    described = dict.fromkeys(REQUIRED_KEYS, "digits")
    (tmp_path / "config.json").write_text(json.dumps(described))
    losses, _, shown = load_run_history(tmp_path)
    assert len(shown) == MAX_GRIDS and shown[-1][1] == "step 99"
    for picture, _ in shown:
        picture.close()
    assert losses["step"].tolist() == [5, 6, 10, 99]


def test_no_proxy_is_asked_for_the_page(monkeypatch):
    from urllib.request import getproxies

    from inference.app.page import bypass_proxies

    monkeypatch.setattr(os, "environ", {"HTTP_PROXY": "http://proxy:1", "NO_PROXY": "there"})
    bypass_proxies("[::1]")
    assert getproxies()["no"] == "there,localhost,127.0.0.1,::1"


def test_a_page_that_cannot_be_reached_is_said_in_one_line(monkeypatch):
    import httpx

    from inference.app.page import launch_page
    from runtime.errors import UserError

    monkeypatch.setattr(os, "environ", os.environ.copy())
    for error in (httpx.ConnectError("refused"), ValueError("localhost is not accessible")):

        def fail(error=error, **_):
            raise error

        page: Any = SimpleNamespace(queue=lambda **_: None, launch=fail)
        with pytest.raises(UserError, match=f"no page can be opened at here: {error}"):
            launch_page(page, port=None, host="here", share=False)


def test_a_bug_is_told_as_one_and_the_terminal_shows_it(capsys):
    import gradio as gr

    from inference.app.page import show_errors
    from runtime.errors import UserError

    with pytest.raises(gr.Error, match="the terminal"), show_errors():
        raise ZeroDivisionError
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(gr.Error, match="seed 7"), show_errors():
        raise UserError("--seed 7")
    assert capsys.readouterr().err == ""
