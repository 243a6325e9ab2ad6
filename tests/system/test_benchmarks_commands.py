"""The benchmarks of speed run as commands, with and without a peer."""

import json
import os
import subprocess
import sys

import pytest
from benchmarks_cases import needs_torch
from commands import ROOT, SMALL, run, settings

SMALLER = "tests/support/small_presets.py"

# --- the scripts ----------------------------------------------------------------------------------


def benchmark(script, *flags, cache):
    """Run a script; returns its rows and its output, which must hold a table."""
    done = run(SMALLER, f"benchmarks/{script}", *flags, cache=cache)
    assert done.returncode == 0, done.stderr
    *text, line = done.stdout.splitlines()
    table = [row for row in text if row.startswith("|")]
    assert len(table) > 2 and len({row.count("|") for row in table}) == 1
    results = json.loads(line)
    machine = {"device", "processor", "instruction_sets", "versions"}
    assert {"benchmark", "date", "command", "rows"} | machine <= set(results)
    return results["rows"], done.stdout


def test_operations_belong_to_the_functions_that_asked_for_them(cache):
    flags = ["--model", "DiT-Ti/8", "--image_size", 16, "--batch_size", 2, "--n_steps", 1]
    flags += ["--precision", "fp32"]
    done = run("benchmarks/operations.py", *flags, cache=cache)
    assert done.returncode == 0, done.stderr
    assert "fp32: a step takes " in done.stdout and "| products | copies | other |" in done.stdout
    (profile,) = json.loads(done.stdout.splitlines()[-1])["profiles"]
    functions = profile["functions"]
    multiplies = {name for name, kinds in functions.items() if kinds["products"]}
    assert {f"networks/layers.py Linear.__call__{end}" for end in ("", ", backward")} <= multiplies
    assert any(name.startswith("networks/ops.py attention") for name in multiplies)
    assert not any(name.startswith("training/optim.py") for name in multiplies)
    assert 0 < profile["floor_s"] < profile["step_s"]


def test_attention_needs_a_width_for_each_number_of_heads(cache):
    done = run("benchmarks/attention.py", "--heads", 2, cache=cache)
    assert done.returncode == 2 and "each number of heads needs its width" in done.stderr


@pytest.mark.slow
def test_startup(cache):
    flags = ["--model", "DiT-Ti/8", "--rounds", 1, "--peer", "false"]
    rows, _ = benchmark("startup.py", *flags, cache=cache)
    assert min(rows[name][stage] for name in rows for stage in ("import", "compile")) > 0
    # Work and not time, which depends on what else runs: a warm cache spares compiling.
    assert rows["warm"]["cpu_s"] < rows["cold"]["cpu_s"]


# Runs scripts with smaller models.
PYTHON = f"""#!/bin/sh
[ "$1" = -c ] || set -- {SMALLER} "$@"
exec {sys.executable} "$@"
"""


@pytest.fixture(scope="module")
def dry(cache, tmp_path_factory):
    """The output and the record of a run of all benchmarks on a machine without a GPU."""
    folder = tmp_path_factory.mktemp("dry")
    record, python = folder / "record.jsonl", folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o700)
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--dry"],
        cwd=ROOT,
        env=os.environ | settings(cache) | {"JSON": str(record), "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [json.loads(line) for line in record.read_text().splitlines()]


@pytest.mark.slow
@needs_torch
def test_the_gpu_script_runs_all_benchmarks_without_a_gpu(dry):
    printed, record = dry
    assert "status" not in printed and "no time" not in printed
    assert printed.count("| model × batch") == 12  # once as it runs, and in the summary
    assert "| batch × tokens" in printed and "| task" in printed
    assert "left out: cuDNN" in printed

    rows = {line["benchmark"]: line["rows"] for line in record}
    assert rows.keys() == {"step", "attention", "sample", "autoencoder"}
    assert [row["way"] for row in rows["attention"]] == ["own", "XLA"] * 2
    assert all(set(row["times_as_fast_as"]) == {"autocast"} for row in rows["sample"])
    ours = [row for row in rows["autoencoder"] if "ours" in row["what"]]
    assert [row["what"] for row in ours] == ["encode, ours bf16", "decode, ours bf16"]
    assert all(row["times_as_fast_as_torch"] > 0 for row in ours)


@pytest.mark.slow
@needs_torch
def test_a_step_beside_torch_takes_the_memory_that_is_planned(dry, cache):
    printed, record = dry
    steps = [line["rows"] for line in record if line["benchmark"] == "step"]
    ours, theirs = steps[0]
    assert "| × fastest torch |" in printed and ours["n_params"] == theirs["n_params"]
    assert set(ours["times_as_fast_as"]) == {"autocast+compile"}
    assert theirs["times_as_fast_as"]["autocast+compile"] == 1
    assert all(row["cpu_s"] > 0 for rows in steps for row in rows)
    for row in (rows[0] for rows in steps):
        assert row["planned_bytes"] > 0 and row["compile_s"] > 0 and 0 < row["of_matmul"] < 1
        assert row["flops_per_second"] == pytest.approx(
            row["train_flops_per_image"] * row["images_per_second"]
        )
    flags = ["--model", "DiT-Ti/8", "--image_size", 16, "--batch_size", 2, "--unroll", 1]
    flags += ["--precision", "bf16", "--remat", "false,true", "--plan_only"]
    rows, _ = benchmark("step.py", *flags, cache=cache)
    assert [(row["remat"], row["unroll"]) for row in rows] == [(False, 1), (True, 1)]
    for row, (timed, *_) in zip(rows, steps, strict=False):
        assert row["planned_bytes"] == timed["planned_bytes"] and row["median_s"] is None
        assert row["n_params"] == timed["n_params"] and row["remat"] == timed["remat"]


def test_the_gpu_script_is_well_formed():
    subprocess.run(["bash", "-n", "benchmarks/gpu.sh"], cwd=ROOT, check=True)


@pytest.mark.slow
def test_the_stages_of_a_run_add_up(cache, tmp_path):
    flags = [*SMALL, "--n_steps", 4, "--run_dir", tmp_path / "run"]
    stages, text = benchmark("default_run.py", "--model", "DiT-Ti/8", *flags[2:], cache=cache)
    assert {"import", "first step, with its compilation", "samples", "leave"} <= stages.keys()
    total = stages.pop("total")
    assert sum(stages.values()) == pytest.approx(total) and min(stages.values()) >= 0
    assert "Done: step 4" in text
