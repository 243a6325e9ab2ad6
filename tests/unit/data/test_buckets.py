"""Each image goes to the nearest shape, and comes once in every epoch of its bucket."""

import math
import shutil

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Image
from hub_copies import image_file
from pipeline_cases import batches_equal, own_cache  # noqa: F401

from data.batch import Batch
from data.buckets import Buckets, assign_buckets, choose_shapes, resolve_shapes
from data.image_buckets import open_buckets, read_sides, select_bucket
from data.images import decode_image
from data.load import open_dataset
from data.pipeline import Pipeline
from data.shuffle import BucketOrder
from runtime.errors import UserError
from runtime.image_size import ImageSize

SQUARE = ImageSize(256, 256)
SHAPES = (ImageSize(12, 8), ImageSize(8, 8), ImageSize(8, 12))


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5, 9])
@pytest.mark.parametrize("multiple", [4, 16])
def test_chosen_shapes_have_the_area_asked_for_and_come_with_their_transposes(n, multiple):
    shapes = choose_shapes(n, SQUARE, multiple)
    assert len(shapes) == n and {ImageSize(*shape.sides[::-1]) for shape in shapes} == set(shapes)
    proportions = np.array([math.log2(shape.width / shape.height) for shape in shapes])
    np.testing.assert_allclose(proportions, np.linspace(-1, 1, n), atol=0.1)
    for shape in shapes:
        assert shape.divided(multiple) and 0.8 * 256**2 <= math.prod(shape.sides) <= 256**2


def test_one_bucket_is_the_size_itself_and_coarse_patches_allow_fewer():
    size = ImageSize(256, 192)
    assert choose_shapes(1, size, 16) == (size,)
    assert size in choose_shapes(5, size, 16)
    assert len(choose_shapes(9, ImageSize(8, 8), 4)) < 9


