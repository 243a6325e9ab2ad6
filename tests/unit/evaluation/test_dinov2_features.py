"""Features of FD-DINOv2 as dgm-eval computes them; references that name their encoder."""

import json
from contextlib import contextmanager
from dataclasses import replace

import jax
import nano  # noqa: F401  (its sizes)
import numpy as np
import pytest
from dinov2_cases import features_of_torch, torch, write_dinov2
from evaluate_cases import scores
from inception_cases import wave_images
from PIL import Image

import evaluate
from evaluate import EvaluateConfig
from evaluation import features
from pretrained.dinov2 import IMAGENET_MEAN, IMAGENET_STD, read_dinov2
from runtime import parallel, processes
from runtime.errors import UserError


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder, and transformers' model of it."""
    folder = tmp_path_factory.mktemp("dinov2")
    return folder, write_dinov2(folder)


def test_features_are_those_of_dgm_eval(encoder):
    """Stein et al. 2023: Pillow's bicubic on bytes, ImageNet's normalisation, the class token of
    the original's code, which resizes its positions by a scale of 16.1 / n.
    """
    folder, model = encoder
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    extract = features.build_dinov2_extractor(read_dinov2(str(folder)), mesh)
    table = model.embeddings.position_embeddings[:, 1:].reshape(1, 5, 5, -1).permute(0, 3, 1, 2)
    table = torch.nn.functional.interpolate(table, scale_factor=16.1 / 5, mode="bicubic")
    first = model.embeddings.position_embeddings[:, :1]
    resized = torch.cat([first, table.flatten(2).transpose(1, 2)], 1)
    original = model.embeddings.position_embeddings
    model.embeddings.position_embeddings = torch.nn.Parameter(resized)
    for size, channels in (((300, 260), 3), ((32, 32), 1)):
        images = wave_images(3, *size, channels)
        rgb = [Image.fromarray(x.squeeze()).convert("RGB") for x in images]
        small = [np.asarray(x.resize((224, 224), Image.Resampling.BICUBIC)) for x in rgb]
        x = (np.stack(small) / 255 - IMAGENET_MEAN) / np.array(IMAGENET_STD)
        expected, _ = features_of_torch(model, x.astype(np.float32))
        (found,) = extract(iter([images]), batch_size=3)
        np.testing.assert_allclose(found.pool, expected, atol=2e-5)
        assert extract.feature_width((*size, channels)) == 128
    model.embeddings.position_embeddings = original


def test_a_reference_names_its_encoder_and_refuses_another(encoder, tmp_path, capsys):
    folder, model = encoder
    real, out = tmp_path / "real.npz", tmp_path / "record"
    np.savez(tmp_path / "images.npz", arr_0=wave_images(12, 20, 20))
    config = EvaluateConfig(
        npz=tmp_path / "images.npz", features="dinov2", encoder=str(folder), batch_size=8
    )
    evaluate.main(replace(config, make_reference=real))
    printed = capsys.readouterr().out
    assert "warning: papers measure FD-DINOv2 with dinov2-large, and this encoder has 2" in printed
    config = replace(config, reference=real, out=out)
    evaluate.main(config)
    record = json.loads(out.read_text())
    assert scores(record) == {
        "fd_dinov2": pytest.approx(0, abs=1e-6),
        "kd_dinov2": pytest.approx(record["kd_dinov2"]),
        "kd_dinov2_std": pytest.approx(record["kd_dinov2_std"]),
        "dinov2_precision": 1,
        "dinov2_recall": 1,
    }
    card = record["card"]["features"]
    assert card["preparation"] == "dgm_eval" and card["encoder"]["position_offset"] == 0.1
    assert card["weights"] == read_dinov2(str(folder)).hash

    with pytest.raises(UserError, match="holds features 'dinov2', not 'pixels'"):
        evaluate.main(replace(config, features="pixels", encoder=None))
    with torch.no_grad():
        model.encoder.layer[1].layer_scale2.lambda1[3] += 1
    model.save_pretrained(tmp_path / "other")
    other = str(tmp_path / "other")
    message = f"made with other weights than '{other}': their hash is {card['weights'][:12]}…, not"
    with pytest.raises(UserError, match=message):
        evaluate.main(replace(config, encoder=other))


@pytest.mark.parametrize(
    ("space", "reader"), [("dinov2", "read_dinov2"), ("inception", "load_inception")]
)
def test_processes_read_weights_one_after_the_other(space, reader, monkeypatch):
    """The first may download them."""
    events = []

    @contextmanager
    def first_then_others():
        events.append("begin")
        try:
            yield
        finally:
            events.append("end")

    def read(_):
        events.append("read")
        raise UserError("no such weights")

    monkeypatch.setattr(processes, "first_then_others", first_then_others)
    monkeypatch.setattr(features, reader, read)
    with pytest.raises(UserError, match="no such weights"):
        features.build_matching_extractor(None, parallel.make_mesh(), space=space, weights="x")
    assert events == ["begin", "read", "end"]
