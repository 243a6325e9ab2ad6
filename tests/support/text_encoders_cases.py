"""Inputs and helpers shared by the tests of data.text_encoders."""

import pytest
from tiny_text_encoders import save_clip

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of models this small wait for one another, for long where tests run side by side."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders") / "clip"
    return save_clip(folder)
