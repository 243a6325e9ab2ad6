"""A batch is a function of (seed, step); every dataset opens, or one line names the problem."""

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from hub_copies import OTHER_ATTRIBUTES, image_file, make_copy
from PIL import Image as PillowImage
from pipeline_cases import (
    RNG,
    ROOT,
    FakeEncoders,
    batches_equal,
    cifar,  # noqa: F401
    coco,  # noqa: F401
    image_cells,
    own_cache,  # noqa: F401
    source,  # noqa: F401
    write_parquet,
)

from data.batch import Batch
from data.caption_cache import CaptionStore
from data.load import open_dataset
from data.pipeline import Pipeline
from data.row_labels import CaptionIds
from data.shuffle import FLIP_STREAM
from datasets_config import DATASET_CONFIGS
from runtime.errors import UserError

# --- the order of the rows ---


@pytest.mark.parametrize("batch_size", [5, 24, 7, 60])
def test_no_row_twice_in_an_epoch_and_none_left_out(source, batch_size):
    pipeline = Pipeline(source, batch_size=batch_size, seed=1)
    chain = np.concatenate([pipeline.batch_rows(step) for step in range(3 * 24 // batch_size + 1)])
    epochs = chain[: 3 * 24].reshape(3, 24)
    assert (np.sort(epochs, axis=1) == np.arange(24)).all()
    assert not (epochs[0] == epochs[1]).all()


def test_a_batch_depends_on_seed_and_step_only(source):
    one, same, other = (Pipeline(source, batch_size=8, seed=s) for s in (1, 1, 2))
    one.train_batch(17)  # another batch in between changes nothing
    assert batches_equal(one.train_batch(5), same.train_batch(5))
    assert not (one.batch_rows(5) == one.batch_rows(6)).all()
    assert not (one.batch_rows(5) == other.batch_rows(5)).all()


def test_resuming_at_step_k_gives_batch_k(source):
    whole = list(Pipeline(source, batch_size=7, seed=0).train_batches(0, 9))
    resumed = list(Pipeline(source, batch_size=7, seed=0).train_batches(4, 9))
    assert len(resumed) == 5
    assert all(batches_equal(a, b) for a, b in zip(whole[4:], resumed))


def test_processes_share_out_the_batch_of_one(source):
    whole = Pipeline(source, batch_size=8, seed=3)
    halves = [
        Pipeline(source, batch_size=8, seed=3, process_index=i, n_processes=2) for i in range(2)
    ]
    for step in (0, 4):
        parts = [half.train_batch(step) for half in halves]
        assert batches_equal(
            whole.train_batch(step), Batch(*(np.concatenate(x) for x in zip(*parts)))
        )
    assert [half.train_batch(0).row.tolist() for half in halves] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(UserError, match="multiple of 3 processes"):
        Pipeline(source, batch_size=8, seed=3, n_processes=3)


def test_a_batch_has_the_images_and_labels_of_its_rows_half_of_them_mirrored(source):
    pipeline = Pipeline(source, batch_size=24, seed=0)
    images, labels = pipeline.decode_split("train")
    mirrored = 0
    for step in range(8):
        batch, rows = pipeline.train_batch(step), pipeline.batch_rows(step)
        straight = (batch.image == images[rows]).all((1, 2, 3))
        flipped = (batch.image == images[rows][:, :, ::-1]).all((1, 2, 3))
        assert (straight ^ flipped).all()
        assert np.array_equal(batch.label, labels[rows])
        mirrored += flipped.sum()
    assert 70 < mirrored < 122  # of 192, four standard deviations each way


def test_batches_follow_the_order_and_flips_of_their_epochs(source):
    pipeline = Pipeline(source, batch_size=9, seed=4)
    images, labels = pipeline.decode_split("train")
    order = np.concatenate([pipeline.epoch_order(epoch) for epoch in range(4)])
    flips = np.concatenate([pipeline.epoch_flips(epoch) for epoch in range(4)])
    assert 24 < flips.sum() < 72  # of 96, five standard deviations each way
    for step in range(9):  # nine batches of nine: over three ends of epochs
        batch = pipeline.train_batch(step)
        places = slice(9 * step, 9 * step + 9)
        expected = images[order[places]]
        expected[flips[places]] = expected[flips[places], :, ::-1]
        assert np.array_equal(batch.image, expected)
        assert np.array_equal(batch.label, labels[order[places]])


def test_flips_and_rows_come_from_different_streams(source):
    two, three = (np.random.default_rng(seed).random(4) for seed in ((5, 7), (5, 7, 0)))
    assert (two == three).all()  # the trap: a third number of 0 changes nothing
    assert FLIP_STREAM != 0
    pipeline = Pipeline(source, batch_size=24, seed=0)
    images, _ = pipeline.decode_split("train")
    patterns = {
        (pipeline.train_batch(s).image == images[pipeline.batch_rows(s)]).all((1, 2, 3)).tobytes()
        for s in range(6)
    }
    assert len(patterns) == 6


def test_random_crops_are_a_function_of_seed_and_position(tmp_path):
    """Whatever the workers and processes, in training alone, and of images of all shapes."""
    for split, n in (("train", 12), ("test", 4)):
        cells = [
            cell for i in range(n) for cell in image_cells(1, size=((30, 16), (16, 40))[i % 2])
        ]
        folder = write_parquet(tmp_path, split=split, features={"image": Image()}, image=cells)
    options: dict[str, Any] = {"batch_size": 6, "seed": 1}
    middle = Pipeline(open_dataset(f"folder:{folder}", image_size="16x20"), **options)
    source = open_dataset(f"folder:{folder}", image_size="16x20", crop="random")
    cropped, halves = Pipeline(source, **options, n_workers=0), []
    for index in range(2):
        halves.append(Pipeline(source, **options, process_index=index, n_processes=2))
    batches = list(cropped.train_batches(0, 4))
    assert batches[0].image.shape == (6, 16, 20, 3)
    for step, batch in enumerate(batches):
        assert batches_equal(cropped.train_batch(step), batch)
        parts = np.concatenate([half.train_batch(step).image for half in halves])
        assert np.array_equal(parts, batch.image)
        assert np.array_equal(middle.batch_rows(step), cropped.batch_rows(step))
    by_row = [dict(zip(cropped.batch_rows(step), batches[step].image)) for step in range(4)]
    epochs = [by_row[0] | by_row[1], by_row[2] | by_row[3]]
    assert sum((epochs[0][row] != epochs[1][row]).any() for row in range(12)) > 8
    for a, b in zip(cropped.eval_batches(2), middle.eval_batches(2)):
        assert batches_equal(a, b)
    with pytest.raises(UserError, match="--crop random decodes the images of each batch anew"):
        Pipeline(source, **options, in_memory=True)


def test_digits_are_never_mirrored():
    source = open_dataset("digits")
    pipeline = Pipeline(source, batch_size=64, seed=0)
    assert not pipeline.epoch_flips(0).any()
    assert (
        pipeline.train_batch(2).image == pipeline.decode_split("train")[0][pipeline.batch_rows(2)]
    ).all()


def test_evaluation_is_the_same_every_time_and_wraps_round(source):
    pipeline = Pipeline(source, batch_size=10, seed=0)
    first, again = list(pipeline.eval_batches(5)), list(pipeline.eval_batches(5))
    assert all(batches_equal(a, b) for a, b in zip(first, again))
    other_seed = Pipeline(source, batch_size=10, seed=9)
    assert all(batches_equal(a, b) for a, b in zip(first, other_seed.eval_batches(5)))
    images = np.concatenate([batch.image for batch in first])
    assert (images[:26] == images[24:50]).all()
    assert len(np.unique(images[:24].reshape(24, -1), axis=0)) == 24
    assert next(pipeline.eval_batches(1, batch_size=4)).image.shape == (4, 32, 32, 3)


# --- in memory and decoded as needed ---


def test_batches_in_memory_and_decoded_as_needed_are_equal(source):
    in_memory = Pipeline(source, batch_size=6, seed=0, in_memory=True)
    streamed = Pipeline(source, batch_size=6, seed=0, in_memory=False, n_workers=0)
    pairs = list(zip(in_memory.train_batches(3, 9), streamed.train_batches(3, 9), strict=True))
    assert len(pairs) == 6 and all(batches_equal(a, b) for a, b in pairs)
    assert all(
        batches_equal(a, b) for a, b in zip(in_memory.eval_batches(3), streamed.eval_batches(3))
    )
    assert all(
        (a == b).all()
        for a, b in zip(in_memory.decode_split("eval"), streamed.decode_split("eval"))
    )


def test_workers_are_sent_neither_images_nor_texts(coco, tmp_path):
    source, _ = coco
    in_memory = Pipeline(source, batch_size=6, seed=0)
    pickled = pickle.dumps(in_memory._decoders["train"])
    assert len(pickled) < in_memory.decode_split("train")[0].nbytes / 10
    texts = [text for captions in source.train.captions for text in captions]
    store = CaptionStore.open(
        tmp_path, texts, ["us/it"], revisions=["0" * 12], load_encoders=FakeEncoders
    )
    decoder = replace(
        in_memory._decoders["train"].of_bucket[0], labels=CaptionIds(source.train.captions, store)
    )
    assert texts[3].encode() not in pickle.dumps(decoder)
    copied = pickle.loads(pickle.dumps(decoder))
    plan = in_memory._plan_batch(5)
    assert batches_equal(copied(plan), decoder(plan))


# --- opening: the entries ---


def test_the_embedded_digits_are_scikit_learns():
    counts, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    pipeline = Pipeline(open_dataset("digits"), batch_size=1, seed=0)
    seen = []
    for split, n in {"train": 1437, "test": 360}.items():
        path = ROOT / "data" / "digits" / "data" / f"{split}-00000-of-00001.parquet"
        stored = Dataset.from_parquet(str(path)).cast_column("image", Image(decode=False))
        rows = [int(Path(cell["path"]).stem) for cell in stored["image"]]
        images, digits = pipeline.decode_split("train" if split == "train" else "eval")
        assert len(rows) == n
        assert (np.rint(images.reshape(n, 64) / 255 * 16) == counts[rows]).all()
        assert (digits == labels[rows]).all()
        share = np.bincount(digits) / np.bincount(labels)
        assert np.abs(share - n / 1797).max() < 0.01  # stratified
        seen += rows
    assert sorted(seen) == list(range(1797))


@pytest.mark.parametrize("name", DATASET_CONFIGS)
def test_every_entry_opens_on_a_copy_with_the_hubs_schema(tmp_path, name):
    entry = DATASET_CONFIGS[name]
    source = open_dataset(name, data_dir=make_copy(name, tmp_path))
    config = source.config
    assert (config.image_column, config.label_column) == (entry.image_column, entry.label_column)
    assert (config.n_classes, len(config.label_names)) == (entry.n_classes, entry.n_classes)
    assert entry.label_names in ((), config.label_names)
    assert (source.train.name, source.eval.name) == (
        entry.train_split,
        entry.eval_split or entry.train_split,
    )
    batch = Pipeline(source, batch_size=4, seed=0, in_memory=False).train_batch(0)
    assert batch.image.shape == (4, entry.image_size, entry.image_size, entry.channels)
    # Without classes every row has label 0, the null id.
    expected = [1, 0] * 12 if name == "celeba" else np.arange(24) % max(1, entry.n_classes)
    assert (source.train.labels == np.asarray(expected)[source.train.rows]).all()


def test_each_epoch_samples_one_caption_of_an_image(coco):
    source, store = coco
    assert (source.config.conditioning, source.config.caption_column) == ("text", "sentences_raw")
    n = len(source.train)
    pipeline = Pipeline(source, batch_size=n, seed=1, caption_store=store)
    counts = np.zeros((n, 5), int)
    for epoch in range(200):
        rows, batch = pipeline.batch_rows(epoch), pipeline.train_batch(epoch)
        for row, caption in zip(rows, store.captions_of_batch(batch), strict=True):
            counts[row, source.train.captions[row].index(caption)] += 1
    assert (counts.sum(axis=1) == 200).all()
    assert counts.min() > 15 and counts.max() < 75  # 40 ± 5.7 each


def test_captions_are_a_function_of_seed_and_step(coco):
    source, store = coco
    one, same, other = (
        Pipeline(source, batch_size=7, seed=s, caption_store=store) for s in (1, 1, 2)
    )
    one.train_batch(20)
    assert store.captions_of_batch(one.train_batch(9)) == store.captions_of_batch(
        same.train_batch(9)
    )
    assert store.captions_of_batch(one.train_batch(9)) != store.captions_of_batch(
        other.train_batch(9)
    )
    halves = [
        Pipeline(source, batch_size=6, seed=1, caption_store=store, process_index=i, n_processes=2)
        for i in (0, 1)
    ]
    whole = Pipeline(source, batch_size=6, seed=1, caption_store=store).train_batch(9)
    assert [
        c for half in halves for c in store.captions_of_batch(half.train_batch(9))
    ] == store.captions_of_batch(whole)


def test_evaluation_uses_the_first_caption(coco):
    source, store = coco
    pipeline = Pipeline(source, batch_size=4, seed=1, caption_store=store)
    (batch,) = pipeline.eval_batches(1)
    assert set(store.captions_of_batch(batch)) == {captions[0] for captions in source.eval.captions}


def test_captions_can_be_made_from_class_names(cifar):
    templates = ("a photo of a {label}", "{label}, small")
    source = open_dataset("cifar10", data_dir=cifar, templates=templates)
    assert source.config.conditioning == "text"
    for label, captions in zip(source.train.labels, source.train.captions, strict=True):
        name = source.config.label_names[label]
        assert captions == (f"a photo of a {name}", f"{name}, small")


def test_a_missing_caption_is_the_empty_one(tmp_path):
    texts = ["a cat", None, "", "a dog"] * 3
    lists = [["a cat", None], None, [], ["a dog"]] * 3
    folder = write_parquet(tmp_path, features=None, image=image_cells(12), text=texts)
    data = Dataset.from_dict(
        {"image": image_cells(12), "text": texts, "texts": lists},
        features=Features(
            {"image": Image(), "text": Value("string"), "texts": List(Value("string"))}
        ),
    )
    data.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    for column, expected in {
        "text": {("a cat",), ("",), ("a dog",)},
        "texts": {("a cat",), ("",), ("a dog",)},
    }.items():
        source = open_dataset(f"folder:{folder}", caption_column=column)
        assert set(source.train.captions) == expected


def test_captions_are_not_guessed_from_another_column(tmp_path):
    """File names are texts too."""
    texts = [f"train/{i}.jpg" for i in range(12)]
    folder = write_parquet(tmp_path, image=image_cells(12), filepath=texts, caption=texts)
    with pytest.raises(UserError, match=r"no column 'sentences_raw'.* pass --caption_column"):
        open_dataset("coco", data_dir=folder)


def test_no_conditioning_needs_no_labels(cifar):
    source = open_dataset("cifar10", data_dir=cifar, conditioning="none")
    assert (source.config.conditioning, source.config.n_classes) == ("none", 0)
    assert (source.train.labels == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conditioning": "words"}, "unknown conditioning 'words'"),
        (
            {"conditioning": "class", "templates": ("{label}",)},
            "captions are for --conditioning text",
        ),
        ({"templates": ("{label} {name}",)}, r"only \{label\} may stand in braces"),
        ({"templates": ("{label} {label.name}",)}, r"only \{label\} may stand in braces"),
        ({"templates": ("a cat",)}, r"'a cat': \{label\} must stand in one"),
        ({"caption_column": "img", "label_column": "label"}, "or --label_column, not both"),
        ({"conditioning": "none", "label_column": "label"}, "of no use to --conditioning none"),
        ({"templates": ("{label} {label",)}, r"only \{label\} may stand in braces"),
        ({"templates": ("{label}",), "caption_column": "img"}, "not both"),
        ({"templates": ("{label}",), "label_column": ""}, "no classes .* pass --label_column"),
        ({"conditioning": "class", "label_column": ""}, "no classes .* pass --label_column"),
        ({"conditioning": "text"}, "leaves open which column.* pass --caption_column"),
        ({"caption_column": "words"}, "no column 'words'.* pass --caption_column"),
        ({"caption_column": "img"}, "holds no texts.* pass --caption_column"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(cifar, arguments, message):
    with pytest.raises(UserError, match=message):
        open_dataset("cifar10", data_dir=cifar, **arguments)


# --- data that do not fit ---


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        open_dataset("cifar")


def test_another_attribute_can_be_the_label(tmp_path):
    source = open_dataset("celeba", data_dir=make_copy("celeba", tmp_path), label_column="Male")
    assert source.config.label_names == ("not Male", "Male")
    assert "Male" in OTHER_ATTRIBUTES


def test_an_empty_label_column_trains_without_classes(cifar):
    source = open_dataset("cifar10", data_dir=cifar, label_column="")
    assert (source.config.n_classes, source.config.label_names) == (0, ())
    assert not source.train.labels.any()


def test_an_entrys_columns_may_have_other_names(tmp_path):
    features = {"photo": Image(), "animal": ClassLabel(names=["cat", "dog"])}
    folder = write_parquet(tmp_path, features=features, photo=image_cells(20), animal=[0, 1] * 10)
    config = open_dataset("cifar10", data_dir=folder).config
    assert (config.image_column, config.label_column) == ("photo", "animal")
    assert config.label_names == ("cat", "dog")


def test_a_missing_column_lists_the_columns_and_names_the_flag(tmp_path):
    folder = write_parquet(tmp_path, features={"photo": Image()}, photo=image_cells(4))
    with pytest.raises(UserError, match=r"columns: photo\); pass --label_column"):
        open_dataset("mnist", data_dir=folder)
    with pytest.raises(UserError, match=r"no column 'x' \(columns: photo\); pass --image_column"):
        open_dataset("mnist", data_dir=folder, image_column="x")
    with pytest.raises(UserError, match="is no folder"):
        open_dataset("mnist", data_dir=tmp_path / "nowhere")


def test_a_missing_split_lists_the_splits(tmp_path):
    for split in ("test", "validation"):
        write_parquet(tmp_path, split=split, features={"image": Image()}, image=image_cells(3))
    with pytest.raises(UserError, match=r"no split 'train' \(splits: (test|validation), "):
        open_dataset("butterflies", data_dir=tmp_path)


def test_held_out_rows_are_a_tenth_and_disjoint(tmp_path):
    folder = make_copy("butterflies", tmp_path, n=40)
    first, again = (open_dataset("butterflies", data_dir=folder) for _ in range(2))
    assert len(first.eval) == 4
    rows = np.concatenate([first.train.rows, first.eval.rows])
    assert (np.sort(rows) == np.arange(40)).all()
    assert (first.eval.rows == again.eval.rows).all()


def test_a_broken_row_is_named_by_its_number_in_the_file_not_in_the_split(tmp_path):
    rows = image_cells(40)
    rows[23] = {"bytes": image_file(RNG, size=(1, 1)), "path": None}
    folder = write_parquet(tmp_path, features={"image": Image()}, image=rows)
    source = open_dataset("butterflies", data_dir=folder)
    with pytest.raises(UserError, match=r"^dataset 'butterflies', split 'train', row 23, column"):
        Pipeline(source, batch_size=4, seed=0)


@pytest.mark.parametrize("label", [None, -1, 3])
def test_a_label_that_is_no_class_is_named_by_row_and_column(tmp_path, label):
    features = {"image": Image(), "label": Value("int64")}
    labels = [0, 1, 2, 9, 8, 7, 6, label if label != 3 else 10]
    folder = write_parquet(tmp_path, features=features, image=image_cells(8), label=labels)
    with pytest.raises(UserError, match=r"row 7, column 'label': label .* none of the 10 classes"):
        open_dataset("mnist", data_dir=folder)


# --- opening: any folder and any id of the hub ---


def test_columns_classes_size_and_channels_are_found_in_a_folder_of_parquet(tmp_path):
    features = {"scan": Image(), "kind": ClassLabel(names=["a", "b", "c"]), "note": Value("string")}
    columns = {"scan": image_cells(24, mode="L", size=(37, 30)), "kind": [0, 1, 2] * 8}
    source = open_dataset(
        f"folder:{write_parquet(tmp_path, features=features, **columns, note=[''] * 24)}"
    )
    config = source.config
    assert (config.image_column, config.label_column) == ("scan", "kind")
    assert (config.channels, config.image_size, config.label_names) == (1, 24, ("a", "b", "c"))
    assert config.model == "DiT-S/2" and not config.flip
    assert open_dataset(config.name, image_size=16, channels=3).config.channels == 3


def test_a_tree_of_images_has_a_class_for_each_folder(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for i in range(6):
            (tmp_path / kind / f"{i}.png").write_bytes(image_file(RNG, size=(100, 90)))
    source = open_dataset(f"folder:{tmp_path}")
    assert source.config.label_names == ("cat", "dog")
    assert (source.config.channels, source.config.image_size) == (3, 64)
    assert Pipeline(source, batch_size=4, seed=0).train_batch(0).image.shape == (4, 64, 64, 3)


@pytest.mark.parametrize("single", [True, False])
def test_a_folder_of_save_to_disk_opens(tmp_path, single):
    columns = {"image": image_cells(10), "label": [i % 3 for i in range(10)]}
    data = Dataset.from_dict(columns, features=Features(image=Image(), label=Value("int32")))
    (data if single else DatasetDict({"train": data, "valid": data})).save_to_disk(
        tmp_path / "saved"
    )
    source = open_dataset(f"folder:{tmp_path / 'saved'}")
    assert source.config.n_classes == 3 and source.config.label_names == ("0", "1", "2")
    assert (len(source.train), len(source.eval)) == ((9, 1) if single else (10, 10))


def test_words_become_classes_in_alphabetical_order(tmp_path):
    features = {"image": Image(), "label": Value("string")}
    folder = write_parquet(
        tmp_path, features=features, image=image_cells(4), label=["ox", "ant", "ox", "bee"]
    )
    write_parquet(
        folder, split="test", features=features, image=image_cells(2), label=["ant", "yak"]
    )
    with pytest.raises(UserError, match=r"'test', row 1, column 'label': label 'yak' is none of"):
        open_dataset(f"folder:{folder}")
    write_parquet(
        folder, split="test", features=features, image=image_cells(2), label=["bee", "ant"]
    )
    source = open_dataset(f"folder:{folder}")
    assert source.config.label_names == ("ant", "bee", "ox")
    assert source.train.labels.tolist() == [2, 0, 2, 1] and source.eval.labels.tolist() == [1, 0]


def test_a_dataset_without_labels_has_no_classes(tmp_path):
    source = open_dataset(
        f"folder:{write_parquet(tmp_path, features={'x': Image()}, x=image_cells(5))}"
    )
    assert (source.config.label_column, source.config.n_classes) == (None, 0)


def test_ambiguous_columns_ask_for_a_flag(tmp_path):
    features = {
        "left": Image(),
        "right": Image(),
        "a": ClassLabel(names=["x"]),
        "b": Value("float"),
    }
    folder = write_parquet(
        tmp_path,
        features=features,
        left=image_cells(4),
        right=image_cells(4),
        a=[0] * 4,
        b=[0.5] * 4,
    )
    with pytest.raises(UserError, match=r"columns: left, right, a, b\); pass --image_column"):
        open_dataset(f"folder:{folder}")
    with pytest.raises(UserError, match="column 'a' holds no images"):
        open_dataset(f"folder:{folder}", image_column="a")
    with pytest.raises(UserError, match="labels must be classes"):
        open_dataset(f"folder:{folder}", image_column="left", label_column="b")
    config = open_dataset(f"folder:{folder}", image_column="right").config
    assert (config.image_column, config.label_column) == ("right", "a")


def test_a_broken_first_image_is_named(tmp_path):
    buffer = io.BytesIO()
    PillowImage.fromarray(np.zeros((8, 8), np.float32)).save(buffer, format="TIFF")
    rows = [{"bytes": buffer.getvalue(), "path": None}, *image_cells(20)]
    write_parquet(tmp_path, split="test", features={"image": Image()}, image=image_cells(2))
    folder = write_parquet(tmp_path, features={"image": Image()}, image=rows)
    with pytest.raises(UserError, match="row 0, column 'image': images of Pillow's mode F"):
        Pipeline(open_dataset(f"folder:{folder}"), batch_size=2, seed=0)


def test_an_empty_cell_is_named(tmp_path):
    write_parquet(tmp_path, split="test", features={"image": Image()}, image=image_cells(2))
    folder = write_parquet(tmp_path, features={"image": Image()}, image=[*image_cells(3), None])
    source = open_dataset("butterflies", data_dir=folder)
    with pytest.raises(UserError, match="row 3, column 'image': the cell is empty"):
        Pipeline(source, batch_size=2, seed=0)


def test_the_hub_out_of_reach_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"'mnist': cannot open 'ylecun/mnist' .*--data_dir"
    ) as caught:
        open_dataset("mnist")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="'hf:nobody/nothing': cannot open 'nobody/nothing' of the"):
        open_dataset("hf:nobody/nothing")
    with pytest.raises(UserError, match="write folder:PATH or hf:owner/name"):
        open_dataset("hf:")


def test_an_empty_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match=f"cannot open folder '{tmp_path}'") as caught:
        open_dataset(f"folder:{tmp_path}")
    assert "\n" not in str(caught.value)
