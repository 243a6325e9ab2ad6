"""Flags of the command; the same scores for the same images from every source; sets of images."""

import nano  # noqa: F401  (its sizes)
from evaluate_cases import (
    digits,  # noqa: F401
    evaluate_pixels,
    scores,
)


def test_real_images_are_at_distance_0_from_themselves(digits, tmp_path):
    found = evaluate_pixels(tmp_path / "a", dataset_name="digits", reference=digits, n_features=300)
    assert abs(found["pixel_frechet"]) < 1e-9
    assert found["pixel_precision"] == found["pixel_recall"] == 1
    other = evaluate_pixels(tmp_path / "a", dataset_name="digits", split="test", reference=digits)
    assert other["pixel_frechet"] > 0.01
    assert 0.5 < other["pixel_precision"] < 1
    bare = evaluate_pixels(tmp_path / "a", dataset_name="digits", reference=digits, n_features=0)
    assert scores(bare).keys() == {"pixel_frechet"}
    assert len((tmp_path / "a").read_text().splitlines()) == 3
