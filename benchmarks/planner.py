"""The plan on paper: what a training step asks of each device on a mesh that is not here, and how
long it should take.

    python scaling.py     writes the tables of docs/scaling.md anew

A roofline: FLOPs over the speed of matrix products, bytes over the bandwidth of memory, bytes over
the bandwidth of links. It counts the step that `train_state.update` and `parallel.value_and_grad`
take; what a pass keeps it asks of JAX, by tracing `model.py`. It measures nothing and touches no
device.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from data.batch import EncodedCaption
from model import JOINT, ModelConfig, model_graphdef, init_model_params, model_config
from runtime import parallel
from training import flops as training_flops

DEVICES_PER_HOST = 8  # devices
FP32 = 4  # bytes of a weight, a gradient, a moment, an average
MOMENTS = 2
# Trees of the gradient's size while weights are updated: itself, and the steps that are taken.
# Found in XLA's buffer assignment on CPU.
UPDATE_TREES = 2
# AdamW and EMA read gradient, weights, two moments and average and write all but the gradient; its
# norm reads the gradient once more.
UPDATE_PASSES = 10
# Forward: written, read. Backward: read; its gradient written, read. What is not kept is written
# and read once more.
PASSES, PASSES_OF_REMAT = 5, 2


# --- devices --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """What one device of a host can do.

    Args:
        flops_per_second: of large matrix products, as attained.
        peak_flops_per_second: what MFU is measured against.
        memory_bytes, memory_bytes_per_second: its own memory.
        link_bytes_per_second: to the others of its host, in one direction.
        network_bytes_per_second: its share of what its host sends to other hosts.
        start_seconds: of a collective.
        link_hop_seconds, network_hop_seconds: until the next device has the first bytes.
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
    """A Hopper SXM card, eight to a host.

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

    split: int  # whole size of those that are sharded
    alike: int  # of those that every device has
    gathered: float  # of the largest part that is whole at one time: a block
    on_device: float
    calls: int  # of parts that are gathered, each for itself, in one pass


@lru_cache
def param_shapes(config: ModelConfig) -> Any:
    return jax.eval_shape(lambda: init_model_params(config, jax.random.key(0)))


def count_params(config: ModelConfig) -> int:
    return sum(x.size for x in jax.tree.leaves(param_shapes(config)))


def count_weight_bytes(config: ModelConfig, fsdp: int) -> WeightBytes:
    """By the shape rule of `parallel.partition_specs`."""
    params, n = param_shapes(config), count_stacked_blocks(config)
    specs = parallel.partition_specs(params, parallel.abstract_mesh(1, fsdp))
    split, alike, largest = 0, 0, 0.0
    for name, part in params.items():
        axes = parallel.sharded_axes(specs[name], jax.tree.map(lambda x: x.ndim, part))
        sizes = [FP32 * x.size for x in jax.tree.leaves(part)]
        of_part = sum(size for size, axis in zip(sizes, axes, strict=True) if axis is not None)
        split, alike = split + of_part, alike + sum(sizes) - of_part
        largest = max(largest, sum(sizes) / n.get(name, 1))
    calls = sum(n.get(name, 1) for name in params)
    return WeightBytes(split, alike, largest, split / fsdp + alike, calls)


def count_stacked_blocks(config: ModelConfig) -> dict[str, int]:
    """Blocks of each stack: an MMDiT's last stands apart."""
    c = config
    if c.block != JOINT:
        return {"blocks": c.depth}
    return {"dual_blocks": c.n_dual, "blocks": c.depth - 1 - c.n_dual}


class ForwardBytes(NamedTuple):
    """Bytes of one picture's forward pass."""

    made: int  # what the backward pass reads, but for scores
    kept: int  # of this, what is not computed again
    scores: int  # attention's, and their softmax: never kept