def test_words_name_shapes_or_their_number():
    assert resolve_shapes(["3"], SQUARE, 16) == choose_shapes(3, SQUARE, 16)
    assert resolve_shapes(["320x192", "256"], SQUARE, 16) == (ImageSize(320, 192), SQUARE)
    for words, message in (
        (["wide"], "--buckets wide: takes one number, such as 5, or several shapes"),
        (["0"], "--buckets 0: must be an odd number up to 31"),
        (["4"], "--buckets 4: must be an odd number"),
        (["320x190", "256"], "--buckets 320x190: both sides must be multiples of 16"),
        (["256", "256x256"], "a shape is named twice"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_shapes(words, SQUARE, 16)


# --- images ---------------------------------------------------------------------------------------


def test_images_go_to_the_nearest_proportions_and_their_loss_is_counted():
    sides = np.array([[100, 100], [300, 200], [200, 310], [100, 110], [0, 0], [400, 100]], np.int32)
    buckets = assign_buckets(sides, SHAPES)
    assert buckets.ids.tolist() == [1, 0, 2, 1, 1, 0] and buckets.sizes == (2, 3, 1)
    # Of 200 × 310 stay 200 × 300, of 100 × 110 stay 100 × 100, of 400 × 100 stay 150 × 100.
    expected = [0, 0, 10 / 310, 10 / 110, 0, 250 / 400]
    assert buckets.cropped is not None
    np.testing.assert_allclose(buckets.cropped, expected, atol=1e-12)
    assert (
        buckets.describe(ImageSize(8, 8))[1]
        == "  12x8: 2 images, 31.2 % of their pixels cropped away"
    )


def test_bars_of_a_letterbox_are_as_many_as_the_pixels_that_a_crop_loses():
    sides = np.array([[40, 60], [30, 10], [77, 50]], np.int32)
    shapes = (ImageSize(300, 200), ImageSize(200, 300))
    buckets = assign_buckets(sides, shapes)
    assert buckets.cropped is not None
    for (height, width), bucket, share in zip(sides, buckets.ids, buckets.cropped):
        white = PIL.Image.new("L", (width, height), 255)
        framed = decode_image(white, channels=1, size=shapes[bucket], letterbox=True)
        assert (framed == 0).mean() == pytest.approx(share, abs=0.005)
    line = buckets.describe(shapes[0], letterbox=True)[1]
    assert line.startswith("  300x200: 2 images, ") and line.endswith(" % in black bars")


def test_too_few_images_for_a_batch_move_to_the_nearest_other_bucket():
    sides = np.array([[10, 10]] * 5 + [[12, 8]] * 2 + [[8, 12]] * 6, np.int32)
    buckets = assign_buckets(sides, SHAPES, batch_size=4)
    assert buckets.shapes == SHAPES[1:] and buckets.sizes == (7, 6)
    assert buckets.moved == ((SHAPES[0], 2),)
    assert "2 images of 12x8, too few for a batch, moved" in buckets.describe(ImageSize(8, 8))[-1]
    assert "which no bucket has" in buckets.describe(ImageSize(8, 16))[-1]
    assert assign_buckets(sides, SHAPES, batch_size=100).sizes == (13,)


def test_an_image_that_moves_twice_is_counted_once():
    sides = np.array([[10, 10]] * 3 + [[12, 8]] * 2 + [[8, 12]] * 6, np.int32)
    buckets = assign_buckets(sides, SHAPES, batch_size=6)
    assert buckets.shapes == SHAPES[2:]
    assert buckets.moved == ((SHAPES[0], 2), (SHAPES[1], 3))


# --- order ----------------------------------------------------------------------------------------


def test_batches_of_a_bucket_follow_each_other_and_buckets_keep_their_shares():
    order = BucketOrder((37, 5, 18), 4)
    n_seen = np.zeros(3, int)
    for step in range(300):
        bucket, index = order.find(3, step)
        assert index == n_seen[bucket]
        n_seen[bucket] += 1
    assert abs(n_seen - 300 * np.array(order.sizes) / 60).max() < 5
    runs = [order.find(3, step)[0] for step in range(60)]
    assert len(set(runs[:8])) > 1 and runs != [order.find(4, step)[0] for step in range(60)]


def test_one_bucket_is_no_bucket():
    order = BucketOrder((37,), 4)
    assert [order.find(0, step) for step in range(50)] == [(0, step) for step in range(50)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder of 40 images of several proportions, in two classes."""
    folder, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    sizes = [(9, 9)] * 13 + [(8, 13)] * 18 + [(20, 15)] * 9
    for i, (height, width) in enumerate(sizes):
        path = folder / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image_file(rng, size=(width, height)))
    return folder


def test_an_evaluation_of_one_shape_keeps_the_shapes_of_the_training(mixed, tmp_path):
    rng = np.random.default_rng(1)
    shutil.copytree(mixed, tmp_path / "train")
    for i in range(6):
        path = tmp_path / "val" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_file(rng, size=(13, 8)))
    source = open_dataset(f"folder:{tmp_path}", image_size=8)
    buckets = open_buckets(read_sides(source), SHAPES, batch_size=4)
    assert buckets["eval"].shapes == SHAPES and buckets["eval"].sizes == (0, 0, 6)
    for in_memory in (True, False):
        pipeline = Pipeline(
            source, batch_size=4, seed=0, buckets=buckets, in_memory=in_memory, n_workers=0
        )
        assert {batch.image.shape for batch in pipeline.eval_batches(3)} == {(4, 8, 12, 3)}
    parts = [select_bucket(source, buckets, i) for i in range(3)]
    assert [len(part.train) for part in parts] == list(buckets["train"].sizes)
    assert [len(part.eval) for part in parts] == [0, 0, 6]
    assert parts[2].eval.decode(np.arange(6)).shape == (6, 8, 12, 3)


def test_streamed_images_have_the_buckets_of_stored_ones_and_come_once_an_epoch(tmp_path):
    rng = np.random.default_rng(2)
    (tmp_path / "data").mkdir()
    sizes = [(9, 9), (13, 8), (8, 13)] * 20
    files = [{"bytes": image_file(rng, size=size), "path": None} for size in sizes]
    data = Dataset.from_dict({"img": files}, features=Features({"img": Image()}))
    data.to_parquet(tmp_path / "data/train.parquet", batch_size=4)
    pipelines = []
    for streaming in (False, True):
        source = open_dataset(f"folder:{tmp_path}", streaming=streaming, image_size=8)
        buckets = open_buckets(read_sides(source), SHAPES, batch_size=4)
        options = {"shuffle_buffer": 12, "n_workers": 0, "buckets": buckets}
        pipelines.append(Pipeline(source, batch_size=4, seed=1, **options))
        sides = [sizes[row][::-1] for row in source.train.rows]
        assert [SHAPES[i].width > 8 for i in buckets["train"].ids] == [w == 13 for _, w in sides]
    streamed = pipelines[1]
    buckets = streamed._buckets["train"]
    chains = {bucket: [] for bucket in range(3)}
    for step in range(60):
        rows = streamed.batch_rows(step)
        (bucket,) = set(buckets.ids[rows].tolist())
        chains[bucket] += rows.tolist()
    for bucket, chain in chains.items():
        n = buckets.sizes[bucket]
        for epoch in np.array(chain[: len(chain) // n * n]).reshape(-1, n):
            assert sorted(epoch) == np.flatnonzero(buckets.ids == bucket).tolist()
    batch = streamed.train_batch(3)
    expected = streamed._decoders["train"].of_bucket[buckets.ids[streamed.batch_rows(3)[0]]]
    np.testing.assert_array_equal(batch.image, expected.split.decode(streamed.batch_rows(3)))


@pytest.fixture
def bucketed(mixed):
    """Make a pipeline of that folder with buckets."""
    source = open_dataset(f"folder:{mixed}", image_size=8, channels=3, eval_split="none")
    buckets = open_buckets(read_sides(source), SHAPES, batch_size=4)

    def make(**options):
        return Pipeline(source, **{"batch_size": 4, "seed": 1, "buckets": buckets} | options)

    return make


def test_each_row_comes_once_in_every_epoch_of_its_bucket(bucketed):
    pipeline = bucketed()
    buckets = pipeline._buckets["train"]
    chains = {bucket: [] for bucket in range(3)}
    for step in range(60):
        rows = pipeline.batch_rows(step)
        (bucket,) = set(buckets.ids[rows].tolist())
        chains[bucket] += rows.tolist()
    for bucket, chain in chains.items():
        n, expected = buckets.sizes[bucket], np.flatnonzero(buckets.ids == bucket)
        assert len(chain) >= 2 * n
        for epoch in np.array(chain[: len(chain) // n * n]).reshape(-1, n):
            assert sorted(epoch) == expected.tolist()


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_batch_is_its_rows_at_the_shape_of_their_bucket(bucketed, in_memory):
    pipeline = bucketed(in_memory=in_memory, n_workers=0)
    split, buckets = pipeline.source.train, pipeline._buckets["train"]
    for step, batch in enumerate(pipeline.train_batches(3, 9), start=3):
        rows = pipeline.batch_rows(step)
        shape = buckets.shapes[buckets.ids[rows[0]]]
        assert batch.image.shape == (4, *shape.sides, 3)
        assert batch.label.tolist() == split.labels[rows].tolist()
        for image, cell in zip(batch.image, split.read_cells(split.rows[rows].tolist())):
            with open(cell["path"], "rb") as file:
                expected = decode_image(file.read(), channels=3, size=shape)
            np.testing.assert_array_equal(image, expected)
    for batch in pipeline.eval_batches(3):
        assert batch.image.shape[1:3] in {shape.sides for shape in SHAPES}


def test_processes_share_out_a_batch_of_one_bucket(bucketed):
    whole = bucketed()
    halves = [bucketed(process_index=i, n_processes=2) for i in range(2)]
    for step in (0, 5):
        parts = [half.train_batch(step) for half in halves]
        joined = Batch(*(np.concatenate(x) for x in zip(*parts)))
        assert batches_equal(whole.train_batch(step), joined)


def test_a_single_bucket_leaves_batches_as_they_are(bucketed):
    plain = bucketed(buckets=None)
    n, n_eval = len(plain.source.train), len(plain.source.eval)
    one = {
        name: Buckets((ImageSize(8, 8),), np.zeros(n_rows, np.int64), np.zeros(n_rows))
        for name, n_rows in (("train", n), ("eval", n_eval))
    }
    single = bucketed(buckets=one)
    for step in (0, 7, 31):
        assert batches_equal(plain.train_batch(step), single.train_batch(step))
    for a, b in zip(plain.eval_batches(4), single.eval_batches(4), strict=True):
        assert batches_equal(a, b)
