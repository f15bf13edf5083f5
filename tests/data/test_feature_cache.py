"""Stored features are the tower's, to the byte, however often the work was interrupted; training reads no more."""

import json
import re
import subprocess

import datasets
import numpy as np
import pytest
import torch
import transformers
from tiny import encode, make_config, make_image, make_image_processor, randomize
from torch.utils.data import DataLoader

from blip2_hf import Blip2Model
from blip2_hf.data import (
    ImageTextPairs,
    ImageTextStream,
    RandomResizedCropAndFlip,
    VisionTower,
    cache_features,
    load_cached_features,
    read_cached_features,
)
from blip2_hf.data.rows import seeded_generator
from blip2_hf.jobs.atomic_files import _machine
from blip2_hf.models.image_loading import ImageLoadError


NUM_ROWS, FEATURES, WIDTH = 10, 5, 32
STORED = ["image_embeds", "image_embeds_shape", "image_embeds_dtype", "image_embeds_row"]
TRANSFORM = RandomResizedCropAndFlip(28)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomize(Blip2Model(make_config(None))).freeze().eval()


@pytest.fixture(scope="module")
def processor():
    return make_image_processor()


@pytest.fixture(scope="module")
def dataset():
    rows = [
        {"image": make_image(i), "caption": [f"number {i}", f"no {i}"], "key": i * 2**40, "meta": {"url": f"u{i}"}}
        for i in range(NUM_ROWS)
    ]
    return datasets.Dataset.from_list(rows)


@pytest.fixture(scope="module")
def folder(dataset, model, processor, tmp_path_factory):
    """Three views of each picture, in four files."""
    return cache(dataset, model, processor, tmp_path_factory.mktemp("cache"))


def cache(dataset, model, processor, folder, **options):
    defaults = {"views": 3, "transform": TRANSFORM, "batch_size": 6, "rows_per_shard": 3}
    return cache_features(dataset, model, processor, folder, **(defaults | options))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.match("*.lock")}


def with_picture(dataset, row, data):
    """The same rows, but for the file of one picture."""
    rows = dataset.cast_column("image", datasets.Image(decode=False)).to_list()
    rows[row]["image"] = {"bytes": data, "path": None}
    return datasets.Dataset.from_list(rows, features=dataset.features)


class Interrupted(Exception):
    pass


class CountingTower(torch.nn.Module):
    """A model that counts the pictures it is shown, and breaks down after some."""

    def __init__(self, model, limit=10**9):
        super().__init__()
        self.model, self.limit, self.count = model, limit, 0
        self.config, self.vision_model, self.device = model.config, model.vision_model, model.device

    def get_image_embeds(self, pixel_values):
        self.count += len(pixel_values)
        if self.count > self.limit:
            raise Interrupted
        return self.model.get_image_embeds(pixel_values)


def expected_features(dataset, model, processor, row, view):
    image = dataset[row]["image"]
    if view > 0:
        image = TRANSFORM(image, seeded_generator(0, row, view))
    return model.get_image_embeds(processor(images=[image], return_tensors="pt")["pixel_values"])[0]


def test_each_view_is_what_the_tower_makes_of_it(folder, dataset, model, processor):
    cached = load_cached_features(folder)
    assert len(cached) == NUM_ROWS
    for row in range(NUM_ROWS):
        for view in range(3):
            expected = expected_features(dataset, model, processor, row, view)
            found = read_cached_features(cached[row], view)
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-5)
    first, second = (read_cached_features(cached[0], view) for view in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2**-11), ("float32", 1e-6)])
def test_other_types(dtype, tolerance, dataset, model, processor, tmp_path):
    cached = load_cached_features(cache(dataset, model, processor, tmp_path, dtype=dtype, views=1))
    found = read_cached_features(cached[3])
    assert found.dtype == getattr(torch, dtype)
    expected = expected_features(dataset, model, processor, 3, 0)
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=1e-5)


def test_the_other_columns_stay(folder, dataset):
    cached = load_cached_features(folder)
    others = [name for name in dataset.column_names if name != "image"]
    assert cached.column_names == [*others, *STORED]
    assert cached.select_columns(others).to_list() == dataset.select_columns(others).to_list()
    assert {name: cached.features[name] for name in others} == {name: dataset.features[name] for name in others}
    assert cached[0]["image_embeds_shape"] == [3, FEATURES, WIDTH]
    assert cached[0]["image_embeds_dtype"] == "bfloat16"
    assert len(cached[0]["image_embeds"]) == 3 * FEATURES * WIDTH * 2


