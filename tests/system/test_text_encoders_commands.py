"""A process that has encoded captions can fork in silence."""

import subprocess
import sys

from commands import ROOT
from text_encoders_cases import (
    clip,  # noqa: F401
    one_thread,  # noqa: F401
)


def test_a_fork_after_encoding_prints_nothing(clip):
    """Tokenizers would warn. In a process of its own, because JAX warns too."""
    code = f"""
import os
from data.text_encoders import TextEncoders
TextEncoders([{clip!r}]).encode(["a", "b"])
os.fork()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
