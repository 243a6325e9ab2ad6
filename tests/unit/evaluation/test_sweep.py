"""Several guidance scales in one evaluation: the scores of single ones, recorded one by one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_cases import digits, evaluate_pixels, scores  # noqa: F401
from PIL import Image
from tiny_models import tiny_model

import evaluate
from data import image_sets
from evaluate import EvaluateConfig
from evaluation import sweep
from evaluation.comparison import Comparison
from evaluation.features import build_pixel_extractor
from evaluation.reference import read_reference
from evaluation.scores import find_scores
from inference import curves
from inference.trained_model import TrainedModel
from runtime import parallel
from runtime.errors import UserError

LIMITS = {"interval": (0.2, 1.0), "guided_channels": 1}
# Facts of a process, and of where its files are.
OF_A_PROCESS = {"command", "made"}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def settled(record: dict) -> dict:
    """A record without what two commands cannot share."""
    card = {name: value for name, value in record["card"].items() if name not in OF_A_PROCESS}
    return record | {"card": card | {"config": card["config"] | {"out": None}}}


@pytest.fixture
def flags(digits, monkeypatch):
    """Flags of an evaluation of a tiny model."""
    model = tiny_model()
    monkeypatch.setattr(TrainedModel, "from_run", lambda *_, **__: model)
    return {"run": Path("run"), "n": 20, "reference": digits, "batch_size": 8}


def test_each_scale_has_the_record_of_a_single_evaluation(flags, tmp_path, capsys):
    """Bit for bit; scale 1 has it without the limits of guidance, which a single one refuses."""
    out = tmp_path / "sweep.jsonl"
    scales = (1.0, 2.0, 1.25)
    evaluate_pixels(out, cfg_scale=scales, **LIMITS, **flags)
    printed = capsys.readouterr().out
    records = lines(out)
    assert len(records) == 3
    for scale, record in zip(scales, records, strict=True):
        limits = {} if scale == 1 else LIMITS
        single = evaluate_pixels(tmp_path / "a", cfg_scale=(scale,), **limits, **flags)
        assert settled(record) == settled(single)
        assert record["card"]["config"]["cfg_scale"] == scale
    assert len({record["pixel_frechet"] for record in records}) == 3
    table = printed.splitlines()[-5:-1]
    assert [row.split()[0] for row in table] == ["cfg_scale", "1", "2", "1.25"]
    assert [float(row.split()[1]) for row in table[1:]] == pytest.approx(
        [record["pixel_frechet"] for record in records], rel=1e-5
    )
    with Image.open(tmp_path / "sweep-guidance.png") as image:
        assert image.width == curves.WIDTH * curves.DPI
    with pytest.raises(UserError, match="--interval: has no effect without guidance"):
        evaluate_pixels(tmp_path / "a", cfg_scale=(1.0,), interval=(0.2, 1.0), **flags)


def test_a_sweep_resumes_after_the_scales_that_are_recorded(flags, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "a.jsonl", tmp_path / "whole.jsonl"
    scales = (1.0, 2.0, 3.0)
    evaluate_pixels(whole, cfg_scale=scales, **flags)
    score, calls = Comparison.score, []

    def score_or_stop(self, images):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(images.card["cfg_scale"])
        return score(self, images)

    monkeypatch.setattr(Comparison, "score", score_or_stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_pixels(out, cfg_scale=scales, **flags)
    assert len(lines(out)) == len(calls) == 2
    with out.open("a") as file:
        file.write('{"pixel_frechet": 0.\n')  # torn by a kill

    calls.clear()
    capsys.readouterr()
    evaluate_pixels(out, cfg_scale=scales, **flags)
    assert calls == [3.0]
    printed = capsys.readouterr().out
    for scale in (1, 2):
        assert f"cfg_scale {scale}: recorded in {out} already, not evaluated again\n" in printed
    records = [json.loads(line) for line in out.read_text().splitlines() if "card" in line]
    assert [*map(settled, records)] == [*map(settled, lines(whole))]


@pytest.mark.parametrize("change", [{"n": 21}, {"seed": 1}, {"n_steps": 2}, {"n_features": 7}])
def test_only_the_same_evaluation_is_left_out(flags, tmp_path, change):
    out = tmp_path / "a.jsonl"
    evaluate_pixels(out, cfg_scale=(1.0, 2.0), **flags)
    evaluate_pixels(out, cfg_scale=(1.0, 2.0), **flags | {"batch_size": 16})
    assert len(lines(out)) == 2
    evaluate_pixels(out, cfg_scale=(2.0, 1.0), **flags | change)
    assert len(lines(out)) == 4


def test_a_single_scale_is_evaluated_again(flags, tmp_path):
    for n in (1, 2):
        evaluate_pixels(tmp_path / "a", cfg_scale=(2.0,), **flags)
        assert len(lines(tmp_path / "a")) == n


def test_each_scale_writes_its_own_samples(flags, tmp_path, capsys):
    """A recorded scale whose samples are asked for and missing is sampled again."""
    out = tmp_path / "a.jsonl"
    evaluate_pixels(out, cfg_scale=(1.0, 2.5), **flags)
    evaluate_pixels(out, cfg_scale=(1.0, 2.5), samples=tmp_path / "x.npz", **flags)
    assert {path.name for path in tmp_path.glob("*.npz")} == {"x-1.npz", "x-2.5.npz"}
    for record in lines(out)[2:]:
        config = record["card"]["config"]
        with np.load(config["samples"]) as arrays:
            assert arrays["arr_0"].shape == (20, 8, 8, 1)
        npz = {"npz": Path(config["samples"]), "reference": flags["reference"]}
        assert scores(evaluate_pixels(tmp_path / "b", **npz)) == pytest.approx(scores(record))
    capsys.readouterr()
    evaluate_pixels(out, cfg_scale=(1.0, 2.5), samples=tmp_path / "x.npz", **flags)
    assert capsys.readouterr().out.count("not evaluated again") == 2


def test_scales_share_the_weak_model(flags, tmp_path, monkeypatch):
    opened = []

    def open_model(folder, **_):
        opened.append(folder)
        return tiny_model()

    monkeypatch.setattr(TrainedModel, "from_run", open_model)
    evaluate_pixels(tmp_path / "a", cfg_scale=(1.0, 2.0, 3.0), guide="weak", **flags)
    assert opened == [Path("run"), Path("weak")]
    assert [line["card"]["pictures"]["guide_scale"] for line in lines(tmp_path / "a")] == [2.0] * 3


def test_the_features_of_a_reference_are_computed_once(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1)).astype(np.uint8)
    path = tmp_path / "adm.npz"
    np.savez(path, arr_0=images, mu=np.zeros(64), sigma=np.eye(64))
    extractor = build_pixel_extractor(parallel.make_mesh())
    comparison = Comparison(read_reference(path), extractor, 8, n_features=10, seed=0)
    of_npz = image_sets.image_set_from_npz
    opened = []

    def open_npz(path):
        opened.append(path)
        return of_npz(path)

    monkeypatch.setattr(image_sets, "image_set_from_npz", open_npz)
    first, second = (comparison.score(of_npz(path)) for _ in range(2))
    assert opened == [path] and first == second and first["pixel_precision"] == 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cfg_scale": (1.5, 2.0, 1.5)}, "--cfg_scale 1.5 is given twice"),
    ({"cfg_scale": (1.5, float("inf"))}, "--cfg_scale inf: must be finite"),
    (
        {"cfg_scale": (1.5, 2.0), "reference": None, "make_reference": Path("x.npz")},
        "--make_reference takes one --cfg_scale, not 2",
    ),
    ({"cfg_scale": (1.5, 2.0), "run": None, "npz": Path("b.npz")}, "--cfg_scale needs --run"),
    (
        {"cfg_scale": (1.5, 2.0), "samples": Path("x.npz"), "reference": Path("x-2.npz")},
        "--samples and --reference name the same file",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_sweep_is_refused_before_anything_is_read(changes, message):
    fields = {"run": Path("a"), "reference": Path("r.npz"), "features": "pixels"}
    with pytest.raises(UserError, match=message):
        evaluate.main(EvaluateConfig(**fields | changes))


def test_a_scale_out_of_range_is_refused_before_any_is_sampled(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainedModel, "sample", None)
    with pytest.raises(UserError, match=r"cfg_scale 1e\+39: must be finite in float32"):
        evaluate_pixels(tmp_path / "a", cfg_scale=(2.0, 1e39), **flags)


# --- texts and the plot ---------------------------------------------------------------------------


def test_two_scales_never_have_one_name():
    assert [*map(sweep.format_scale, (1.0, 1.25, 10.0))] == ["1", "1.25", "10"]
    assert sweep.format_scale(1.00000001) == "1.00000001"


def test_a_table_has_a_row_for_each_scale():
    table = sweep.format_table([1.0, 12.5], [{"fid": 3.25}, {"fid": 10.5, "kid": 0.001}])
    assert table.splitlines() == [
        "cfg_scale   fid    kid",
        "        1  3.25      -",
        "     12.5  10.5  0.001",
    ]


def test_the_plot_shows_the_scores_in_the_order_of_the_scales():
    rows = [{"fid": 5.0, "kid": 2.0, "kid_std": 0.5}, {"fid": 7.0, "kid": 1.0, "kid_std": 0.25}]
    figure = curves.plot_scores([2.0, 1.0], rows)
    axes = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_visible()}
    assert axes.keys() == {"fid", "kid"}
    line = {name: np.array(ax.get_lines()[0].get_xydata()).tolist() for name, ax in axes.items()}
    assert line == {"fid": [[1, 7], [2, 5]], "kid": [[1, 1], [2, 2]]}
    bars: Any = axes["kid"].collections[0]
    assert bars.get_segments()[0].tolist() == [[1, 0.75], [1, 1.25]]


def test_a_record_of_an_older_version_is_evaluated_again(tmp_path):
    card = {"pictures": {}, "features": {}, "reference": {"sha256": "a"}}
    (tmp_path / "a").write_text('{"fid": 1.0, "card": {"pictures": {}}}\n[]\n3\n{"fid": 2.0}\n')
    config = {"config": {"n_features": 3, "seed": 0}}
    assert find_scores(tmp_path / "a", card | config) is None
    assert find_scores(tmp_path / "b", card | config) is None
