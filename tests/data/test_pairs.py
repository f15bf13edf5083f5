"""Rows of every kind become the same items, whoever reads them, and collate to batches."""

import io
import json
import logging
import pickle
import tarfile
import zipfile

import datasets
import numpy as np
import pytest
import torch
import transformers
from accelerate.data_loader import IterableDatasetShard
from tiny import encode, make_image, make_image_processor
from torch.utils.data import DataLoader

from blip2_hf import Blip2Processor
from blip2_hf.data import (
    BadRowError,
    ImageTextCollator,
    ImageTextPairs,
    ImageTextStream,
    RandomResizedCropAndFlip,
    SetEpochCallback,
    check_held_out,
    check_pairs,
    hold_out,
    load_rows,
)
from blip2_hf.models.image_loading import ImageLoadError


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "bus", "red", "blue", "sits", "on", "the"]
WORDS += ["grass"]
CAPTIONS = ["A dog!", "a (red) bus", "The cat sits on the grass.", "a blue bus", "a cat", "dog on grass", "red", "bus"]


def make_rows(num_rows=8):
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(num_rows)]
    return [{"image": make_image(i), "caption": caption} for i, caption in enumerate(captions)]


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def dataset(rows):
    return datasets.Dataset.from_list(rows)


@pytest.fixture(scope="module")
def processor():
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    return Blip2Processor(make_image_processor(), tokenizer)


def contents(item):
    image = item["image"] if "image" in item else item["image_embeds"].float().numpy()
    return np.asarray(image).tobytes(), item["text"], item["image_id"]


def identity(items):
    return items


def test_an_item(rows, dataset):
    for source in (rows, dataset):
        item = ImageTextPairs(source)[1]
        assert set(item) == {"row", "image", "text", "image_id"}
        np.testing.assert_array_equal(np.asarray(item["image"]), np.asarray(rows[1]["image"]))
        assert item["text"] == "a red bus"
        assert item["image_id"] == 1
    assert ImageTextPairs(dataset, clean_text=False)[1]["text"] == "a (red) bus"
    assert contents(ImageTextPairs(dataset)[-1]) == contents(ImageTextPairs(dataset)[len(rows) - 1])
    with pytest.raises(IndexError, match="no row 8"):
        ImageTextPairs(dataset)[8]


def test_the_epoch_changes_the_crop_and_comes_back(dataset):
    pairs = ImageTextPairs(dataset, transform=RandomResizedCropAndFlip(16))
    first = [contents(pairs[i]) for i in range(len(pairs))]
    pairs.set_epoch(1)
    second = [contents(pairs[i]) for i in range(len(pairs))]
    assert all(a[0] != b[0] and a[1:] == b[1:] for a, b in zip(first, second, strict=True))
    pairs.set_epoch(0)
    assert [contents(pairs[i]) for i in reversed(range(len(pairs)))] == first[::-1]
    other_seed = ImageTextPairs(dataset, transform=RandomResizedCropAndFlip(16), seed=1)
    assert contents(other_seed[0]) != first[0]


def test_rows_are_cropped_independently():
    image = make_image(size=(200, 200))
    augment = RandomResizedCropAndFlip(8)
    pairs = ImageTextPairs([{"image": image, "caption": "a"}] * 50, transform=augment)
    assert len({contents(pairs[i])[0] for i in range(50)}) == 50


