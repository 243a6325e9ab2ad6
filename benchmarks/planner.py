"""Plan a training step on a mesh that is not here: bytes per device, bytes sent, and time.

    python benchmarks/planner.py     # write the tables of docs/scaling.md anew

The plan is a roofline: FLOPs over the speed of matrix products, bytes over the bandwidth of memory,
bytes over the bandwidth of links. It counts the step of `training.step` and
`parallel.value_and_grad`. The bytes that a forward pass saves come from JAX, by tracing `model.py`.
It measures nothing and touches no device.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from flax import nnx

from data.batch import EncodedCaption
from model import JOINT, ModelConfig, init_model_params, model_config, model_graphdef
from runtime import parallel
from training import flops as training_flops

DEVICES_PER_HOST = 8
FP32 = 4  # bytes of a weight, a gradient, a moment, an average
MOMENTS = 2
# Trees of the gradient's size while weights are updated: the gradient, and the updates. Found in
# XLA's buffer assignment on CPU.
UPDATE_TREES = 2
# AdamW and EMA read gradient, weights, two moments and average and write all but the gradient; its
# norm reads the gradient once more.
UPDATE_PASSES = 10
# Memory accesses of an activation. Forward: written, read. Backward: read; its gradient written,
# read. One that is not saved is written and read once more.
ACTIVATION_PASSES = 5
REMAT_PASSES = 2


# --- devices --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """The speeds and memory of one device of a host.

    Args:
        flops_per_second: of large matrix products, as attained.
        peak_flops_per_second: the reference of MFU.
        memory_bytes: its own memory.
        memory_bytes_per_second: bandwidth of its own memory.
        link_bytes_per_second: to the other devices of its host, in one direction.
        network_bytes_per_second: its share of its host's bandwidth to other hosts.
        start_seconds: the constant part of a collective's latency.
        link_hop_seconds: until the next device of the host has the first bytes.
        network_hop_seconds: until the next host has the first bytes.
    """

    name: str
    flops_per_second: float
    peak_flops_per_second: float
    memory_bytes: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    network_bytes_per_second: float
    start_seconds: float
    link_hop_seconds: float
    network_hop_seconds: float


# A bf16 product of 8,192 × 8,192 matrices runs at 790 of an H200's 989 TFLOP/s (a figure that was
# given to this project, not measured by it).
ATTAINED = 790 / 989


def make_hopper(name: str, kind: str, memory_bytes: float) -> Device:
    """Describe a Hopper SXM card, eight to a host.

    NVLink 4 is 900 GB/s in both directions together (NVIDIA's data sheets of H100 and H200); a DGX
    has one ConnectX-7 of 400 Gbit/s for each card (DGX H100/H200 user guide). Latencies are those
    by which NCCL picks algorithms: ring, protocol Simple (its src/graph/tuning.cc).
    """
    peak = training_flops.device_peak(kind, "bfloat16")
    assert peak and peak.bytes_per_second
    return Device(
        name=name,
        flops_per_second=ATTAINED * peak.flops_per_second,
        peak_flops_per_second=peak.flops_per_second,
        memory_bytes=memory_bytes,
        memory_bytes_per_second=peak.bytes_per_second,
        link_bytes_per_second=450e9,
        network_bytes_per_second=50e9,
        start_seconds=8.4e-6,
        link_hop_seconds=3.4e-6,
        network_hop_seconds=14e-6,
    )


DEVICES = {
    "H100": make_hopper("H100", "NVIDIA H100 80GB HBM3", 80e9),
    "H200": make_hopper("H200", "NVIDIA H200", 141e9),
}


# --- weights and what a pass keeps ----------------------------------------------------------------


class WeightBytes(NamedTuple):
    """Bytes of a model's fp32 weights on a mesh."""

    sharded: int  # total size of the weights that are sharded
    replicated: int  # of those that every device has
    gathered: float  # of the largest part that is gathered at one time: a block
    on_device: float
    n_gathers: int  # parts that are gathered one by one in a pass


@lru_cache
def param_shapes(config: ModelConfig) -> Any:
    """Return the tree of parameters as shapes."""
    return jax.eval_shape(lambda: init_model_params(config, jax.random.key(0)))


def count_params(config: ModelConfig) -> int:
    """Count a model's parameters."""
    return sum(x.size for x in jax.tree.leaves(param_shapes(config)))


def count_weight_bytes(config: ModelConfig, fsdp: int) -> WeightBytes:
    """Count the bytes of weights, by the shape rule of `parallel.partition_specs`."""
    params = param_shapes(config)
    n_blocks = count_stacked_blocks(config)
    specs = parallel.partition_specs(params, parallel.abstract_mesh(1, fsdp))
    sharded, replicated, largest = 0, 0, 0.0
    for name, part in params.items():
        axes = parallel.sharded_axes(specs[name], jax.tree.map(lambda x: x.ndim, part))
        sizes = [FP32 * x.size for x in jax.tree.leaves(part)]
        sharded_size = sum(size for size, axis in zip(sizes, axes, strict=True) if axis is not None)
        sharded += sharded_size
        replicated += sum(sizes) - sharded_size
        largest = max(largest, sum(sizes) / n_blocks.get(name, 1))
    return WeightBytes(
        sharded=sharded,
        replicated=replicated,
        gathered=largest,
        on_device=sharded / fsdp + replicated,
        n_gathers=sum(n_blocks.get(name, 1) for name in params),
    )


def count_stacked_blocks(config: ModelConfig) -> dict[str, int]:
    """Count the blocks of each stack; an MMDiT's last block is outside of the stacks."""
    c = config
    if c.block != JOINT:
        return {"blocks": c.depth}
    return {"dual_blocks": c.n_dual, "blocks": c.depth - 1 - c.n_dual}


class ForwardBytes(NamedTuple):
    """Bytes of one image's activations in a forward pass."""

    read: int  # by the backward pass, without attention scores
    saved: int  # of these, those that are not recomputed
    scores: int  # of attention, and their softmax: never saved


@lru_cache
def count_forward_bytes(config: ModelConfig) -> ForwardBytes:
    """Count the bytes of activations, as JAX splits the model into two passes.

    They are the difference between batches of two sizes, divided by the difference in size: weights
    cancel.
    """
    params = param_shapes(config)
    n_few, n_many = 97, 101
    specs = parallel.partition_specs(params, parallel.abstract_mesh(1, 1))

    def make_plain(params):
        return nnx.merge(model_graphdef(replace(config, remat=False)), params)

    def make_as_configured(params):
        return parallel.merge_sharded_model(model_graphdef(config), params, specs)

    def count_residuals(make: Callable, n_rows: int) -> int:
        def split(params, inputs):
            return jax.vjp(lambda params: make(params)(*inputs), params)[1]

        residuals = jax.eval_shape(split, params, model_inputs(config, n_rows))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals))

    def count_per_row(make: Callable) -> int:
        difference = count_residuals(make, n_many) - count_residuals(make, n_few)
        return difference // (n_many - n_few)

    # Two tensors of as many numbers as there are products of a query and a key.
    products = training_flops.flops_by_module(config)["attention scores, values"]
    scores = 2 * FP32 * products * config.n_heads // (4 * config.width)
    return ForwardBytes(
        read=count_per_row(make_plain),
        saved=count_per_row(make_as_configured),
        scores=round(scores),
    )


