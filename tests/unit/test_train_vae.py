"""The losses of an autoencoder have the gradient of their parts, on any number of devices."""

import ast
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from train_vae_cases import (
    whole,  # noqa: F401
)

from networks.autoencoder import Moments, sample_latents
from runtime import files
from training.autoencoder import losses
from training.autoencoder.config import VaeConfig, largest_norm_groups


def test_every_field_is_read():
    """A flag that nothing reads is a promise that nobody keeps."""
    read = set()
    modules = [f"training/autoencoder/{name}.py" for name in ("config", "losses", "trainer")]
    for module in [
        *modules,
        *(f"training/{name}.py" for name in ("loop", "prepare", "resolve", "session")),
    ]:
        tree = ast.parse((ROOT / module).read_text())
        tree.body = [
            node for node in tree.body if getattr(node, "name", "") != "validate_vae_config"
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
                read |= {node.attr} if owner in ("c", "config") else set()
    assert {field.name for field in fields(VaeConfig)} <= read


def test_the_noise_of_a_row_depends_on_its_index_only():
    moments = Moments(jnp.zeros((4, 2, 2, 3)), jnp.zeros((4, 2, 2, 3)))
    key = jax.random.key(0)
    z = sample_latents(moments, losses.keys_by_row(key, jnp.arange(4)))
    part = Moments(*(x[2:] for x in moments))
    of_part = sample_latents(part, losses.keys_by_row(key, jnp.arange(2, 4)))
    np.testing.assert_array_equal(of_part, z[2:])
    assert len(np.unique(np.asarray(z))) == z.size


@pytest.mark.parametrize(
    "widths, groups", [((128, 256, 512, 512), 32), ((32, 64), 8), ((8, 12), 1), ((6,), 1)]
)
def test_a_norm_group_has_at_least_four_channels(widths, groups):
    assert largest_norm_groups(widths) == groups


# --- an export is complete or absent --------------------------------------------------------------


def test_a_folder_replaces_another_only_once_it_is_complete(tmp_path):
    def write(content: str, fail: bool = False):
        with files.atomic_folder(tmp_path / "x") as folder:
            (folder / "file").write_text(content)
            if fail:
                raise RuntimeError

    write("old")
    with pytest.raises(RuntimeError):
        write("half", fail=True)
    assert (tmp_path / "x" / "file").read_text() == "old"
    write("new")
    assert (tmp_path / "x" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    (tmp_path / ".x.999999999.tmp").mkdir()  # of a process that was killed
    files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
