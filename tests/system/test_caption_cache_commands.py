"""Each caption is encoded once and read back bit for bit, whatever happens in between."""

import subprocess
import sys

from caption_cache_cases import CAPTIONS, FakeEncoders, assert_holds, open_store
from commands import ROOT


def test_two_processes_at_once_leave_whole_files(tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests/support")!r}]
from caption_cache_cases import CAPTIONS, FakeEncoders, assert_holds, open_store
from data import caption_cache
caption_cache.CAPTIONS_PER_SHARD = 1
assert_holds(open_store({str(tmp_path)!r}, CAPTIONS, FakeEncoders()), CAPTIONS)
"""
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert_holds(open_store(tmp_path), CAPTIONS)
    assert not list(tmp_path.rglob(".*"))  # nothing half-written is left


def test_a_complete_cache_imports_neither_torch_nor_transformers(tmp_path):
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text("{}")
    open_store(tmp_path / "cache", CAPTIONS, FakeEncoders(), [str(encoder)], None)
    code = f"""
import sys
from data.caption_cache import CaptionStore
wanted = {CAPTIONS!r}
store = CaptionStore.open({str(tmp_path / "cache")!r}, wanted, [{str(encoder)!r}])
assert store(store.caption_ids(wanted)).mask.sum() == {sum(map(len, CAPTIONS))}
assert not {{"torch", "transformers", "jax"}} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)