def test_global_randomness_has_no_say(dataset):
    pairs = ImageTextPairs(dataset, transform=RandomResizedCropAndFlip(16))
    torch.manual_seed(0)
    first = contents(pairs[3])
    state = torch.random.get_rng_state()
    pairs[4]
    torch.testing.assert_close(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert contents(pairs[3]) == first


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_the_same_items_and_the_epoch(dataset, persistent):
    pairs = ImageTextPairs(dataset, transform=RandomResizedCropAndFlip(16))
    loader = DataLoader(pairs, batch_size=3, num_workers=2, collate_fn=identity, persistent_workers=persistent)
    for epoch in range(2):
        pairs.set_epoch(epoch)
        seen = [contents(item) for batch in loader for item in batch]
        assert seen == [contents(pairs[i]) for i in range(len(pairs))]


def test_a_copy_has_the_same_items(dataset):
    pairs = ImageTextPairs(dataset, transform=RandomResizedCropAndFlip(16))
    pairs.set_epoch(2)
    copy = pickle.loads(pickle.dumps(pairs))
    assert contents(copy[0]) == contents(pairs[0])
    copy.set_epoch(3)
    assert pairs.epoch == 2


def test_one_of_several_texts_is_drawn():
    captions = ["one", "two", "three"]
    pairs = ImageTextPairs([{"image": make_image(), "caption": captions}] * 200)
    drawn = [pairs[i]["text"] for i in range(200)]
    assert all(40 < drawn.count(caption) < 95 for caption in captions)
    pairs.set_epoch(1)
    assert [pairs[i]["text"] for i in range(200)] != drawn
    assert {ImageTextPairs(pairs.dataset, train=False)[i]["text"] for i in range(5)} == {"one"}


def test_ids():
    def ids(values):
        pairs = ImageTextPairs([{"image": make_image(), "caption": "a", "key": v} for v in values], id_column="key")
        return [pairs[i]["image_id"] for i in range(len(values))]

    assert ids([7, np.int64(8), -(2**63)]) == [7, 8, -(2**63)]
    first, second, third = ids(["coco/1.jpg", "coco/2.jpg", "coco/1.jpg"])
    # Written down: the same in every process and version
    assert first == third == 7381662800239287823
    assert second != first
    with pytest.raises(ValueError, match="Row 0 has the id 1.5"):
        ids([1.5])
    with pytest.raises(ValueError, match="64 bits"):
        ids([2**63])


@pytest.mark.parametrize("source", [None, "coco"])
def test_rows_without_an_id_are_not_one_picture(source):
    """With a name for the data set too, where the id becomes a part of a string."""
    rows = [{"image": make_image(), "caption": "a", "key": None}] * 2
    pairs = ImageTextPairs(rows, id_column="key", source=source)
    with pytest.raises(BadRowError, match="Row 1.* has no id in column 'key'") as error:
        pairs[1]
    assert error.value.kind == "id missing"
    assert [row.row for row in check_pairs(pairs, show_progress=False)] == [0, 1]
    for value in (float("nan"), 1.0, [1], b"1"):
        with pytest.raises(ValueError, match="Row 0.* has the id .*; an integer or a string was expected"):
            ImageTextPairs([dict(rows[0], key=value)], id_column="key", source=source)[0]


def numbered(**columns):
    size = len(next(iter(columns.values())))
    return datasets.Dataset.from_dict({"number": list(range(size)), **columns})


def test_hold_out_by_image():
    ids = ["c", "a", "b", "a", "c", "d"]
    train, held_out = hold_out(numbered(key=ids), 2, "key", seed=0)
    assert sorted([*train["number"], *held_out["number"]]) == list(range(6))
    assert len(set(held_out["key"])) == 2 and not set(held_out["key"]) & set(train["key"])
    assert held_out["__row__"][:] == held_out["number"][:] and train["__row__"][:] == train["number"][:]
    # The choice is that of earlier versions: nothing that was held out is learned from in a run that goes on
    assert hold_out(numbered(key=ids), 2, "key", seed=0)[1]["number"][:] == held_out["number"][:] == [2, 5]
    nested = numbered(json=[{"id": key} for key in ids])
    assert hold_out(nested, 2, "json.id", seed=0)[1]["number"][:] == [2, 5]
    assert [len(part) for part in hold_out(numbered(key=ids), 0.4)] == [4, 2]
    assert [len(part) for part in hold_out(numbered(key=ids), 0)] == [6, 0]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1, None, 2, None], "2 rows, the first of which is row 1, have no id in column 'key'"),
        ([1.0, 2.0, float("nan"), 2.0], "Row 0 has the id 1.0 in column 'key'; an integer or a string.*cast"),
        ([[1], [2], [1], [2]], r"Row 0 has the id \[1\]"),
    ],
)
def test_hold_out_wants_ids(ids, words):
    with pytest.raises(ValueError, match=words):
        hold_out(numbered(key=ids), 1, "key")