def test_a_data_set_of_pictures_alone_and_rows_in_another_order(dataset, model, processor, tmp_path):
    pictures = dataset.select_columns(["image"]).select([4, 2, 7])
    cached = load_cached_features(cache(pictures, model, processor, tmp_path, views=1))
    assert cached.column_names == STORED
    expected = expected_features(dataset, model, processor, 7, 0)
    torch.testing.assert_close(read_cached_features(cached[2]).float(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("limit", [1, 10, 20, 24])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(limit, folder, dataset, model, processor, tmp_path):
    with pytest.raises(Interrupted):
        cache(dataset, CountingTower(model, limit), processor, tmp_path)
    finished = sorted(path.name for path in tmp_path.glob("shard-*.arrow"))
    # The first picture alone goes through the tower for the size; 9 pictures make a file
    assert len(finished) == (limit - 1) // 9
    with pytest.raises(FileNotFoundError, match="lacks [234] of 4 files.*shard-00003-of-00004|, \\.\\.\\."):
        load_cached_features(tmp_path)
    again = CountingTower(model)
    cache(dataset, again, processor, tmp_path)
    assert again.count == 1 + 3 * (NUM_ROWS - 3 * len(finished))
    assert contents(tmp_path) == contents(folder)


def test_a_truncated_file_is_written_anew(folder, dataset, model, processor, tmp_path):
    whole = contents(folder)
    for name in ("cache.json", "shard-00000-of-00004.arrow", "shard-00003-of-00004.arrow"):
        (tmp_path / name).write_bytes(whole[name])
    killed = subprocess.Popen(["true"])
    killed.wait()
    (tmp_path / f".blip2-hf-{_machine()}-{killed.pid}-01234567.tmp").write_bytes(b"half a file")
    with pytest.raises(FileNotFoundError, match="lacks 2 of 4 files .shard-00001-of-00004.arrow, shard-00002-of"):
        load_cached_features(tmp_path)
    cache(dataset, model, processor, tmp_path)
    assert contents(tmp_path) == whole


def test_workers_and_parts_write_the_same_bytes(folder, dataset, model, processor, tmp_path):
    for part in (1, 0):
        cache(dataset, model, processor, tmp_path, num_workers=2, part_index=part, num_parts=2)
        names = {path.name[:11] for path in tmp_path.glob("shard-*")}
        assert names == ({"shard-00001", "shard-00003"} if part else {f"shard-0000{i}" for i in range(4)})
    assert contents(tmp_path) == contents(folder)


def test_a_finished_cache_is_left_alone(folder, dataset, model, processor):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    counting = CountingTower(model)
    cache(dataset, counting, processor, folder)
    assert counting.count == 1
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def other_weights():
    torch.manual_seed(1)
    return randomize(Blip2Model(make_config(None))).eval()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dtype", lambda dataset: {"dtype": "float32"}),
        ("views", lambda dataset: {"views": 2}),
        ("seed", lambda dataset: {"seed": 1}),
        ("transform", lambda dataset: {"transform": RandomResizedCropAndFlip(28, scale=(0.9, 1.0))}),
        ("rows_per_shard", lambda dataset: {"rows_per_shard": 4}),
        ("image_processor", lambda dataset: {"processor": make_image_processor(42)}),
        ("tower_weights", lambda dataset: {"model": other_weights()}),
        ("rows", lambda dataset: {"dataset": dataset.select(range(9))}),
        ("columns", lambda dataset: {"dataset": dataset.remove_columns("key")}),
        ("dataset", lambda dataset: {"dataset": dataset.select(range(NUM_ROWS)[::-1])}),
        ("dataset", lambda dataset: {"dataset": with_picture(dataset, 4, encode(make_image(99)))}),
    ],
)
def test_features_that_were_made_otherwise_are_not_mixed(name, change, folder, dataset, model, processor):
    before = contents(folder)
    arguments = {"dataset": dataset, "model": model, "processor": processor} | change(dataset)
    with pytest.raises(ValueError, match=f"made otherwise.*{name}: "):
        cache(folder=folder, **arguments)
    assert contents(folder) == before


def test_what_is_trained_after_the_tower_does_not_matter(folder, dataset, model, processor):
    layernorm = model.vision_model.post_layernorm
    before = layernorm.weight.detach().clone()
    try:
        with torch.no_grad():
            layernorm.weight.mul_(2)
        cache(dataset, model, processor, folder)
    finally:
        layernorm.weight.data = before


