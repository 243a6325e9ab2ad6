"""Instruction sets are read from /proc/cpuinfo."""

import pytest

from runtime import processor

AMD = "processor\t: 0\nmodel name\t: AMD EPYC 9B14\nflags\t\t: fpu avx2 fma avx512f avx512_bf16\n\n"
OLD = "processor\t: 0\nmodel name\t: Intel(R) Core(TM) i5\nflags\t\t: fpu avx2 fma\n\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd sve bf16\n\n"


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """Return a function that takes a text in place of /proc/cpuinfo."""

    def take(text):
        path = tmp_path / "cpuinfo"
        path.write_text(text + text.replace("avx512_bf16", ""))  # of two cores
        monkeypatch.setattr(processor, "CPUINFO", path)
        processor._cpuinfo.cache_clear()

    yield take
    monkeypatch.undo()
    processor._cpuinfo.cache_clear()


@pytest.mark.parametrize(
    ("text", "instruction_sets", "multiplies_bf16"),
    [
        (AMD, ("avx2", "fma", "avx512f", "avx512_bf16"), True),
        (OLD, ("avx2", "fma"), False),
        (ARM, ("asimd", "sve", "bf16"), False),
    ],
)
def test_instruction_sets(cpuinfo, text, instruction_sets, multiplies_bf16):
    cpuinfo(text)
    assert processor.instruction_sets() == instruction_sets
    assert processor.multiplies_bf16() is multiplies_bf16


def test_the_name_of_the_model(cpuinfo):
    cpuinfo(AMD)
    assert processor.processor_name().endswith(" cores of AMD EPYC 9B14")


def test_without_cpuinfo_no_instruction_set_is_known(tmp_path, monkeypatch, cpuinfo):
    cpuinfo("")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "nowhere")
    assert processor.instruction_sets() == () and not processor.multiplies_bf16()
    assert " cores of " in processor.processor_name()