def test_hold_out_leaves_something_to_learn_from():
    rows = numbered(key=["a", "a", "b"])
    for share, column, images in ((3, None, 3), (7, None, 3), (2, "key", 2)):
        with pytest.raises(ValueError, match=f"{share} images are to be held out, but the data have {images}"):
            hold_out(rows, share, column)
    for share in (-0.1, -1, 1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a share below 1, or a whole number, was expected"):
            hold_out(rows, share)
    with pytest.raises(ValueError, match="no column 'id'"):
        hold_out(rows, 1, "id")


def test_ids_tell_nothing_if_nothing_is_held_out():
    train, held_out = hold_out(numbered(key=["a", None, "b"]), 0, "key")
    assert len(train) == 3 and len(held_out) == 0


def test_items_of_different_pictures(dataset, tmp_path):
    assert ImageTextPairs(dataset).different_pictures(4) == [0, 2, 4, 6]
    assert ImageTextPairs(dataset).different_pictures(9) == list(range(8))
    images = [make_image(number % 3) for number in range(12)]
    paths = [str(tmp_path / f"{number % 3}.png") for number in range(12)]
    for image, path in zip(images[:3], paths[:3], strict=True):
        image.save(path)
    for pictures in (images, paths, [encode(image) for image in images]):
        pairs = ImageTextPairs([{"image": picture, "caption": "a dog"} for picture in pictures])
        # 0, 3, 6 and 9 would be the first picture
        assert pairs.different_pictures(4) == [0, 1, 2] and pairs.different_pictures(2) == [0, 1]
        assert pairs.without([0]).different_pictures(2) == [0, 5]
    ids = [{"image": image, "caption": "a dog", "id": number // 6} for number, image in enumerate(images)]
    assert ImageTextPairs(ids, id_column="id").different_pictures(5) == [0, 7]
    columns = {"image_embeds": [bytes([n % 2]) for n in range(4)], "image_embeds_shape": [[1, 1, 1]] * 4}
    columns |= {"image_embeds_dtype": ["float32"] * 4, "caption": ["a dog"] * 4}
    assert ImageTextPairs(datasets.Dataset.from_dict(columns)).different_pictures(3) == [0, 1]
    shared = [{"image": number // 6, "caption": "a dog"} for number in range(12)]
    assert ImageTextPairs(shared, images=[{"image": i} for i in images]).different_pictures(5) == [0, 7]


def test_a_fingerprint_is_that_of_the_rows(dataset, rows, tmp_path):
    first = ImageTextPairs(dataset).fingerprint()
    dataset.to_parquet(tmp_path / "elsewhere.parquet")
    moved = datasets.load_dataset("parquet", data_files=str(tmp_path / "elsewhere.parquet"), split="train")
    pairs = ImageTextPairs(moved)
    pairs.set_epoch(2)
    assert pairs.fingerprint() == pairs.without([1]).fingerprint() == first
    assert ImageTextPairs(dataset.select(range(7))).fingerprint() != first
    changed = [row | {"caption": "another"} if i == 3 else row for i, row in enumerate(rows)]
    assert ImageTextPairs(changed).fingerprint() != ImageTextPairs(rows).fingerprint()
    # Pictures in memory, and others in place of those that rows share
    in_memory = [{"image": make_image(), "caption": "a"}]
    assert ImageTextPairs(in_memory).fingerprint() == ImageTextPairs([dict(in_memory[0])]).fingerprint()
    shared = [{"image": 0, "caption": "a"}]
    fingerprints = {ImageTextPairs(shared, images=[{"image": encode(make_image(i))}]).fingerprint() for i in (0, 1, 1)}
    assert len(fingerprints) == 2


def test_a_fingerprint_does_not_tell_where_pictures_lie(tmp_path):
    def find(place: str, seed: int) -> str:
        (tmp_path / place).mkdir()
        make_image(seed).save(tmp_path / place / "a.png")
        (tmp_path / place / "a.txt").write_text("a dog")
        return ImageTextPairs(load_rows(tmp_path / place)).fingerprint()

    assert find("here", 0) == find("there", 0) != find("another", 1)


def test_a_fingerprint_of_stored_features():
    def features(value):
        stored = {"image_embeds": np.full((1, 2, 3), value, np.float32).tobytes(), "image_embeds_shape": [1, 2, 3]}
        stored |= {"image_embeds_dtype": "float32", "caption": "a"}
        return ImageTextPairs(datasets.Dataset.from_list([stored])).fingerprint()

    assert features(0) == features(0) != features(1)


def test_broken_pictures_are_named(rows, caplog):
    broken = [dict(rows[0]), {"image": encode(make_image())[:60], "caption": "a"}, dict(rows[2])]
    as_records = [row | {"image": {"bytes": row["image"], "path": None}} for row in broken[1:2]]
    stored = datasets.Dataset.from_list(as_records).cast_column("image", datasets.Image())
    for source, row in ((broken, 1), (stored, 0)):
        with pytest.raises(ImageLoadError, match=f"row {row}.*broken or truncated"):
            ImageTextPairs(source)[row]
    with pytest.raises(ImageLoadError, match="row 1"):
        list(ImageTextStream(broken))
    with caplog.at_level(logging.WARNING):
        items = list(ImageTextStream(broken, skip_broken=True))
    assert [item["image_id"] for item in items] == [0, 2]
    assert "Left out 1" in caplog.text and "row 1" in caplog.text


def test_rows_that_do_not_fit_are_named(dataset, rows):
    with pytest.raises(ValueError, match="no column 'text'.*caption"):
        ImageTextPairs(dataset, text_column="text")
    with pytest.raises(ValueError, match="no column 'picture'.*caption"):
        ImageTextPairs(rows, image_column="picture")[0]
    for text in (None, 3, []):
        with pytest.raises(ValueError, match="Row 0 has .* in column 'caption'"):
            ImageTextPairs([rows[0] | {"caption": text}])[0]
    with pytest.raises(ValueError, match="ImageTextStream"):
        ImageTextPairs(dataset.to_iterable_dataset())
    with pytest.raises(ValueError, match="read only once"):
        ImageTextStream(iter(rows))
    with pytest.raises(ValueError, match="rank=2"):
        ImageTextStream(rows, rank=2, world_size=2)


def test_other_columns_are_not_decoded(dataset):
    with_broken = dataset.add_column("other", [{"bytes": b"no picture", "path": None}] * len(dataset))
    with_broken = with_broken.cast_column("other", datasets.Image())
    assert ImageTextPairs(with_broken)[0]["text"] == "a dog"


def test_rows_that_are_made_on_the_fly(dataset, rows):
    made = dataset.with_transform(
        lambda batch: {"image": batch["image"], "text": [f"a {c}" for c in batch["caption"]]}
    )
    item = ImageTextPairs(made, text_column="text")[1]
    assert item["text"] == "a a red bus"
    np.testing.assert_array_equal(np.asarray(item["image"]), np.asarray(rows[1]["image"]))


def test_a_function_that_makes_rows_is_given_opened_pictures(dataset, rows):
    made = dataset.with_transform(lambda batch: batch | {"image": [picture.rotate(180) for picture in batch["image"]]})
    expected = np.asarray(rows[1]["image"].rotate(180))
    np.testing.assert_array_equal(np.asarray(ImageTextPairs(made)[1]["image"]), expected)


def test_a_file_inside_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("a.png", encode(make_image(3)))
    path = f"zip://a.png::{tmp_path}/pictures.zip"
    source = datasets.Dataset.from_list([{"image": path, "caption": "a"}]).cast_column("image", datasets.Image())
    np.testing.assert_array_equal(np.asarray(ImageTextPairs(source)[0]["image"]), np.asarray(make_image(3)))
    missing = [{"image": {"path": path.replace("a.png", "b.png"), "bytes": None}, "caption": "a"}]
    with pytest.raises(ImageLoadError, match="row 0.*b.png"):
        ImageTextPairs(missing)[0]


class Again:
    """Rows that can be read again and again, without a length."""

    def __init__(self, num_rows):
        self.num_rows = num_rows

    def __iter__(self):
        return iter(make_rows(self.num_rows))


def sharded(dataset, num_shards=4):
    return dataset.to_iterable_dataset(num_shards=num_shards)


@pytest.mark.parametrize("kind", ["datasets", "iterable", "sequence"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_yields_each_row_once(kind, num_workers, dataset, rows):
    source = {"datasets": sharded(dataset), "iterable": Again(8), "sequence": rows}[kind]
    stream = ImageTextStream(source, transform=RandomResizedCropAndFlip(16))
    loader = DataLoader(stream, batch_size=3, num_workers=num_workers, collate_fn=identity)
    passes = [[item for batch in loader for item in batch] for _ in range(2)]
    assert sorted(item["text"] for item in passes[0]) == sorted(ImageTextPairs(rows)[i]["text"] for i in range(8))
    assert len({item["image_id"] for item in passes[0]}) == 8
    assert list(map(contents, passes[0])) == list(map(contents, passes[1]))
    stream.set_epoch(1)
    third = {item["text"]: contents(item) for batch in loader for item in batch}
    first = {item["text"]: contents(item) for item in passes[0]}
    assert third.keys() == first.keys()
    assert all(third[text][0] != first[text][0] for text in first)


def test_rows_of_an_iterable_do_not_depend_on_the_workers(rows):
    stream = ImageTextStream(rows, transform=RandomResizedCropAndFlip(16))
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(map(contents, loader)) == sorted(map(contents, stream))


@pytest.mark.parametrize("num_shards", [4, 1])
@pytest.mark.parametrize("kind", ["datasets", "iterable"])
def test_processes_share_a_stream(kind, num_shards, dataset):
    items = []
    for rank in range(2):
        source = sharded(dataset, num_shards) if kind == "datasets" else Again(8)
        stream = ImageTextStream(source, rank=rank, world_size=2)
        share = list(DataLoader(stream, batch_size=None, num_workers=2))
        assert len(share) == 4
        items += share
    assert len({item["image_id"] for item in items}) == 8
    assert len({np.asarray(item["image"]).tobytes() for item in items}) == 8


@pytest.mark.parametrize("kind", ["datasets", "iterable"])
def test_a_share_is_a_copy(kind, dataset):
    stream = ImageTextStream(sharded(dataset) if kind == "datasets" else Again(8))
    shares = [stream.shared_out(rank, 2) for rank in range(2)]
    assert [len(list(share)) for share in shares] == [4, 4]
    assert (stream.rank, stream.world_size, len(list(stream))) == (0, 1, 8)


@pytest.mark.parametrize("kind", ["datasets", "iterable"])
def test_accelerate_shares_a_stream_between_processes(kind, dataset):
    items = []
    for index in range(2):
        stream = ImageTextStream(sharded(dataset) if kind == "datasets" else Again(8))
        shard = IterableDatasetShard(stream, batch_size=2, num_processes=2, process_index=index)
        shard.set_epoch(1)
        assert stream.epoch == 1
        items += DataLoader(shard, batch_size=2, num_workers=2, collate_fn=identity)
    ids = [item["image_id"] for batch in items for item in batch]
    assert len(ids) == len(set(ids)) == 8


def test_the_epoch_reaches_a_shuffled_stream_and_its_workers(dataset):
    stream = ImageTextStream(sharded(dataset).shuffle(seed=0, buffer_size=8))
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([item["text"] for item in loader])
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_webdataset(suffix, tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(3):
                number = shard * 3 + i
                members = {
                    suffix: encode(make_image(number)),
                    "txt": f"Number {number}!".encode(),
                    "json": json.dumps({"caption": f"Inside {number}", "url": "x"}).encode(),
                }
                for name, data in members.items():
                    info = tarfile.TarInfo(f"{number:05d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    files = [str(tmp_path / f"{shard}.tar") for shard in range(2)]
    source = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    for column, word in (("txt", "number"), ("json.caption", "inside")):
        stream = ImageTextStream(source, image_column=suffix, text_column=column, id_column="__key__")
        loader = DataLoader(stream, batch_size=None, num_workers=2)
        items = {item["text"]: item for item in loader}
        assert set(items) == {f"{word} {number}" for number in range(6)}
        np.testing.assert_array_equal(np.asarray(items[f"{word} 4"]["image"]), np.asarray(make_image(4)))
        assert len({item["image_id"] for item in items.values()}) == 6


def test_a_batch(dataset, processor):
    batch = ImageTextCollator(processor)([ImageTextPairs(dataset)[i] for i in range(3)])
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "image_ids"}
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    expected = ["[CLS] a dog [SEP] [PAD] [PAD] [PAD] [PAD]", "[CLS] a red bus [SEP] [PAD] [PAD] [PAD]"]
    expected.append("[CLS] the cat sits on the grass [SEP]")
    ids = [[WORDS.index(word) for word in text.split()] for text in expected]
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].tolist() == [[int(i != 0) for i in row] for row in ids]
    assert batch["image_ids"].tolist() == [0, 1, 2]
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "image_ids")} == {torch.int64}


def test_texts_are_cut_before_the_separator(dataset, processor):
    batch = ImageTextCollator(processor, max_length=4)([ImageTextPairs(dataset)[i] for i in range(3)])
    assert batch["input_ids"][2].tolist() == [WORDS.index(word) for word in ("[CLS]", "the", "cat", "[SEP]")]


def test_padding_is_on_the_right_whatever_the_tokenizer_says(dataset, processor):
    rows = [ImageTextPairs(dataset)[i] for i in range(3)]
    processor.tokenizer.padding_side = "left"
    try:
        assert (ImageTextCollator(processor)(rows)["input_ids"][:, 0] == WORDS.index("[CLS]")).all()
    finally:
        processor.tokenizer.padding_side = "right"


def test_features_keep_their_type(processor):
    row = {"text": "a dog", "image_id": 2**62}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        features = [torch.randn(5, 4).to(dtype) for _ in range(2)]
        batch = ImageTextCollator(processor)([row | {"image_embeds": f} for f in features])
        torch.testing.assert_close(batch["image_embeds"], torch.stack(features), rtol=0, atol=0)
        assert batch["image_ids"].tolist() == [2**62] * 2


def test_batches_that_do_not_fit(dataset, processor):
    collator = ImageTextCollator(processor)
    row = {"text": "a dog", "image_id": 0, "image_embeds": torch.zeros(5, 4)}
    with pytest.raises(ValueError, match=r"\[5, 4\].*\[6, 4\]"):
        collator([row, row | {"image_embeds": torch.zeros(6, 4)}])
    with pytest.raises(ValueError, match="bfloat16.*float32"):
        collator([row, row | {"image_embeds": torch.zeros(5, 4).bfloat16()}])
    with pytest.raises(ValueError, match="1 of the 2 rows.*features"):
        collator([row, ImageTextPairs(dataset)[0]])
    for name in ("image", "text", "image_id"):
        item = {k: v for k, v in ImageTextPairs(dataset)[0].items() if k != name}
        with pytest.raises(ValueError, match=f"{name}.*remove_unused_columns"):
            collator([item])


class Recorder(torch.nn.Module):
    """A model that writes down what it is shown, and stops a run by raising."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.stop_at = stop_at
        self.seen = []

    def forward(self, pixel_values, input_ids, image_ids, attention_mask):
        if len(self.seen) == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append((pixel_values.sum(), image_ids.tolist(), input_ids.tolist()))
        return {"loss": self.weight * 1.0}


def record(dataset, processor, folder, stop_at=None, resume=False):
    pairs = ImageTextPairs(dataset, transform=RandomResizedCropAndFlip(16))
    model = Recorder(stop_at)
    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=pairs,
        data_collator=ImageTextCollator(processor),
        callbacks=[SetEpochCallback()],
    )
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        assert stop_at is not None
    return model.seen


def test_a_resumed_run_of_trainer_sees_what_it_would_have_seen(dataset, processor, tmp_path):
    whole = record(dataset, processor, tmp_path / "whole")
    assert len(whole) == 6
    stopped = record(dataset, processor, tmp_path / "stopped", stop_at=4)
    # The checkpoint lies in the middle of the second epoch
    resumed = record(dataset, processor, tmp_path / "stopped", resume=True)
    assert stopped == whole[:4]
    assert resumed == whole[3:]
    assert len({float(pixels) for pixels, _, _ in whole}) == 6


def test_the_callback_reaches_data_sets_inside_others(dataset):
    parts = [ImageTextPairs(dataset) for _ in range(3)]
    joined = torch.utils.data.ConcatDataset([parts[0], torch.utils.data.Subset(parts[1], [0, 1]), make_rows(2)])
    loaders = [DataLoader(joined), DataLoader(parts[2])]
    for loader in loaders:
        state = transformers.TrainerState(epoch=2.5)
        SetEpochCallback().on_epoch_begin(None, state, None, train_dataloader=loader)
    assert [pairs.epoch for pairs in parts] == [2, 2, 2]


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """A folder of files of two splits, as on the Hub, and one of two configurations."""
    folder = tmp_path_factory.mktemp("splits")
    for part in ("train", "validation"):
        for name in ("plain", "english"):
            (folder / name).mkdir(exist_ok=True)
            rows = [{"caption": f"{name} {part} {i}"} for i in range(3)]
            datasets.Dataset.from_list(rows).to_json(folder / name / f"{part}.jsonl")
    configurations = [{"config_name": name, "data_dir": name} for name in ("plain", "english")]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configurations)}\n---\n")
    return folder


@pytest.mark.parametrize(
    ("name", "captions"),
    [
        ("plain", ["plain train 0", "plain train 1", "plain train 2"]),
        ("plain:validation", ["plain validation 0", "plain validation 1", "plain validation 2"]),
        ("plain:train[:1]+validation[1:2]", ["plain train 0", "plain validation 1"]),
        (":english:train[1:2]", ["english train 1"]),
        (":plain:validation[2:]", ["plain validation 2"]),
        ("plain/validation.jsonl", ["plain validation 0", "plain validation 1", "plain validation 2"]),
    ],
)
def test_a_split_stands_behind_the_name(name, captions, splits, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    data = f"{splits}{name}" if name.startswith(":") else splits / name
    assert load_rows(data)["caption"][:] == captions
    if ":" not in str(data):
        assert [row["caption"] for row in load_rows(data, streaming=True)] == captions


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("me/ds", ("me/ds", None, "train")),
        ("me/ds:test", ("me/ds", None, "test")),
        ("me/ds:train[:10%]", ("me/ds", None, "train[:10%]")),
        ("me/ds:english:train[5:]", ("me/ds", "english", "train[5:]")),
        ("hf://datasets/me/ds", ("hf://datasets/me/ds", None, "train")),
        ("hf://datasets/me/ds:test", ("hf://datasets/me/ds", None, "test")),
    ],
)
def test_names_of_the_hub(name, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split, **_: seen.append((name, config, split)))
    load_rows(name)
    assert seen == [expected]


def test_a_path_that_exists_is_no_name_with_a_split(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "rows:validation")
    assert len(load_rows(tmp_path / "rows:validation")) == 8
    dataset.to_parquet(tmp_path / "a:b.parquet")
    assert len(load_rows(tmp_path / "a:b.parquet")) == 8
    dataset.save_to_disk(tmp_path / "rows")
    for name in ("rows:train", "a.parquet:train"):
        with pytest.raises(ValueError, match="has no splits.*Give the name alone"):
            load_rows(tmp_path / name)


def test_what_is_held_out_is_not_learned(splits, tmp_path, monkeypatch):
    monkeypatch.chdir(splits)
    (tmp_path / "link").symlink_to(splits / "plain")
    same = [("me/ds", "me/ds:train"), ("plain", f"{splits}/plain:train"), ("plain", tmp_path / "link")]
    same += [("plain/train.jsonl", "./plain/train.jsonl"), ("me/ds:a:test", "me/ds:a:test")]
    for data, other in same:
        with pytest.raises(ValueError, match="which is what is learned from.*Give other data"):
            check_held_out(data, "other.parquet", other)
    check_held_out("me/ds", "me/ds:test", None, "me/ds:a:train", "plain", "me/other")
    check_held_out("plain/train.jsonl", "plain/validation.jsonl", "plain:train")


@pytest.mark.parametrize("feature", [datasets.List, datasets.Sequence])
def test_answers_of_vqav2_are_records(feature):
    answers = [{"answer": "red", "answer_id": 1}, {"answer": "dark red", "answer_id": 2}]
    kind = {"answer": datasets.Value("string"), "answer_id": datasets.Value("int64")}
    if feature is datasets.Sequence:
        answers = {name: [answer[name] for answer in answers] for name in kind}
    columns = {"image": [make_image(0)], "question": ["what colour?"], "answers": [answers]}
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "question": text, "answers": feature(kind)})
    rows = datasets.Dataset.from_dict(columns, features=features)
    kwargs = {"text_column": "answers", "prompt": "Question: {}", "prompt_column": "question"}
    pairs = ImageTextPairs(rows, **kwargs)
    assert pairs.references() == [["red", "dark red"]]
    drawn = set()
    for epoch in range(20):
        pairs.set_epoch(epoch)
        drawn.add(pairs[0]["text"])
    assert drawn == {"red", "dark red"}
    assert ImageTextPairs(rows, train=False, **kwargs)[0]["text"] == "red"
    assert check_pairs(pairs, show_progress=False) == []
    bad = ImageTextPairs([{**rows[0], "answers": [{"answer": "red"}, {"answer": None}]}], **kwargs)
    assert [row.kind for row in check_pairs(bad, show_progress=False)] == ["text missing"]