def test_how_the_work_is_done_does_not_matter(folder, dataset, model, processor):
    (folder / "shard-00001-of-00004.arrow").unlink()
    cache(dataset, model, processor, folder, batch_size=1)
    cached = load_cached_features(folder)
    expected = expected_features(dataset, model, processor, 3, 2)
    torch.testing.assert_close(read_cached_features(cached[3], 2).float(), expected, rtol=2**-8, atol=1e-5)
    (folder / "shard-00001-of-00004.arrow").unlink()
    cache(dataset, model, processor, folder)


def test_the_estimate_and_a_full_disk(dataset, model, processor, tmp_path, monkeypatch, capsys):
    cache(dataset, model, processor, tmp_path / "fits", views=1)
    row_bytes = FEATURES * WIDTH * 2
    told = capsys.readouterr().err
    assert (
        f"10 rows of 1 x {FEATURES} x {WIDTH} bfloat16 values: {row_bytes} bytes a row, {row_bytes / 100} kB" in told
    )

    class Usage:
        free = NUM_ROWS * row_bytes - 1

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(OSError, match="free space"):
        cache(dataset, model, processor, tmp_path / "full", views=1)
    assert not list((tmp_path / "full").glob("shard*"))
    # What has been written needs no more space
    (tmp_path / "fits" / "shard-00003-of-00004.arrow").unlink()
    cache(dataset, model, processor, tmp_path / "fits", views=1)


def test_arguments_that_do_not_fit(folder, dataset, model, processor, tmp_path):
    for message, options in {
        "views=2 without a transform": {"views": 2, "transform": None},
        "dtype='int8'": {"dtype": "int8"},
        "part_index=2": {"part_index": 2, "num_parts": 2},
        "no column 'picture'": {"image_column": "picture"},
    }.items():
        with pytest.raises(ValueError, match=message):
            cache(dataset, model, processor, tmp_path, **options)
    for message, rows in {
        "no rows": dataset.select([]),
        "datasets.Dataset was expected, got a IterableDataset": dataset.to_iterable_dataset(),
        "column 'image_embeds' already": dataset.rename_column("key", "image_embeds"),
    }.items():
        with pytest.raises(ValueError, match=message):
            cache(rows, model, processor, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} has no cache.json")):
        load_cached_features(tmp_path)
    with pytest.raises(ValueError, match="no view 3"):
        read_cached_features(load_cached_features(folder)[0], 3)
    row = load_cached_features(folder)[0]
    with pytest.raises(ValueError, match="bytes; 960 were expected"):
        read_cached_features(row | {"image_embeds": row["image_embeds"][:-2]})


def test_broken_pictures_are_named_or_left_out(dataset, model, processor, tmp_path):
    broken = with_picture(dataset, 3, b"no picture")
    with pytest.raises(ImageLoadError, match="row 3"):
        cache(broken, model, processor, tmp_path / "a")
    # All rows of the second file but one
    broken = with_picture(with_picture(broken, 4, b""), 0, b"")
    cached = load_cached_features(cache(broken, model, processor, tmp_path / "b", skip_broken=True))
    assert [caption[0] for caption in cached["caption"]] == [f"number {i}" for i in (1, 2, 5, 6, 7, 8, 9)]
    for row, source in ((0, 1), (2, 5)):
        expected = expected_features(dataset, model, processor, source, 2)
        torch.testing.assert_close(read_cached_features(cached[row], 2).float(), expected, rtol=2**-8, atol=1e-5)


def test_pictures_of_several_sizes(dataset, model, tmp_path):
    processor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, do_center_crop=False
    )
    mixed = datasets.Dataset.from_list([{"image": make_image(i, (40, 30 + i))} for i in range(4)])
    with pytest.raises(ValueError, match="several sizes"):
        cache(mixed, model, processor, tmp_path, views=1)


def test_features_that_do_not_fit_the_type(dataset, model, processor, tmp_path):
    class Large(CountingTower):
        def get_image_embeds(self, pixel_values):
            return super().get_image_embeds(pixel_values) * 1e6

    with pytest.raises(ValueError, match="rows 0 to 1 are not finite in float16"):
        cache(dataset, Large(model), processor, tmp_path, dtype="float16")