def model_inputs(config: ModelConfig, rows: int) -> tuple[Any, ...]:
    """Return the shapes of x_t, t and the label."""

    def array(*shape, dtype: Any = jnp.float32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    m = config.text_length
    label = array(dtype=jnp.int32)
    if config.text_width:
        tokens = array(m, config.text_width, dtype=jnp.float16)
        pooled = array(config.pooled_width, dtype=jnp.float16)
        label = EncodedCaption(tokens, array(m, dtype=jnp.bool), pooled)
    return array(*config.image_shape), array(), label


def count_block_bytes(config: ModelConfig) -> ForwardBytes:
    """Count the bytes of one block's activations: those of three blocks less those of two."""
    two = count_forward_bytes(replace(config, depth=2, remat=False))
    three = count_forward_bytes(replace(config, depth=3, remat=False))
    return ForwardBytes(
        read=three.read - two.read,
        saved=three.saved - two.saved,
        scores=three.scores - two.scores,
    )


# --- collectives ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collective:
    """All operations of one kind in one step.

    Args:
        kind: all-gather, reduce-scatter or all-reduce.
        n: their number, if XLA combines those of one block, and those after the last.
        array_bytes: total size of the gathered or summed arrays.
        size: devices of a group.
        per_host: devices of a group in one host.
    """

    kind: str
    n: int
    array_bytes: float
    size: int
    per_host: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends in a ring, and receives.

        Once around to gather or to reduce-scatter, twice for the sum, which is both (Patarasuk &
        Yuan 2009, §3).
        """
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.array_bytes * (self.size - 1) / self.size

    @property
    def n_hosts(self) -> int:
        return self.size // self.per_host

    def latency(self, device: Device) -> float:
        """Return the latency of one operation: once around the ring.

        A sum goes there and back, or up and down a tree: NCCL takes the quicker.
        """
        link, network = device.link_hop_seconds, device.network_hop_seconds
        ring = (self.size - self.n_hosts) * link + (self.n_hosts - 1) * network
        if self.kind == "all-reduce":
            tree = (self.per_host - 1) * link + math.ceil(math.log2(self.n_hosts)) * network
            ring = 2 * min(ring, tree)
        return device.start_seconds + ring

    def seconds(self, device: Device) -> float:
        """Return the time of all operations.

        A ring leaves and enters a host once for each of its devices in the group, each time through
        another network card.
        """
        bandwidth = device.link_bytes_per_second
        if self.n_hosts > 1:
            bandwidth = min(bandwidth, self.per_host * device.network_bytes_per_second)
        return self.n * self.latency(device) + self.sent_bytes / bandwidth


def list_collectives(
    w: WeightBytes, data: int, fsdp: int, accumulate_steps: int = 1
) -> list[Collective]:
    """List the collectives of `parallel.value_and_grad`, all in fp32.

    A block is gathered for each pass and its gradient reduce-scattered, in every part of a batch.
    Shards are summed over `data`, and replicated weights over all devices, once, at the end.
    """
    in_host = min(fsdp, DEVICES_PER_HOST)
    collectives = [
        Collective(
            kind="all-gather",
            n=2 * accumulate_steps * w.n_gathers,
            array_bytes=2 * accumulate_steps * w.sharded,
            size=fsdp,
            per_host=in_host,
        ),
        Collective(
            kind="reduce-scatter",
            n=accumulate_steps * w.n_gathers,
            array_bytes=accumulate_steps * w.sharded,
            size=fsdp,
            per_host=in_host,
        ),
        Collective(
            kind="all-reduce",
            n=1,
            array_bytes=w.sharded / fsdp,
            size=data,
            per_host=max(1, min(data, DEVICES_PER_HOST // fsdp)),
        ),
        Collective(
            kind="all-reduce",
            n=1,
            array_bytes=w.replicated,
            size=data * fsdp,
            per_host=min(data * fsdp, DEVICES_PER_HOST),
        ),
    ]
    return [c for c in collectives if c.size > 1 and c.array_bytes]


# --- the plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    The state is always there. Beside it are the temporaries of the backward pass, then those of the
    update.
    """

    weights: float
    average: float
    moments: float
    gradients: float
    activations: float
    gathered: float
    update: float

    @property
    def state(self) -> float:
        return self.weights + self.average + self.moments

    @property
    def temporaries(self) -> float:
        return max(self.gradients + self.activations + self.gathered, self.update)

    @property
    def total(self) -> float:
        return self.state + self.temporaries


@dataclass(frozen=True)
class Plan:
    """One training step on `data` × `fsdp` devices, hosts of eight filled one after the other.

    Args:
        rows: of the batch, on each device.
        accumulate_steps: parts in which these rows are computed.
        scores_stay: True if attention's scores never leave the chip, as with a flash or cuDNN
            kernel (Dao et al. 2022). Those of our own attention do, for the duration of a block.
    """

    config: ModelConfig
    device: Device
    data: int
    fsdp: int
    rows: int
    accumulate_steps: int = 1
    scores_stay: bool = False

    @property
    def n_devices(self) -> int:
        return self.data * self.fsdp

    @cached_property
    def weights(self) -> WeightBytes:
        return count_weight_bytes(self.config, self.fsdp)

    @cached_property
    def collectives(self) -> list[Collective]:
        return list_collectives(self.weights, self.data, self.fsdp, self.accumulate_steps)

    def _bytes_read(self, activations: ForwardBytes) -> int:
        return activations.read + (0 if self.scores_stay else activations.scores)

    @cached_property
    def memory(self) -> Memory:
        c = self.config
        on_device = self.weights.on_device
        block = count_block_bytes(c)
        # One block is recomputed at a time; without remat its saved part is counted already.
        per_row = (
            count_forward_bytes(c).saved + self._bytes_read(block) - (0 if c.remat else block.saved)
        )
        cast = 0 if c.dtype == "float32" else jnp.dtype(c.dtype).itemsize
        # A block as gathered, as cast, and its gradient before it is scattered.
        copies = (FP32 if self.fsdp > 1 else 0) + cast + FP32
        return Memory(
            weights=on_device,
            average=on_device,
            moments=MOMENTS * on_device,
            # The sum over all parts of the batch, and the gradient of one.
            gradients=on_device * (2 if self.accumulate_steps > 1 else 1),
            activations=self.rows / self.accumulate_steps * per_row,
            gathered=copies / FP32 * self.weights.gathered,
            update=UPDATE_TREES * on_device,
        )

    @property
    def flops(self) -> float:
        """Useful FLOPs of one device: recomputation is not counted."""
        forward = sum(training_flops.flops_by_module(self.config).values())
        return training_flops.TRAIN_PER_FORWARD * self.rows * forward

    @property
    def arithmetic_seconds(self) -> float:
        """Time of matrix products; with remat the forward pass counts twice."""
        forward = self.flops / training_flops.TRAIN_PER_FORWARD
        recomputed = forward if self.config.remat else 0
        return (self.flops + recomputed) / self.device.flops_per_second

    @property
    def memory_seconds(self) -> float:
        """Time of moving the activations between operations and the trees of the update."""
        activations = count_forward_bytes(self.config)
        read = self._bytes_read(activations)
        recomputed = read - activations.saved
        moved = self.rows * (ACTIVATION_PASSES * read + REMAT_PASSES * recomputed)
        moved += UPDATE_PASSES * self.weights.on_device
        return moved / self.device.memory_bytes_per_second

    @property
    def compute_seconds(self) -> float:
        """Time of arithmetic and memory, which do not overlap."""
        return self.arithmetic_seconds + self.memory_seconds

    @property
    def communication_seconds(self) -> float:
        return sum(c.seconds(self.device) for c in self.collectives)

    @property
    def seconds(self) -> float:
        """Expected time if no collective overlaps with arithmetic.

        In a scan XLA has nothing to hide a block's gather behind.
        """
        return self.compute_seconds + self.communication_seconds

    @property
    def hidden_seconds(self) -> float:
        """Expected time if communication and computation overlap completely."""
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def mfu(self) -> float:
        return self.flops / self.seconds / self.device.peak_flops_per_second

    @property
    def images_per_second(self) -> float:
        return self.rows * self.n_devices / self.seconds


USABLE_MEMORY = 0.9  # of a device's memory: the rest is for CUDA, NCCL and fragments
LARGEST_BATCH = 4096  # over all devices: a choice, 16 times that of Peebles & Xie (2023, §4)


def list_fitting_plans(
    config: ModelConfig, device: Device, n_devices: int, scores_stay: bool = False
) -> Iterator[Plan]:
    """List plans of DDP, FSDP in each host and FSDP over all, with and without remat.

    Each has the largest power of two of rows that fits.
    """
    max_rows = max(1, LARGEST_BATCH // n_devices)
    for fsdp in sorted({1, min(DEVICES_PER_HOST, n_devices), n_devices}):
        for remat in (False, True):
            c = replace(config, remat=remat)
            largest = None
            for rows in (2**i for i in range(int(math.log2(max_rows)) + 1)):
                plan = Plan(c, device, n_devices // fsdp, fsdp, rows, scores_stay=scores_stay)
                if plan.memory.total > USABLE_MEMORY * device.memory_bytes:
                    break
                largest = plan
            if largest:
                yield largest


def choose_plan(
    config: ModelConfig, device: Device, n_devices: int, scores_stay: bool = False
) -> Plan | None:
    """Choose the fastest plan that fits; None if nothing does."""
    plans = list_fitting_plans(config, device, n_devices, scores_stay)
    return max(plans, key=lambda plan: plan.images_per_second, default=None)


# --- the tables of docs/scaling.md ----------------------------------------------------------------

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: python benchmarks/planner.py -->", "<!-- end of tables -->"
XL = {"channels": 4, "out_channels": 4, "n_classes": 1000, "dtype": "bfloat16"}
# 36 d² weights a joint block: 33 blocks of width 2,048 make 5e9. Latents, captions and heads of 64
# as in SD3: 16 channels, 77 + 77 tokens of width 4,096, pooled 2,048 (Esser et al. 2024, §4, B.3).
FIVE_BILLION = ModelConfig(
    width=2048,
    depth=33,
    n_heads=32,
    patch_size=2,
    image_size=32,
    channels=16,
    out_channels=16,
    n_classes=0,
    text_length=154,
    text_width=4096,
    pooled_width=2048,
    block=JOINT,
    qk_norm=True,
    position="cropped",
    dtype="bfloat16",
)


def list_models() -> dict[tuple[str, int], ModelConfig]:
    """List models by name and pixels to a side; the side of latents is an eighth of these."""
    models: dict[tuple[str, int], ModelConfig] = {}
    for side in (256, 1024):
        models["DiT-XL/2", side] = model_config("DiT-XL/2", image_size=side // 8, **XL)
        models["MMDiT-5B/2", side] = replace(FIVE_BILLION, image_size=side // 8)
    return models


def describe_mesh(plan: Plan) -> str:
    """Name a plan's parallelism and its mesh, such as "FSDP 1×8"."""
    kinds = {1: "DDP", plan.n_devices: "FSDP"}
    return f"{kinds.get(plan.fsdp, 'hybrid')} {plan.data}×{plan.fsdp}"


def format_row(*cells: Any) -> str:
    """Format a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


COLUMNS = [
    *("devices", "mesh data×fsdp", "rows/device", "remat", "state GB", "temporaries GB"),
    *("gathered GB", "scattered GB", "summed GB", "step ms (all hidden)", "MFU", "images/s"),
]


def format_plan(plan: Plan) -> list[str]:
    """Format the cells of a plan's row, one for each of `COLUMNS`."""
    m = plan.memory

    def format_gigabytes(kind: str) -> str:
        return f"{sum(c.array_bytes for c in plan.collectives if c.kind == kind) / 1e9:.2f}"

    return [
        f"{plan.n_devices} {plan.device.name}",
        describe_mesh(plan),
        f"{plan.rows}",
        "yes" if plan.config.remat else "no",
        f"{m.state / 1e9:.1f}",
        f"{m.temporaries / 1e9:.1f}",
        *(format_gigabytes(kind) for kind in ("all-gather", "reduce-scatter", "all-reduce")),
        f"{1e3 * plan.seconds:.0f} ({1e3 * plan.hidden_seconds:.0f})",
        f"{plan.mfu:.0%}",
        f"{plan.images_per_second:,.0f}",
    ]


def format_plans(plans: list[tuple[str, Plan | None]]) -> list[str]:
    """Format the rows of a table; each plan comes with the name of its devices."""
    lines = [format_row(*COLUMNS), format_row(*["---"] * len(COLUMNS))]
    for devices, plan in plans:
        blank = [devices, "does not fit", *["—"] * (len(COLUMNS) - 2)]
        lines.append(format_row(*(format_plan(plan) if plan else blank)))
    return lines


def make_tables() -> str:
    """Compute all tables of docs/scaling.md."""
    lines = ["### The models", ""]
    columns = ("model", "width", "depth", "parameters", "tokens", "forward GFLOP/image")
    lines += [format_row(*columns, "kept MB/image", "scores MB/image"), format_row(*["---"] * 8)]
    for (name, side), c in list_models().items():
        flops = sum(training_flops.flops_by_module(c).values())
        activations = count_forward_bytes(c)
        count = f"{count_params(c):,}"
        facts = (f"{name}, {side}²", c.width, c.depth, count, math.prod(c.grid))
        amounts = (
            f"{x:,.0f}" for x in (flops / 1e9, activations.saved / 1e6, activations.scores / 1e6)
        )
        lines.append(format_row(*facts, *amounts))
    for side, scores_stay in ((256, False), (1024, False), (1024, True)):
        for name in ("DiT-XL/2", "MMDiT-5B/2"):
            title = "if scores stayed on the chip" if scores_stay else "the code as it is"
            lines += ["", f"### {name} at {side}², {title}", ""]
            lines += format_plans(
                [
                    (
                        f"{n} {device.name}",
                        choose_plan(list_models()[name, side], device, n, scores_stay),
                    )
                    for device in DEVICES.values()
                    for n in (8, 64, 1024)
                ]
            )
    for name in ("DiT-XL/2", "MMDiT-5B/2"):
        lines += ["", f"### {name} at 256² on 64 H100: the fastest of each kind that fits", ""]
        compared = []
        plans = list(list_fitting_plans(list_models()[name, 256], DEVICES["H100"], 64))
        for fsdp in (1, 8, 64):
            candidates = [plan for plan in plans if plan.fsdp == fsdp]
            best = max(candidates, key=lambda plan: plan.images_per_second, default=None)
            compared.append((f"64 H100, {64 // fsdp}×{fsdp}", best))
        lines += format_plans(compared)
    return "\n".join(lines)


def refresh_tables(document: str) -> str:
    """Return the document with its tables computed anew."""
    before, _, rest = document.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{make_tables()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    DOCUMENT.write_text(refresh_tables(DOCUMENT.read_text()))
