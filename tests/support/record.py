"""Record what four short runs compute, bit for bit, and compare two records.

    python tests/support/record.py --work /tmp/before --out before.json     # on the code as it was
    python tests/support/record.py --work /tmp/after --inputs /tmp/before/inputs --out after.json
    python tests/support/record.py --compare before.json after.json
    python tests/support/record.py --reopen /tmp/before --out reopened.json # old folders, new code

A change that moves code and computes nothing new leaves every line of the record as it was, on the
same machine. Only the commands are called, so that code with other names can be recorded too. The
runs: rectified flow, DDPM with learned sigma, an MMDiT of captions and a DiT of latents, each of 40
steps with a resume in between; samples of each, an evaluation in pixels and an export.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
TIMES = ("images_per_second", "seconds_per_step", "time", "mfu")
RUNS = {
    "flow": [],
    "ddpm": ["--objective", "ddpm", "--learned_sigma"],
    "captions": ["--model", "MMDiT-Ti/4", "--caption", "the digit {label}", "a {label}"],
    "latents": [],
}


def command(*words: object) -> None:
    """Run one of the project's commands; its failure is this script's."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")


def make_inputs(folder: Path) -> None:
    """Write the text encoder and the autoencoder that the runs read, once."""
    if (folder / "vae").exists():
        return
    for place in ("tests/support", "."):
        sys.path.insert(0, str(ROOT / place))
    import averaging
    import tiny_text_encoders

    averaging.save(folder / "vae")
    tiny_text_encoders.save_clip(folder / "encoder")


def flags_of(name: str, work: Path, inputs: Path) -> list[object]:
    """The flags of one of `RUNS`."""
    flags: list[object] = [*RUNS[name]]
    if name == "captions":
        flags += ["--text_towers", inputs / "encoder", "--caption_cache", work / "caption_cache"]
    if name == "latents":
        flags += ["--latents", work / "latent_set"]
    return flags


def arrays_in(checkpoint: Path) -> dict[str, str]:
    """The hash of each array of a checkpoint, by its path there."""
    import jax
    import orbax.checkpoint as ocp

    found = {}
    for item in ("params", "ema", "optimizer"):
        tree = ocp.PyTreeCheckpointer().restore((checkpoint / item).absolute())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[f"{item}{jax.tree_util.keystr(path)}"] = hash_of(np.asarray(leaf))
    return found


def hash_of(array: np.ndarray) -> str:
    facts = f"{array.dtype} {array.shape}".encode()
    return hashlib.sha256(facts + array.tobytes()).hexdigest()[:24]


def metrics_of(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without those that tell time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def samples_of(run: Path, out: Path) -> str:
    """The hash of eight samples."""
    prompts = ["--prompts", "the digit 3", "a 7"] if run.name == "captions" else []
    flags = ["--n", 8, "--n_steps", 6, "--seed", 5, "--out", out]
    command("generate.py", "--run", run, *prompts, *flags)
    with np.load(out) as arrays:
        return hash_of(arrays["arr_0"])


def record(work: Path, inputs: Path) -> dict:
    """Train, sample, evaluate and export in a new folder `work`."""
    found = {}
    convert = ["--dataset_name", "digits", "--image_size", 16, "--vae", inputs / "vae"]
    command("convert_imagenet.py", *convert, "--mirror", "--out", work / "latent_set")
    for name in RUNS:
        run, flags = work / name, flags_of(name, work, inputs)
        # In float32 on every processor, as before it followed from the processor.
        every = ["--nohalf_precision", "--log_every", 4, "--eval_save_steps", 12]
        every += ["--sample_every_n", 20]
        command("train.py", *flags, *every, "--n_steps", 24, "--run_dir", run)
        resumed = ["--n_steps", 40, "--run_dir", run, "--resume"]
        command("train.py", *flags, *every, *resumed)
        found[name] = {"metrics": metrics_of(run), "samples": samples_of(run, work / f"{name}.npz")}
        found[name] |= {"checkpoint": arrays_in(run / "checkpoints" / "40")}
        images = sorted((run / "samples").glob("*.png"))
        found[name] |= {"grids": {p.name: hash_of(pixels(p)) for p in images}}
        print(f"{name}: recorded", flush=True)
    reference = work / "reference.npz"
    pixel = ["--features", "pixels"]
    command("evaluate.py", "--make_reference", reference, "--dataset_name", "digits", *pixel)
    judge = ["--reference", reference, *pixel, "--n", 64, "--out", work / "scores.jsonl"]
    command("evaluate.py", "--run", work / "flow", *judge)
    scores = json.loads((work / "scores.jsonl").read_text())
    found["evaluation"] = {k: v for k, v in scores.items() if k != "card"}
    command("export.py", "--run", work / "flow", "--out", work / "export")
    found["export"] = exported(work / "export")
    return found


def pixels(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image)


def exported(folder: Path) -> dict[str, str]:
    """The hash of each tensor of an export."""
    from safetensors.numpy import load_file

    (path,) = folder.rglob("*.safetensors")
    return {name: hash_of(tensor) for name, tensor in load_file(path).items()}


def reopen(work: Path, inputs: Path) -> dict:
    """Generate from, resume and draw the figures of the runs in a folder that was made before."""
    found = {}
    for name in RUNS:
        run = work / name
        found[name] = {"samples": samples_of(run, work / f"{name}-reopened.npz")}
        flags = flags_of(name, work, inputs)
        command("train.py", *flags, "--n_steps", 44, "--run_dir", run, "--resume")
        command("figures.py", "--run", run)
        found[name] |= {"checkpoint": arrays_in(run / "checkpoints" / "44")}
        print(f"{name}: opened again", flush=True)
    return found


def differences(a: object, b: object, place: str = "") -> list[str]:
    """The places at which two records differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            line
            for key in sorted(a.keys() | b.keys())
            for line in differences(a.get(key), b.get(key), f"{place}/{key}")
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [line for i, (x, y) in pairs for line in differences(x, y, f"{place}/{i}")]
    return [] if a == b else [f"{place}: {a} != {b}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="a new folder for the runs")
    parser.add_argument("--inputs", type=Path, help="where the encoder and the VAE are")
    parser.add_argument("--reopen", type=Path, help="a folder that was recorded before")
    parser.add_argument("--out", type=Path, help="the record, a JSON file")
    parser.add_argument("--compare", type=Path, nargs=2, help="two records")
    flags = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if flags.compare:
        lines = differences(*(json.loads(path.read_text()) for path in flags.compare))
        print("\n".join(lines[:40]) or "bit for bit the same")
        sys.exit(bool(lines))
    work = (flags.reopen or flags.work).absolute()
    inputs = (flags.inputs or work / "inputs").absolute()
    inputs.mkdir(parents=True, exist_ok=True)
    make_inputs(inputs)
    found = reopen(work, inputs) if flags.reopen else record(work, inputs)
    flags.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