@lru_cache
def count_forward_bytes(config: ModelConfig) -> ForwardBytes:
    """As JAX splits the model that devices run into two passes: the difference that a row makes,
    by which weights drop out.
    """
    params, few, many = param_shapes(config), 97, 101
    specs = parallel.partition_specs(params, parallel.abstract_mesh(1, 1))

    def plain(params):
        return nnx.merge(model_graphdef(replace(config, remat=False)), params)

    def frugal(params):
        return parallel.merge_sharded_model(model_graphdef(config), params, specs)

    def residuals(make: Callable, rows: int) -> int:
        def split(params, inputs):
            return jax.vjp(lambda params: make(params)(*inputs), params)[1]

        found = jax.tree.leaves(jax.eval_shape(split, params, model_inputs(config, rows)))
        return sum(x.size * x.dtype.itemsize for x in found)

    made, kept = (
        (residuals(make, many) - residuals(make, few)) // (many - few) for make in (plain, frugal)
    )
    # Two tensors of as many numbers as there are products of a query and a key.
    products = training_flops.flops_by_module(config)["attention scores, values"]
    scores = 2 * FP32 * products * config.n_heads // (4 * config.width)
    return ForwardBytes(made, kept, round(scores))


def model_inputs(config: ModelConfig, rows: int) -> tuple[Any, ...]:
    """Shapes of x_t, t and the label."""

    def array(*shape, dtype: Any = jnp.float32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    side, m = config.image_size, config.text_length
    label = array(dtype=jnp.int32)
    if config.text_width:
        tokens = array(m, config.text_width, dtype=jnp.float16)
        pooled = array(config.pooled_width, dtype=jnp.float16)
        label = EncodedCaption(tokens, array(m, dtype=jnp.bool), pooled)
    return array(side, side, config.channels), array(), label


def count_block_bytes(config: ModelConfig) -> ForwardBytes:
    two, three = (count_forward_bytes(replace(config, depth=depth, remat=False)) for depth in (2, 3))
    return ForwardBytes(*(b - a for a, b in zip(two, three, strict=True)))


# --- collectives ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collective:
    """All operations of one kind in one step.

    Args:
        kind: all-gather, reduce-scatter or all-reduce.
        n: how many, if XLA combines those of one block, and those after the last.
        array_bytes: of what is gathered or summed, whole, in all of them.
        size: devices of a group. per_host: those of them in one host.
    """

    kind: str
    n: int
    array_bytes: float
    size: int
    per_host: int

    @property
    def sent_bytes(self) -> float:
        """What each device sends in a ring, and receives: once around to gather or to
        reduce-scatter, twice for the sum, which is both (Patarasuk & Yuan 2009, §3).
        """
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.array_bytes * (self.size - 1) / self.size

    @property
    def n_hosts(self) -> int:
        return self.size // self.per_host

    def latency(self, device: Device) -> float:
        """Of one: around the ring; a sum goes there and back, or up and down a tree (NCCL takes the
        quicker).
        """
        link, network = device.link_hop_seconds, device.network_hop_seconds
        ring = (self.size - self.n_hosts) * link + (self.n_hosts - 1) * network
        if self.kind == "all-reduce":
            tree = (self.per_host - 1) * link + math.ceil(math.log2(self.n_hosts)) * network
            ring = 2 * min(ring, tree)
        return device.start_seconds + ring

    def seconds(self, device: Device) -> float:
        """A ring leaves and enters a host once for each of its devices in the group, each time
        through another network card.
        """
        bandwidth = device.link_bytes_per_second
        if self.n_hosts > 1:
            bandwidth = min(bandwidth, self.per_host * device.network_bytes_per_second)
        return self.n * self.latency(device) + self.sent_bytes / bandwidth


def list_collectives(w: WeightBytes, data: int, fsdp: int, accumulate_steps: int = 1) -> list[Collective]:
    """Of `parallel.value_and_grad`, all in fp32. A block is gathered for each pass and its gradient
    reduce-scattered, in every part of a batch; shards are summed over `data`, and what is not split
    over all devices, once, at the end.
    """
    n, parts, in_host = w.calls, accumulate_steps, min(fsdp, DEVICES_PER_HOST)
    found = [
        Collective("all-gather", 2 * parts * n, 2 * parts * w.split, fsdp, in_host),
        Collective("reduce-scatter", parts * n, parts * w.split, fsdp, in_host),
        Collective("all-reduce", 1, w.split / fsdp, data, max(1, min(data, DEVICES_PER_HOST // fsdp))),
        Collective("all-reduce", 1, w.alike, data * fsdp, min(data * fsdp, DEVICES_PER_HOST)),
    ]
    return [c for c in found if c.size > 1 and c.array_bytes]


# --- the plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. The state is there always, the larger of `backward` and `update`
    beside it in turn.
    """

    count_weight_bytes: float
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
        accumulate_steps: parts that these are computed in.
        scores_stay: whether attention's scores never leave the chip. Those of `layers.attention`
            do, if only for the length of a block: a flash or cuDNN kernel's would not (Dao et al.
            2022).
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

    def _made(self, tensors: ForwardBytes) -> int:
        return tensors.made + (0 if self.scores_stay else tensors.scores)

    @cached_property
    def memory(self) -> Memory:
        here, c = self.weights.on_device, self.config
        block = count_block_bytes(c)  # computed again, beside what is kept of it already
        per_row = count_forward_bytes(c).kept + self._made(block) - (0 if c.remat else block.kept)
        cast = 0 if c.dtype == "float32" else jnp.dtype(c.dtype).itemsize
        # A block as gathered, as cast, and its gradient before it is scattered.
        copies = (FP32 if self.fsdp > 1 else 0) + cast + FP32
        return Memory(
            weights=here,
            average=here,
            moments=MOMENTS * here,
            gradients=here * (2 if self.accumulate_steps > 1 else 1),  # of all parts, and of one
            activations=self.rows / self.accumulate_steps * per_row,
            gathered=copies / FP32 * self.weights.gathered,
            update=UPDATE_TREES * here,
        )

    @property
    def flops(self) -> float:
        """Useful ones of one device, recomputation not counted."""
        forward = sum(training_flops.flops_by_module(self.config).values())
        return training_flops.TRAIN_PER_FORWARD * self.rows * forward

    @property
    def arithmetic_seconds(self) -> float:
        """Matrix products; with remat the forward pass twice."""
        forward = self.flops / training_flops.TRAIN_PER_FORWARD
        return (self.flops + self.config.remat * forward) / self.device.flops_per_second

    @property
    def memory_seconds(self) -> float:
        """Of moving the tensors between two operations and the trees of the update."""
        tensors = count_forward_bytes(self.config)
        made = self._made(tensors)
        moved = self.rows * (PASSES * made + PASSES_OF_REMAT * (made - tensors.kept))
        moved += UPDATE_PASSES * self.weights.on_device
        return moved / self.device.memory_bytes_per_second

    @property
    def compute_seconds(self) -> float:
        """Products and what lies between them take turns."""
        return self.arithmetic_seconds + self.memory_seconds

    @property
    def communication_seconds(self) -> float:
        return sum(c.seconds(self.device) for c in self.collectives)

    @property
    def seconds(self) -> float:
        """Expected, if no collective hides behind arithmetic: in a scan XLA has nothing to hide a
        block's gather behind.
        """
        return self.compute_seconds + self.communication_seconds

    @property
    def hidden_seconds(self) -> float:
        """If as much hides as can."""
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
    """DDP, FSDP in each host and FSDP over all, with and without remat, each with the largest power
    of two of rows that fits.
    """
    most = max(1, LARGEST_BATCH // n_devices)
    for fsdp in sorted({1, min(DEVICES_PER_HOST, n_devices), n_devices}):
        for remat in (False, True):
            c, fits = replace(config, remat=remat), None
            for rows in (2**i for i in range(int(math.log2(most)) + 1)):
                plan = Plan(c, device, n_devices // fsdp, fsdp, rows, scores_stay=scores_stay)
                if plan.memory.total > USABLE_MEMORY * device.memory_bytes:
                    break
                fits = plan
            if fits:
                yield fits


def choose_plan(
    config: ModelConfig, device: Device, n_devices: int, scores_stay: bool = False
) -> Plan | None:
    """The fastest that fits; None if nothing does."""
    plans = list_fitting_plans(config, device, n_devices, scores_stay)
    return max(plans, key=lambda plan: plan.images_per_second, default=None)


# --- the tables of docs/scaling.md ----------------------------------------------------------------

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: python scaling.py -->", "<!-- end of tables -->"
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
    """By name and pixels to a side; latents are an eighth of these."""
    found = {}
    for side in (256, 1024):
        xl = model_config("DiT-XL/2", image_size=side // 8, **XL)
        found |= {("DiT-XL/2", side): xl}
        found |= {("MMDiT-5B/2", side): replace(FIVE_BILLION, image_size=side // 8)}
    return found


def describe_mesh(plan: Plan) -> str:
    kinds = {1: "DDP", plan.n_devices: "FSDP"}
    return f"{kinds.get(plan.fsdp, 'hybrid')} {plan.data}×{plan.fsdp}"


def format_row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


COLUMNS = [
    *("devices", "mesh data×fsdp", "rows/device", "remat", "state GB", "temporaries GB"),
    *("gathered GB", "scattered GB", "summed GB", "step ms (all hidden)", "MFU", "images/s"),
]


def format_plan(plan: Plan) -> list[str]:
    m = plan.memory

    def moved(kind: str) -> str:
        return f"{sum(c.array_bytes for c in plan.collectives if c.kind == kind) / 1e9:.2f}"

    return [
        f"{plan.n_devices} {plan.device.name}",
        describe_mesh(plan),
        f"{plan.rows}",
        "yes" if plan.config.remat else "no",
        f"{m.state / 1e9:.1f}",
        f"{m.temporaries / 1e9:.1f}",
        *(moved(kind) for kind in ("all-gather", "reduce-scatter", "all-reduce")),
        f"{1e3 * plan.seconds:.0f} ({1e3 * plan.hidden_seconds:.0f})",
        f"{plan.mfu:.0%}",
        f"{plan.images_per_second:,.0f}",
    ]


def format_plans(plans: list[tuple[str, Plan | None]]) -> list[str]:
    """Each with what its devices are called, where nothing fits."""
    lines = [format_row(*COLUMNS), format_row(*["---"] * len(COLUMNS))]
    for words, plan in plans:
        blank = [words, "does not fit", *["—"] * (len(COLUMNS) - 2)]
        lines.append(format_row(*(format_plan(plan) if plan else blank)))
    return lines


def make_tables() -> str:
    lines = ["### The models", ""]
    columns = ("model", "width", "depth", "parameters", "tokens", "forward GFLOP/image")
    lines += [format_row(*columns, "kept MB/image", "scores MB/image"), format_row(*["---"] * 8)]
    for (name, side), c in list_models().items():
        flops, tensors = sum(training_flops.flops_by_module(c).values()), count_forward_bytes(c)
        count = f"{count_params(c):,}"
        facts = (f"{name}, {side}²", c.width, c.depth, count, math.prod(c.grid))
        amounts = (f"{x:,.0f}" for x in (flops / 1e9, tensors.kept / 1e6, tensors.scores / 1e6))
        lines.append(format_row(*facts, *amounts))
    for side, scores_stay in ((256, False), (1024, False), (1024, True)):
        for name in ("DiT-XL/2", "MMDiT-5B/2"):
            title = "if scores stayed on the chip" if scores_stay else "the code as it is"
            lines += ["", f"### {name} at {side}², {title}", ""]
            lines += format_plans(
                [
                    (f"{n} {device.name}", choose_plan(list_models()[name, side], device, n, scores_stay))
                    for device in DEVICES.values()
                    for n in (8, 64, 1024)
                ]
            )
    for name in ("DiT-XL/2", "MMDiT-5B/2"):
        lines += ["", f"### {name} at 256² on 64 H100: the fastest of each kind that fits", ""]
        compared = []
        plans = list(list_fitting_plans(list_models()[name, 256], DEVICES["H100"], 64))
        for fsdp in (1, 8, 64):
            of_it = [plan for plan in plans if plan.fsdp == fsdp]
            best = max(of_it, key=lambda plan: plan.images_per_second, default=None)
            compared.append((f"64 H100, {64 // fsdp}×{fsdp}", best))
        lines += format_plans(compared)
    return "\n".join(lines)


def refresh_tables(document: str) -> str:
    """The document with its tables computed anew."""
    before, _, rest = document.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{make_tables()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    DOCUMENT.write_text(refresh_tables(DOCUMENT.read_text()))
