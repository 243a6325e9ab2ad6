"""The benchmarks of speed run as commands, with and without a peer."""

import json
import os
import subprocess

import pytest
from benchmarks_cases import needs_torch
from commands import ROOT, SMALL, run, settings


# --- the scripts ----------------------------------------------------------------------------------


def benchmark(script, *flags, cache):
    """Run a script; returns its rows and its output, which must hold a table."""
    done = run(f"benchmarks/{script}", *flags, cache=cache)
    assert done.returncode == 0, done.stderr
    *text, line = done.stdout.splitlines()
    table = [row for row in text if row.startswith("|")]
    assert len(table) > 2 and len({row.count("|") for row in table}) == 1
    results = json.loads(line)
    machine = {"device", "processor", "instruction_sets", "versions"}
    assert {"benchmark", "date", "command", "rows"} | machine <= set(results)
    return results["rows"], done.stdout


@pytest.mark.slow
@needs_torch
def test_step_beside_torch_takes_the_memory_that_is_planned(cache):
    """An MMDiT has no peer."""
    flags = ["--image_size", 16, "--batch_size", 2, "--precision", "bf16", "--unroll", 1]
    timed = ["--model", "DiT-Ti/8,MMDiT-Ti/8", "--remat", "true", "--peer", "autocast"]
    planned = ["--model", "DiT-Ti/8", "--remat", "false,true", "--plan_only"]
    rows, text = benchmark("step.py", *flags, *timed, "--rounds", 1, cache=cache)
    assert "| × fastest torch |" in text and "left out" in text
    ours, theirs, joint = rows
    assert all(row["cpu_s"] > 0 for row in rows) and joint["model"] == "MMDiT-Ti/8"
    assert ours["n_params"] == theirs["n_params"] and not joint["times_as_fast_as"]
    assert set(ours["times_as_fast_as"]) == {"autocast"}
    assert theirs["times_as_fast_as"]["autocast"] == 1
    for row in (ours, joint):
        assert row["planned_bytes"] > 0 and row["compile_s"] > 0 and 0 < row["of_matmul"] < 1
        assert row["flops_per_second"] == pytest.approx(
            row["train_flops_per_image"] * row["images_per_second"]
        )
    rows, _ = benchmark("step.py", *flags, *planned, cache=cache)
    assert [(row["remat"], row["unroll"]) for row in rows] == [(False, 1), (True, 1)]
    assert rows[1]["planned_bytes"] == ours["planned_bytes"] and rows[1]["median_s"] is None
    assert rows[1]["n_params"] == ours["n_params"]


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


@pytest.mark.slow
@needs_torch
def test_the_gpu_script_runs_all_benchmarks_without_a_gpu(cache, tmp_path):
    record = tmp_path / "record.jsonl"
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--dry"],
        cwd=ROOT,
        env=os.environ | settings(cache) | {"JSON": str(record)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "status" not in done.stdout and "no time" not in done.stdout
    assert done.stdout.count("| model × batch") == 12  # once as it runs, and in the summary
    assert "| batch × tokens" in done.stdout and "| task" in done.stdout
    assert "left out: cuDNN" in done.stdout

    rows = {
        line["benchmark"]: line["rows"] for line in map(json.loads, record.read_text().splitlines())
    }
    assert rows.keys() == {"step", "attention", "sample", "autoencoder"}
    assert [row["way"] for row in rows["attention"]] == ["own", "XLA"] * 2
    assert all(set(row["times_as_fast_as"]) == {"autocast"} for row in rows["sample"])
    ours = [row for row in rows["autoencoder"] if "ours" in row["what"]]
    assert [row["what"] for row in ours] == ["encode, ours bf16", "decode, ours bf16"]
    assert all(row["times_as_fast_as_torch"] > 0 for row in ours)


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
