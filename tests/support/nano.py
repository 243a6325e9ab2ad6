"""`train.py` with one more size, small enough for tests: DiT-Nano and MMDiT-Nano."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import model

model.MODELS |= {
    f"DiT-Nano/{p}": {"width": 32, "depth": 2, "n_heads": 2, "patch_size": p} for p in (4, 8)
}
model.MODELS |= {
    f"MM{name}": shape | {"block": model.JOINT, "qk_norm": True, "position": "cropped"}
    for name, shape in model.MODELS.items()
    if "Nano" in name
}

if __name__ == "__main__":
    import train
    from runtime import cli, processes

    cli.run_command(train.main, processes.exit_process)
