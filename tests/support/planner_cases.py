"""Inputs and helpers shared by the tests of planner."""

from dataclasses import replace

from benchmarks.planner import Device, Plan
from model import JOINT, ModelConfig

MESHES = {"DDP": (8, 1), "hybrid": (2, 4), "FSDP": (1, 8)}
SMALL = ModelConfig(
    width=128,
    depth=5,
    n_heads=4,
    patch_size=2,
    image_size=8,
    channels=1,
    out_channels=1,
    n_classes=7,
    remat=True,
)
CONFIGS = {"DiT": SMALL, "MMDiT": replace(SMALL, block=JOINT, qk_norm=True)}
UNIT = Device("unit", 1.0, 2.0, 100.0, 1.0, 4.0, 1.0, 0.5, 0.01, 0.1)


def plan(config, mesh, rows=4):
    return Plan(config, UNIT, *MESHES[mesh], rows)
