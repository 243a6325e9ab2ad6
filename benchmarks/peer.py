"""The peer: `diffusers`' DiT in PyTorch, with a plain rectified-flow training and sampling loop.

The network is that of an adaLN-Zero `DiT` of `model.py`, and so is the step: uint8 images, label
dropout, logit-normal times, AdamW, clipping, the average of the weights. It runs in a process of
its own (`Peer`): two runtimes in one would compete for threads, device memory and CUDA libraries.
If torch or diffusers is missing, or the peer fails, `PeerMissing` gives the reason in one line.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

TIME_SCALE = 1000  # the sinusoids of t were made for 0 … 1000


class PeerPrecision(NamedTuple):
    """A peer's precision, and whether it is compiled."""

    autocast: bool
    compile: bool


PEERS = {
    "fp32": PeerPrecision(autocast=False, compile=False),
    "autocast": PeerPrecision(autocast=True, compile=False),
    "fp32+compile": PeerPrecision(autocast=False, compile=True),
    "autocast+compile": PeerPrecision(autocast=True, compile=True),
}


class Cost(NamedTuple):
    """The time of one step: by the clock, and of all cores together."""

    seconds: float
    cpu_seconds: float


class PeerMissing(Exception):
    """There is no peer, for the reason of the message."""


# --- in the benchmark's process ------------------------------------------------------------------


