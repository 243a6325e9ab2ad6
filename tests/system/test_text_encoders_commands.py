"""Tokens are what the tower itself gives for a caption alone; towers are joined as in SD3."""

import subprocess
import sys

from commands import ROOT
from text_encoders_cases import (
    clip,  # noqa: F401
    one_thread,  # noqa: F401
)


def test_a_fork_after_encoding_says_nothing(clip):
    """Tokenizers would warn of it. In a process of its own, because JAX warns too."""
    code = f"import os, text; text.Towers([{clip!r}]).encode(['a', 'b']); os.fork()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
