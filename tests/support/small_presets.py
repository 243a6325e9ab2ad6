"""A script of the repository, with its smallest presets made smaller: to compile torch's blocks
one by one takes a minute.

    python tests/support/small_presets.py SCRIPT FLAG…
"""

import runpy
import sys

from nano import model

model.MODELS |= {f"{kind}-Ti/8": model.MODELS[f"{kind}-Nano/8"] for kind in ("DiT", "MMDiT")}

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