def test_the_model_and_global_randomness_are_left_as_they_were(dataset, model, processor, tmp_path):
    model.train()
    state = torch.random.get_rng_state()
    cache(dataset, model, processor, tmp_path, num_workers=1)
    assert model.training
    torch.testing.assert_close(torch.random.get_rng_state(), state)
    model.eval()


def test_training_draws_all_views_and_evaluation_takes_the_picture(folder):
    cached = load_cached_features(folder)
    views = [[read_cached_features(cached[row], view) for view in range(3)] for row in range(NUM_ROWS)]
    pairs = ImageTextPairs(cached, id_column="key")
    drawn = []
    for epoch in range(30):
        pairs.set_epoch(epoch)
        for row in range(NUM_ROWS):
            item = pairs[row]
            assert item["text"] in (f"number {row}", f"no {row}")
            assert item["image_id"] == row * 2**40
            drawn.append(next(view for view in range(3) if torch.equal(item["image_embeds"], views[row][view])))
    assert all(70 < drawn.count(view) < 130 for view in range(3))
    for row, item in enumerate(ImageTextPairs(cached, train=False)):
        assert torch.equal(item["image_embeds"], views[row][0])
        assert item["text"] == f"number {row}"


def test_features_are_not_copied(folder):
    pairs = ImageTextPairs(load_cached_features(folder), train=False)
    first, again, other = (pairs[row]["image_embeds"] for row in (0, 0, 1))
    assert first.data_ptr() == again.data_ptr() != other.data_ptr()
    assert first.untyped_storage().nbytes() == FEATURES * WIDTH * 2


def test_workers_read_the_same_features(folder):
    pairs = ImageTextPairs(load_cached_features(folder).shuffle(seed=0))
    loader = DataLoader(pairs, batch_size=None, num_workers=2)
    for row, item in enumerate(loader):
        assert torch.equal(item["image_embeds"], pairs[row]["image_embeds"])
        assert item["text"] == pairs[row]["text"]


def test_features_of_a_stream(folder, tmp_path):
    cached = load_cached_features(folder)
    for half in range(2):
        cached.shard(2, half, contiguous=True).to_parquet(tmp_path / f"{half}.parquet")
    files = [str(tmp_path / f"{half}.parquet") for half in range(2)]
    source = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    stream = ImageTextStream(source, id_column="key", train=False)
    items = {item["image_id"]: item for item in DataLoader(stream, batch_size=None, num_workers=2)}
    assert len(items) == NUM_ROWS
    for row in range(NUM_ROWS):
        assert torch.equal(items[row * 2**40]["image_embeds"], read_cached_features(cached[row], 0))


def test_a_transform_of_features_is_refused(folder):
    cached = load_cached_features(folder)
    with pytest.raises(ValueError, match="features in place of pictures"):
        ImageTextPairs(cached, transform=TRANSFORM)
    with pytest.raises(ValueError, match="features in place of pictures"):
        ImageTextPairs(cached.to_list(), transform=TRANSFORM)[0]


def test_training_on_features_never_runs_the_tower(folder, dataset, model, processor, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("the tower has been run")

    pixel_values = processor(images=[dataset[i]["image"] for i in range(2)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixel_values).last_hidden_state
    monkeypatch.setattr(model.vision_model, "forward", forbidden)
    pairs = ImageTextPairs(load_cached_features(folder), train=False)
    image_embeds = torch.stack([pairs[i]["image_embeds"] for i in range(2)])
    outputs = model(image_embeds=image_embeds).last_hidden_state
    outputs.sum().backward()
    assert model.query_tokens.weight.grad is not None
    model.zero_grad()
    assert (outputs - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_tower_without_a_qformer(dataset, tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
    )
    tower = randomize(transformers.Dinov2Model(config)).eval()
    processor = make_image_processor()
    cached = load_cached_features(cache(dataset, VisionTower(tower, 2), processor, tmp_path, views=1))
    pixel_values = processor(images=[dataset[0]["image"]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = tower(pixel_values, output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(read_cached_features(cached[0]).float(), expected, rtol=2**-8, atol=1e-5)
    description = json.loads((tmp_path / "cache.json").read_text())
    assert description["vision_feature_layer"] == 2
    assert description["features"] == list(np.shape(expected))
    with pytest.raises(ValueError, match="vision_feature_layer: 2 there, 1 now"):
        cache(dataset, VisionTower(tower, 1), processor, tmp_path, views=1)