class Peer:
    """A torch process that takes a turn on request, and waits idle otherwise."""

    def __init__(
        self,
        kind: str,
        task: str,
        config: Any,
        *,
        platform: str,
        batch_size: int,
        n: int = 1,
        **settings: Any,
    ):
        """Start the process, and wait until it has taken a first turn, in which it may compile.

        Args:
            kind: a name in `PEERS`.
            task: a name in `TASKS`.
            config: the `ModelConfig` of the model to reproduce.
            platform: JAX's platform; the peer must run on the same.
            n: steps of a turn.
            settings: keyword arguments of the task.

        Raises:
            PeerMissing: torch or diffusers is not installed, diffusers has no such model, or it
                failed.
        """
        if missing := [p for p in ("torch", "diffusers") if not importlib.util.find_spec(p)]:
            raise PeerMissing(f"{' and '.join(missing)} not installed: pip install --group bench")
        if config.block != "adaln_zero":
            raise PeerMissing(f"diffusers has no DiT with blocks '{config.block}'")
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            # If others use the processor too, threads that spin while they wait cost torch a
            # multiple of its time.
            env={"OMP_WAIT_POLICY": "passive"} | os.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        job = {
            "kind": kind,
            "task": task,
            "config": dataclasses.asdict(config),
            "platform": platform,
            "batch_size": batch_size,
            "n": n,
            "settings": settings,
        }
        self.n_params = self._request(job)["n_params"]
        self.memory_bytes: float | None = None
        self.first_seconds = self.turn().seconds

    def turn(self) -> Cost:
        """Take a turn; returns the cost of one step, once the last is done.

        Raises:
            PeerMissing: it failed.
        """
        answer = self._request({})
        self.memory_bytes = answer["memory_bytes"]
        return Cost(answer["seconds"], answer["cpu_seconds"])

    def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(message), file=self.process.stdin, flush=True)
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        self.process.wait()
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        self.close()
        raise PeerMissing(lines[-1] if lines else f"it ended with {self.process.returncode}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


# --- the torch process ----------------------------------------------------------------------------


def build_torch_model(config: Any) -> Any:
    """Build the diffusers model with a `ModelConfig`'s shapes and as many parameters.

    diffusers gives every block an embedder of t and the label of its own. The paper and `model.py`
    have one, so here all blocks share the first block's. Labels are dropped by the training loop,
    once per row, and not again in each block.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    c = config
    model: Any = DiTTransformer2DModel(
        num_attention_heads=c.n_heads,
        attention_head_dim=c.width // c.n_heads,
        in_channels=c.channels,
        out_channels=c.out_channels,
        num_layers=c.depth,
        sample_size=c.image_size,
        patch_size=c.patch_size,
        num_embeds_ada_norm=c.n_classes,
        norm_eps=1e-6,
    )
    embedder = model.transformer_blocks[0].norm1.emb
    embedder.class_embedder.dropout_prob = 0.0
    embedder.time_proj.downscale_freq_shift = 0  # frequencies down to 1/10 000, as in the paper
    for block in model.transformer_blocks:
        block.norm1.emb = embedder
    return model


def autocast_context(device: str, precision: PeerPrecision) -> Any:
    """Make the context that a forward pass runs under."""
    import torch

    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision.autocast)


def make_train_step(
    model: Any,
    config: Any,
    precision: PeerPrecision,
    *,
    device: str,
    batch_size: int,
    remat: bool,
    label_dropout: float = 0.1,
    learning_rate: float = 1e-4,
    clip_norm: float = 1.0,
    ema_decay: float = 0.9999,
) -> Callable[[], Any]:
    """Make a training step on one batch of random images. `remat` saves only blocks' inputs."""
    import torch

    shape = (batch_size, config.channels, config.image_size, config.image_size)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    label = torch.randint(0, config.n_classes, (batch_size,), device=device)
    if remat:
        model.enable_gradient_checkpointing()
    parameters = list(model.parameters())
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    network = torch.compile(model) if precision.compile else model

    def step() -> Any:
        data = image.float() / 127.5 - 1
        noise = torch.randn_like(data)
        t = torch.randn(batch_size, device=device).sigmoid()  # logit-normal
        t_image = t[:, None, None, None]
        drop = torch.rand(batch_size, device=device) < label_dropout
        label_or_null = torch.where(drop, config.n_classes, label)
        with autocast_context(device, precision):
            velocity = network(
                (1 - t_image) * data + t_image * noise,
                TIME_SCALE * t,
                label_or_null,
                return_dict=False,
            )[0]
        loss = (velocity.float() - (noise - data)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, parameters, 1 - ema_decay)  # pyright: ignore
        return loss.detach()

    return step


def make_guided_sampling(
    model: Any,
    config: Any,
    precision: PeerPrecision,
    *,
    device: str,
    batch_size: int,
    n_steps: int,
    cfg_scale: float = 2.0,
) -> Callable[[], Any]:
    """Make a sampler: Euler's method from noise to images on the host.

    Both halves of guidance are one batch.
    """
    import torch

    network = torch.compile(model) if precision.compile else model
    label = torch.arange(batch_size, device=device) % config.n_classes
    both = torch.cat([label, torch.full_like(label, config.n_classes)])
    shape = (batch_size, config.channels, config.image_size, config.image_size)
    times = torch.linspace(1, 0, n_steps + 1).tolist()

    def sample() -> Any:
        x = torch.randn(shape, device=device)
        # One context around the loop: autocast then casts each weight once, not once a step.
        with torch.no_grad(), autocast_context(device, precision):
            for t, s in pairwise(times):
                time = torch.full((2 * batch_size,), TIME_SCALE * t, device=device)
                velocity = network(torch.cat([x, x]), time, both, return_dict=False)[0].float()
                conditional, null = velocity.chunk(2)
                x = x + (s - t) * (null + cfg_scale * (conditional - null))
        return x.cpu()

    return sample


TASKS = {"step": make_train_step, "sample": make_guided_sampling}


def torch_device(platform: str) -> str:
    """Return torch's name of JAX's platform."""
    import torch

    if platform == "cpu":
        return "cpu"
    if platform == "gpu" and torch.cuda.is_available():
        # JAX multiplies float32 in TF32 on NVIDIA cards.
        torch.set_float32_matmul_precision("high")
        return "cuda"
    raise SystemExit(f"this torch has no device for JAX's platform '{platform}'")


def read_peak_memory(device: str) -> float | None:
    """Read the peak of device memory in use; on a CPU, that of the whole process."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not `resource`, whose figure starts from that of the parent process.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024.0 * int(s.split()[1]) for s in lines if s.startswith("VmHWM:")), None)


def serve_turns() -> None:
    """Build the job in the first line of the input; then take a turn for each further line."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries print
    job = json.loads(input())
    device = torch_device(job["platform"])
    config = SimpleNamespace(**job["config"])
    import torch

    model = build_torch_model(config).to(device).train(job["task"] == "step")
    run = TASKS[job["task"]](
        model,
        config,
        PEERS[job["kind"]],
        device=device,
        batch_size=job["batch_size"],
        **job["settings"],
    )
    n_params = sum(p.numel() for p in model.parameters())
    print(json.dumps({"n_params": n_params}), file=answers, flush=True)
    for _ in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(job["n"]):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        answer = {
            "seconds": (time.perf_counter() - start) / job["n"],
            "cpu_seconds": (time.process_time() - cpu_start) / job["n"],
            "memory_bytes": read_peak_memory(device),
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve_turns()
