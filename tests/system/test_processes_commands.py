"""Two processes are one run: the same numbers, one record, one end."""

import json
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
from commands import NANO, SMALL, free_port, run, start, two_hosts

import evaluate
from evaluate import EvaluateConfig

FLAGS = [*SMALL, "--n_steps", 20, "--log_every", 1, "--eval_save_steps", 10]
FLAGS += ["--sample_every_n", 10]
NAME = "pixel_frechet_21"


def start_pair(*flags, cache, n_devices=4, command=NANO):
    port = free_port()
    common = ["--coordinator", f"127.0.0.1:{port}", "--n_processes", 2]
    words = (command, *flags, *common, "--process_index")
    return [start(*words, index, cache=cache, n_devices=n_devices) for index in (0, 1)]


def wait_for_a_step(process):
    for line in process.stdout:
        if line.startswith("step"):
            break


GLOO = re.compile(r"\[Gloo\]|is connected to|peer ranks")


def ends(pair, timeout=300) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each, without what Gloo prints, also when two of its
    threads print into one line.
    """

    def without_gloo(text: str) -> str:
        lines = (line for line in text.splitlines() if not GLOO.search(line))
        return "\n".join(line for line in lines if not line.strip().isdigit())

    outputs = [process.communicate(timeout=timeout) for process in pair]
    return [
        (process.returncode, without_gloo(out), without_gloo(err))
        for process, (out, err) in zip(pair, outputs, strict=True)
    ]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        (line["step"], name): line[name]
        for line in lines
        for name in ("loss", "grad_norm", "eval_loss")
        if name in line
    }


def same(a, b):
    assert a.keys() == b.keys()
    np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=1e-5)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Statistics of the real digits' pixels."""
    path = tmp_path_factory.mktemp("references") / "digits.npz"
    evaluate.main(EvaluateConfig(dataset_name="digits", make_reference=path, features="pixels"))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = run(NANO, *FLAGS, "--run_dir", folder, cache=cache, n_devices=1)
    assert done.returncode == 0, done.stderr
    return losses(folder)


@pytest.mark.slow
def test_two_processes_train_evaluate_sample_measure_and_save_as_one(tmp_path, cache, alone, real):
    folder = tmp_path / "run"
    flags = ["--fid_every", 10, "--fid_reference", real, "--fid_features", "pixels", "--fid_n", 21]
    pair = start_pair(*FLAGS, *flags, "--fsdp", 4, "--run_dir", folder, cache=cache)
    first, second = ends(pair)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "Done: step 20" in first[1] and second[1] == ""
    same(losses(folder), alone)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"10", "20"}
    assert (folder / "samples/final.png").exists() and (folder / "samples/0000010.png").exists()
    out = tmp_path / "samples.npz"  # by one process with one device
    done = run("generate.py", "--run", folder, "--n", 4, "--out", out, cache=cache)
    assert done.returncode == 0, done.stderr

    config = EvaluateConfig(run=folder, reference=real, features="pixels", n=21)
    evaluate.main(replace(config, out=tmp_path / "record"))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    distances = [line[NAME] for line in map(json.loads, lines) if NAME in line]
    found = json.loads((tmp_path / "record").read_text())
    assert len(distances) == 2 and distances[1] == pytest.approx(found["pixel_frechet"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_keep_averages_and_write_later_ones_anew(tmp_path, cache, alone):
    """One process makes any average of them."""
    folder = tmp_path / "run"
    flags = ["--fsdp", 2, "--run_dir", folder]
    averages = ["--ema_std", "0.05", "0.1", "--snapshot_every", 2]
    for more in ([*FLAGS, *averages], ["--resume"]):
        pair = start_pair(*more, *flags, cache=cache, n_devices=1)
        for code, _, err in ends(pair):
            assert code == 0, err
        same(losses(folder), alone)
        snapshots = {int(path.name): path for path in (folder / "snapshots").iterdir()}
        assert snapshots.keys() == {*range(2, 21, 2)}
        assert {step for step, path in snapshots.items() if (path / "old").exists()} <= {
            *range(2, 11, 2)
        }
        shutil.rmtree(folder / "checkpoints/20")
        for path in snapshots.values():
            (path / "old").touch()
    sample = ["generate.py", "--run", folder, "--n", 4, "--out", tmp_path / "a.npz"]
    done = run(*sample, "--ema_std", "0.08", cache=cache)
    assert done.returncode == 0 and "from step 20" in done.stdout, done.stderr


@pytest.mark.slow
def test_two_processes_compute_metrics_as_one(tmp_path, cache, real):
    npz = tmp_path / "some.npz"
    out = tmp_path / "record"
    images = np.random.default_rng(0).integers(0, 256, (45, 8, 8, 1)).astype(np.uint8)
    np.savez(npz, arr_0=images)
    config = EvaluateConfig(npz=npz, reference=real, features="pixels", out=out)
    evaluate.main(config)
    flags = ["--npz", npz, "--reference", real, "--features", "pixels", "--out", out]
    pair = start_pair(*flags, cache=cache, n_devices=2, command="evaluate.py")
    (code, output, err), second = ends(pair)
    assert (code, *second[:2]) == (0, 0, ""), err + second[2]
    assert "pixel_frechet" in output
    expected, found = map(json.loads, out.read_text().splitlines())
    for line in (expected, found):
        del line["card"]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(tmp_path, cache, alone):
    """One process with one device then resumes from there."""
    folder = tmp_path / "run"
    pair = start_pair(*FLAGS, "--run_dir", folder, cache=cache)
    wait_for_a_step(pair[0])
    pair[1].send_signal(signal.SIGTERM)
    sent = time.monotonic()
    first, second = ends(pair, timeout=60)
    assert time.monotonic() - sent < 30
    assert (first[0], second[0]) == (143, 143), first[2] + second[2]
    (step,) = (int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))
    assert 0 < step < 20
    done = run(NANO, "--resume", "--run_dir", folder, cache=cache)
    assert done.returncode == 0 and f"resuming at step {step}" in done.stdout, done.stderr
    same(losses(folder), alone)


@pytest.mark.slow
def test_a_mistake_ends_all_processes_with_one_line_each(tmp_path, cache):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").touch()
    for code, out, err in ends(
        start_pair(*FLAGS, "--run_dir", tmp_path / "run", cache=cache), timeout=60
    ):
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and "already exists" in err and err.count("\n") == 0


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0])  # 0 is the coordinator
def test_the_death_of_one_process_ends_the_other_with_one_line(tmp_path, cache, lost):
    folder = tmp_path / "run"
    flags = [*SMALL, "--n_steps", 100_000, "--log_every", 1, "--eval_save_steps", 100_000]
    flags += ["--sample_every_n", 100_000]
    pair = start_pair(*flags, "--run_dir", folder, cache=cache, n_devices=1)
    wait_for_a_step(pair[0])
    pair[lost].kill()
    killed = time.monotonic()
    (status, _, err) = ends(pair, timeout=60)[1 - lost]
    assert time.monotonic() - killed < 30
    assert status == 1 and err.count("\n") == 0, err
    assert err.startswith(f"error: process {lost} ") and "has not answered since" in err
    assert f"no checkpoint yet: start all processes again with --resume --run_dir {folder}" in err


@pytest.mark.slow
def test_a_cut_link_between_two_hosts_ends_both_with_one_line(tmp_path, cache):
    folder = tmp_path / "run"
    flags = [*SMALL, "--n_steps", 100_000, "--log_every", 1, "--eval_save_steps", 100_000]
    flags += ["--sample_every_n", 100_000, "--run_dir", folder, "--coordinator", "10.9.0.1:7777"]
    flags += ["--n_processes", 2, "--process_index"]
    with two_hosts() as hosts:
        pair = [start(NANO, *flags, i, cache=cache, within=hosts[i]) for i in (0, 1)]
        wait_for_a_step(pair[0])
        time.sleep(3)  # the watch of each has heard of the other
        host = hosts[1][3]
        subprocess.run(["ip", "-n", host, "link", "set", "up0", "down"], check=True)
        cut = time.monotonic()
        both = ends(pair, timeout=60)
        assert time.monotonic() - cut < 30
    for lost, (status, _, err) in zip((1, 0), both, strict=True):
        assert status == 1 and err.count("\n") == 0, err
        assert err.startswith(f"error: process {lost} ") and "or the network failed" in err


def test_no_cluster_is_one_line(cache):
    done = run(NANO, "--distributed", cache=cache)
    assert done.returncode == 2 and "no cluster is detected" in done.stderr
    assert done.stderr.count("\n") == 1
