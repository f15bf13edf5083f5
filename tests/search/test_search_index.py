"""The search index: against all pairs written out, step by step, and after an interruption."""

import json
import os
import shutil
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from PIL import Image, ImageFont
from stage1 import Processor, make_stage1
from tiny import make_image, make_image_processor, make_model, make_processor

from blip2_hf import Blip2ForImageTextRetrieval, Blip2ForPreTraining, Blip2Processor
from blip2_hf.cli import index as index_command
from blip2_hf.cli import main
from blip2_hf.cli import search as search_command
from blip2_hf.evaluation import TwoStageRetrieval
from blip2_hf.jobs.errors import StateFileError
from blip2_hf.models.image_loading import load_image
from blip2_hf.models.losses import image_text_similarity
from blip2_hf.search import SearchIndex, SearchResult, find_pictures, load_retrieval_model
from blip2_hf.search.approximate import logger


TEXT = "a red bus on the street"


def save_model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    make_stage1().save_pretrained(folder)
    Blip2Processor(make_image_processor(), Processor().tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture
def loaded(checkpoint):
    return load_retrieval_model(checkpoint, "cpu")


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Ten pictures, five of them in a sub-folder; a broken one; files that are none, or hidden."""
    folder = tmp_path / "pictures"
    (folder / "more" / "deep").mkdir(parents=True)
    for i in range(10):
        make_image(i, (30 + i, 40)).save((folder if i < 5 else folder / "more" / "deep") / f"{i}.png")
    (folder / "broken.JPG").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes((folder / "0.png").read_bytes())
    return folder


@pytest.fixture
def build(pictures, loaded, monkeypatch):
    """Builds the index, and tells how many pictures the tower has seen."""
    model, processor = loaded
    run_tower, seen = model.get_image_embeds, []

    def count(pixel_values, *args, **kwargs):
        seen.append(len(pixel_values))
        return run_tower(pixel_values, *args, **kwargs)

    monkeypatch.setattr(model, "get_image_embeds", count)

    def run(**kwargs):
        seen.clear()
        index = SearchIndex.build(pictures, model, processor, **({"batch_size": 4, "show_progress": False} | kwargs))
        return index, sum(seen)

    run.seen = seen
    return run


@torch.no_grad()
def all_pairs(model, processor, folder: Path, matching: bool = False, skip=()) -> dict[Path, float]:
    """All pictures at once by contrast, as the model's forward has it; by matching one at a time."""
    files = [file for file in sorted(folder.rglob("[0-9]*.png")) if file.name not in skip]
    tokens = processor.tokenizer(TEXT, return_tensors="pt")
    texts = tokens.input_ids, tokens.attention_mask
    pixel_values = processor(images=[load_image(file) for file in files], return_tensors="pt")["pixel_values"]
    scores = model(pixel_values, *texts).logits_per_image[:, 0].tolist()
    if matching:
        for i in range(len(files)):
            pair = model(pixel_values[i : i + 1], *texts, use_image_text_matching_head=True)
            scores[i] += pair.logits_per_image[0, 1].item()
    return dict(zip(files, scores, strict=True))


def assert_ranked(results: list[SearchResult], expected: dict[Path, float], top: int, tolerance: float = 1e-3):
    best = sorted(expected, key=lambda path: -expected[path])[:top]
    assert [result.path for result in results] == best
    assert [result.score for result in results] == pytest.approx([expected[path] for path in best], abs=tolerance)


def test_a_text_finds_what_all_pairs_find(build, loaded, pictures):
    index, num_seen = build()
    assert num_seen == len(index) == 10
    expected = all_pairs(*loaded, pictures)
    assert_ranked(index.search(TEXT, top=4), expected, 4)
    assert_ranked(index.search(TEXT), expected, 10)
    assert list(index.broken()) == ["broken.JPG"]
    assert "not an image" in index.broken()["broken.JPG"]


def test_nothing_of_a_shard_stays_in_memory_when_the_next_is_read(build, monkeypatch):
    """A small tensor among the large ones of a shard keeps malloc from using their memory again."""
    index, _ = build(rows_per_shard=2)
    kept, num_kept = [], []

    class Similarity(torch.Tensor):
        def mean(self, *args, **kwargs):
            found = self.as_subclass(torch.Tensor).mean(*args, **kwargs)
            kept.append(weakref.ref(found))
            return found

    def compare(*features):
        num_kept.append(sum(ref() is not None for ref in kept))
        return image_text_similarity(*features).as_subclass(Similarity)

    monkeypatch.setattr("blip2_hf.search.index.image_text_similarity", compare)
    assert len(index.search(TEXT)) == 10
    assert len(num_kept) >= 3 and sum(num_kept) == 0


@torch.no_grad()
def test_a_picture_finds_itself_first(build, loaded, pictures):
    model, processor = loaded
    index, _ = build()
    files = sorted(pictures.rglob("[0-9]*.png"))
    pixel_values = processor(images=[load_image(file) for file in files], return_tensors="pt")["pixel_values"]
    features = model.get_image_features(pixel_values).pooler_output
    cosines = torch.einsum("qd,nkd->nqk", features[3], features).amax(2).mean(1)
    found = index.search(image=files[3], top=10)
    assert found[0].path == files[3]
    assert_ranked(found, dict(zip(files, cosines.tolist(), strict=True)), 10)


@pytest.mark.parametrize("store_embeds", [False, True])
def test_reranking_is_matching_plus_contrast(build, loaded, pictures, store_embeds):
    model, processor = loaded
    index, _ = build(store_embeds=store_embeds)
    build.seen.clear()
    found = index.search(TEXT, top=10, rerank=10)
    assert sum(build.seen) == (0 if store_embeds else 10)
    assert_ranked(found, all_pairs(model, processor, pictures, matching=True), 10, tolerance=5e-3)

    contrast = all_pairs(model, processor, pictures)
    first = sorted(contrast, key=lambda path: -contrast[path])[:4]
    assert {result.path for result in index.search(TEXT, top=4, rerank=4)} == set(first)

    files = sorted(contrast)
    pixel_values = processor(images=[load_image(file) for file in files], return_tensors="pt")["pixel_values"]
    ranking = TwoStageRetrieval(model, processor.tokenizer, k=10, show_progress=False)(
        model.get_image_embeds(pixel_values), [TEXT]
    ).text_to_image
    assert [result.path for result in found] == [files[i] for i in ranking.index[0].tolist()]


def test_a_picture_that_is_gone_is_not_reranked(build, pictures):
    index, _ = build()
    first = index.search(TEXT, top=1)[0].path
    first.unlink()
    found = index.search(TEXT, top=10, rerank=10)
    assert len(found) == 9
    assert first not in [result.path for result in found]


def test_only_what_is_new_or_changed_is_computed(build, loaded, pictures):
    build(rows_per_shard=4)
    assert build(rows_per_shard=4)[1] == 0
    make_image(20).save(pictures / "20.png")
    make_image(21).save(pictures / "more" / "deep" / "7.png")
    (pictures / "1.png").unlink()
    (pictures / "broken.JPG").write_bytes(b"still no picture")
    index, num_seen = build(rows_per_shard=4)
    assert num_seen == 2
    assert_ranked(index.search(TEXT), all_pairs(*loaded, pictures), 10)
    assert index.broken()["broken.JPG"].count("16 bytes") == 1

    make_image(22).save(pictures / "broken.JPG", format="PNG")
    index, num_seen = build(rows_per_shard=4)
    assert (num_seen, index.broken()) == (1, {})
    assert pictures / "broken.JPG" in [result.path for result in index.search(TEXT)]


def test_pictures_with_impossible_dates(build, loaded, pictures):
    """Clocks that were wrong, and file systems, have years that 64 bits of nanoseconds do not."""
    late = 2**63 + 1000
    os.utime(pictures / "0.png", ns=(late, late))
    if (pictures / "0.png").stat().st_mtime_ns != late:
        pytest.skip("the file system has no such dates")
    os.utime(pictures / "1.png", ns=(-(10**18), -(10**18)))
    index, num_seen = build()
    assert num_seen == len(index) == 10
    # As earlier versions wrote it
    path = index.directory / "pictures-000000.json"
    columns = json.loads(path.read_text())
    columns["stats"][columns["paths"].index("0.png")][1] = late
    path.write_text(json.dumps(columns))
    again, num_seen = build()
    assert (len(again), num_seen) == (10, 0)
    assert_ranked(again.search(TEXT), all_pairs(*loaded, pictures), 10)


def test_broken_pictures_are_not_read_again(build, monkeypatch):
    build()
    monkeypatch.setattr(
        "blip2_hf.jobs.picture_inputs.load_image_for", lambda _, path, *name: pytest.fail(f"{path} was read")
    )
    assert list(build()[0].broken()) == ["broken.JPG"]


def test_small_shards_are_gathered(build, loaded, pictures):
    for i in range(30, 36):
        make_image(i).save(pictures / f"{i}.png")
        index, _ = build(rows_per_shard=10, store_embeds=True)
    assert len(index) == 16
    names = sorted(path.name for path in index.directory.iterdir())
    assert len([name for name in names if name.startswith("features")]) == 2
    assert len([name for name in names if name.startswith(("embeds", "pictures"))]) == 4
    assert_ranked(index.search(TEXT, top=16), all_pairs(*loaded, pictures), 16)
    assert_ranked(
        index.search(TEXT, top=16, rerank=16), all_pairs(*loaded, pictures, matching=True), 16, tolerance=5e-3
    )


def test_an_interrupted_run_goes_on(build, loaded, pictures, monkeypatch):
    model, _ = loaded
    count = model.get_image_embeds

    def stop_at_the_third(pixel_values):
        if len(build.seen) == 2:
            raise KeyboardInterrupt
        return count(pixel_values)

    with monkeypatch.context() as context:
        context.setattr(model, "get_image_embeds", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            build(batch_size=3, rows_per_shard=3)
    num_seen = sum(build.seen)
    assert 5 <= num_seen <= 6  # the broken picture is in one of the batches

    # Of a shard, all but the last file
    leftover = pictures / ".blip2-index" / "features-000099.npy"
    leftover.write_bytes(b"")
    half = SearchIndex.open(pictures, *loaded, show_progress=False)
    assert 3 <= len(half) <= num_seen
    index, rest = build(batch_size=3, rows_per_shard=3)
    assert rest == 10 - len(half)
    assert not leftover.exists()
    assert_ranked(index.search(TEXT), all_pairs(*loaded, pictures), 10)


def test_killed_while_shards_were_gathered(build, loaded, pictures):
    """The new shard is there, and the old ones still are."""
    index, _ = build(rows_per_shard=4)
    for name in ("features-{}.npy", "pictures-{}.json"):
        shutil.copy(index.directory / name.format("000000"), index.directory / name.format("000050"))
    again, num_seen = build(rows_per_shard=4)
    assert (len(again), num_seen) == (10, 0)
    assert_ranked(again.search(TEXT), all_pairs(*loaded, pictures), 10)


def test_a_file_that_is_gone(build, loaded, pictures):
    """Who has opened the index before is told so; the next update makes the file again."""
    index, _ = build(rows_per_shard=4)
    (index.directory / "features-000001.npy").unlink()
    with pytest.raises(FileNotFoundError, match="features-000001.npy is gone: .*Open it again"):
        index.search(TEXT)
    assert len(SearchIndex.open(pictures, *loaded, show_progress=False).search(TEXT)) < 10
    again, num_seen = build(rows_per_shard=4)
    assert 0 < num_seen < 10
    assert_ranked(again.search(TEXT), all_pairs(*loaded, pictures), 10)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("index.json", "", " can't be read"),
        ("index.json", '{"version": 1}', ": an object of JSON with folder, model, .* was expected"),
        ("pictures-000000.json", "", " can't be read"),
        ("pictures-000000.json", "{}", ": an object of JSON with ids, paths, stats was expected"),
        ("broken.json", "", " can't be read"),
        ("broken.json", '{"broken.JPG": 1}', ": .*size, mtime, reason.* was expected"),
        ("broken.json", '{"broken.JPG": [1, 2]}', ": .*size, mtime, reason.* was expected"),
    ],
)
def test_a_file_that_can_not_be_read(build, name, content, message):
    index, _ = build()
    (index.directory / name).write_text(content)
    with pytest.raises(StateFileError, match=f"{name}{message}.*--rebuild"):
        build()
    again, num_seen = build(rebuild=True)
    assert (len(again), num_seen) == (10, 10)


@pytest.mark.parametrize(
    ("name", "num_lost"), [("features-000000.npy", 7), ("embeds-000001.npy", 3), ("approximate-000000010.faiss", 0)]
)
def test_a_file_that_was_cut_off(build, loaded, pictures, name, num_lost):
    pytest.importorskip("faiss", reason="approximate search needs faiss-cpu")
    index, _ = build(store_embeds=True, approximate=True, rows_per_shard=5)
    path = index.directory / name
    path.write_bytes(path.read_bytes()[:-100])
    for action in (
        lambda: index.search(TEXT, rerank=20),
        lambda: SearchIndex.open(pictures, *loaded, show_progress=False).search(TEXT),
        build,
    ):
        with pytest.raises(StateFileError, match=f"{name} can't be read .*cut off or changed. Delete it"):
            action()
    path.unlink()
    again, num_seen = build(approximate=True)
    assert (len(again), num_seen) == (10, num_lost)
    assert_ranked(again.search(TEXT), all_pairs(*loaded, pictures), 10)


def test_rebuilt_without_what_says_which_model_it_was(build, loaded, pictures):
    index, _ = build()
    (index.directory / "index.json").write_text("{")
    with pytest.raises(StateFileError, match="index.json can't be read .*name its model: .*--model MODEL --rebuild"):
        SearchIndex.build(pictures, rebuild=True)
    assert len(SearchIndex.build(pictures, *loaded, rebuild=True, show_progress=False)) == 10


def test_rebuilt_next_to_files_of_others(build, pictures):
    index, _ = build()
    (index.directory / "notes.txt").write_text("mine")
    index, num_seen = build(rebuild=True)
    assert (len(index), num_seen) == (10, 10)
    assert (index.directory / "notes.txt").read_text() == "mine"


def test_an_index_behind_a_link(build, loaded, pictures, tmp_path):
    build()
    link = tmp_path / "deep" / "link"
    link.parent.mkdir()
    link.symlink_to(pictures / ".blip2-index")
    index = SearchIndex.open(link, *loaded, show_progress=False)
    assert_ranked(index.search(TEXT), all_pairs(*loaded, pictures), 10)


def test_another_model_is_refused(build, loaded, pictures, tmp_path):
    index, _ = build()
    other = load_retrieval_model(save_model(tmp_path / "other", 1), "cpu")
    for attempt in (SearchIndex.open, SearchIndex.build):
        with pytest.raises(ValueError, match="made otherwise .weights: .* there, .* now.*built with.*--rebuild"):
            attempt(pictures, *other)
    smaller = Blip2Processor(make_image_processor(14), loaded[1].tokenizer)
    with pytest.raises(ValueError, match="made otherwise .image_processor: .*28 there, 14 now"):
        SearchIndex.open(pictures, loaded[0], smaller)
    rebuilt = SearchIndex.build(pictures, *other, rebuild=True, show_progress=False)
    assert_ranked(rebuilt.search(TEXT), all_pairs(*other, pictures), 10)


def test_the_same_model_in_another_precision(build, checkpoint, pictures):
    build()
    for dtype in ("bfloat16", "float16"):
        index = SearchIndex.open(pictures, checkpoint, device="cpu", dtype=dtype, show_progress=False)
        assert index.model.dtype == getattr(torch, dtype)
        assert len(index.search(TEXT, top=3, rerank=5)) == 3


def test_pictures_and_index_are_moved_together(build, loaded, pictures, tmp_path):
    build()
    moved = pictures.rename(tmp_path / "elsewhere")
    index = SearchIndex.open(moved, *loaded, show_progress=False)
    assert_ranked(index.search(TEXT), all_pairs(*loaded, moved), 10)


def test_built_with_the_model_of_stage_1(checkpoint, pictures):
    """It has weights that the model for retrieval lacks, and no ranking needs."""
    model, processor = Blip2ForPreTraining.from_pretrained(checkpoint), Blip2Processor.from_pretrained(checkpoint)
    SearchIndex.build(pictures, model, processor, show_progress=False)
    index = SearchIndex.open(pictures, device="cpu", show_progress=False)
    assert type(index.model) is Blip2ForImageTextRetrieval
    assert_ranked(index.search(TEXT), all_pairs(index.model, processor, pictures), 10)


@pytest.mark.parametrize("transformers_compatible", [False, True])
def test_retrieval_checkpoints(checkpoint, pictures, tmp_path, transformers_compatible):
    """The index of a checkpoint of stage 1 is that of the model for retrieval in it."""
    SearchIndex.build(pictures, checkpoint, device="cpu", show_progress=False)
    model = Blip2ForImageTextRetrieval.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "retrieval", transformers_compatible=transformers_compatible)
    processor = Blip2Processor.from_pretrained(checkpoint)
    processor.save_pretrained(tmp_path / "retrieval", transformers_compatible=transformers_compatible)
    index = SearchIndex.open(pictures, tmp_path / "retrieval", device="cpu", show_progress=False)
    assert_ranked(index.search(TEXT), all_pairs(model.eval(), processor, pictures), 10)


def test_what_does_not_fit(build, loaded, pictures, tmp_path):
    index, _ = build()
    for arguments, message in (
        ({}, "either a text or an image"),
        ({"text": TEXT, "image": "x.png"}, "either a text or an image"),
        ({"text": "  "}, "empty"),
        ({"text": TEXT, "top": 0}, "top is at least 1"),
        ({"text": TEXT, "top": 5, "rerank": 3}, "as many as are to be found"),
        ({"image": make_image(), "rerank": 20}, "rerank goes with a text"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(**arguments)
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "no pictures"), (tmp_path / "missing", "no such folder")):
        with pytest.raises(ValueError, match=message):
            find_pictures(folder)
    with pytest.raises(FileNotFoundError, match=r"has no index.*blip2-hf index"):
        SearchIndex.open(tmp_path / "empty", *loaded)
    with pytest.raises(ValueError, match="without the tower's output"):
        build(store_embeds=True)
    with pytest.raises(ValueError, match="files in it, but no index"):
        build(directory=pictures)
    with pytest.raises(ValueError, match="is an index of"):
        SearchIndex.build(pictures / "more", *loaded, directory=index.directory)


def test_pictures_that_have_all_gone_do_not_empty_the_index(build, loaded, pictures):
    """A disk that is not mounted looks like that."""
    index, _ = build()
    for path in (*pictures.rglob("*.png"), pictures / "broken.JPG"):
        path.unlink()
    with pytest.raises(ValueError, match="no pictures"):
        build()
    assert len(SearchIndex.open(pictures, *loaded)) == 10


def test_models_that_are_not_for_retrieval(tmp_path, pictures):
    make_model().save_pretrained(tmp_path / "captioner")
    make_processor().save_pretrained(tmp_path / "captioner")
    with pytest.raises(ValueError, match="has not learned to match images with texts"):
        load_retrieval_model(tmp_path / "captioner", "cpu")
    torch.manual_seed(0)
    model = Blip2ForImageTextRetrieval(make_stage1().config)
    index = SearchIndex.build(pictures, model, make_processor(), show_progress=False)
    with pytest.raises(ValueError, match="tokens beyond the 64"):
        index.search(TEXT)


# Approximate search


def clustered_index(tmp_path, num_pictures: int = 3000, num_queries: int = 4, dim: int = 64):
    """An index with features that were drawn, in clusters, and texts for them."""
    folder = tmp_path / "clusters"
    folder.mkdir()
    make_image().save(folder / "0.png")
    model = Blip2ForImageTextRetrieval(make_stage1(image_text_hidden_size=dim).config)
    index = SearchIndex.build(folder, model, Blip2Processor(make_image_processor(), Processor().tokenizer))
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(50, dim, generator=generator)
    pictures = centres[torch.randint(50, (num_pictures,), generator=generator)]
    pictures = pictures + 0.7 * torch.randn(num_pictures, dim, generator=generator)
    queries = pictures[:, None] + 0.5 * torch.randn(num_pictures, num_queries, dim, generator=generator)
    features = torch.nn.functional.normalize(queries, dim=-1).half().numpy()
    names = [f"{i}.png" for i in range(1, num_pictures + 1)]
    for start in range(0, num_pictures, 1000):
        part = slice(start, start + 1000)
        index._store.add(names[part], [[0, 0]] * len(names[part]), [{"features": features[part]}])
    texts = pictures[torch.randint(num_pictures, (50,), generator=generator)]
    texts = texts + 2 * torch.randn(1, dim, generator=generator) + torch.randn(50, dim, generator=generator)
    return index, torch.nn.functional.normalize(texts, dim=-1)


def recall(index, texts) -> float:
    """The share of the exact ten best that are found approximately."""
    shares = []
    for text in texts:
        found = [
            {tuple(row) for row in index._compare(text[None], 10, exact=exact)[0].tolist()} for exact in (True, False)
        ]
        shares.append(len(found[0] & found[1]) / 10)
    return sum(shares) / len(shares)


def test_approximate_search_finds_what_exact_search_finds(tmp_path):
    pytest.importorskip("faiss", reason="approximate search needs faiss-cpu")
    index, texts = clustered_index(tmp_path)
    assert index._approximate.propose(texts[:1], 10) is None
    index._approximate.update(True, show_progress=False)
    assert 100 <= len(index._approximate.propose(texts[:1], 10)) <= 1000
    assert recall(index, texts) >= 0.95

    scores = [index._compare(texts[:1], 10, exact=exact)[1] for exact in (True, False)]
    torch.testing.assert_close(scores[0][0], scores[1][0])


def test_the_approximate_index_lags_behind(tmp_path, monkeypatch):
    """Pictures that are gone are not found, new ones are: before the approximate index has them, and after."""
    pytest.importorskip("faiss", reason="approximate search needs faiss-cpu")
    index, texts = clustered_index(tmp_path)
    index._approximate.update(True, show_progress=False)
    path, covered = index._store.approximate_file()
    best = index._compare(texts[:1], 10, exact=True)[0]
    index._store.drop({index._store.name(shard, row) for shard, row in best.tolist()})
    features = texts[0].half().numpy()[None, None].repeat(4, axis=1)
    index._store.add(["new.png"], [[0, 0]], [{"features": features}])
    monkeypatch.setattr("blip2_hf.search.approximate._LAG", 3000)
    for _ in range(2):
        assert len(index) == 2992
        assert recall(index, texts[:10]) >= 0.95
        (shard, row), *_ = index._compare(texts[:1], 10, exact=False)[0].tolist()
        assert index._store.name(shard, row) == "new.png"
        index._approximate.update(None, show_progress=False)
    newer, up_to = index._store.approximate_file()
    assert up_to == covered + 1
    assert [file.name for file in index.directory.glob("approximate*")] == [newer.name]
    assert newer != path


def test_an_open_index_passes_over_what_another_process_has_added(tmp_path):
    """The approximate index of the other process has pictures that this one does not know."""
    pytest.importorskip("faiss", reason="approximate search needs faiss-cpu")
    index, texts = clustered_index(tmp_path)
    index._approximate.update(True, show_progress=False)
    other = SearchIndex(
        index.directory,
        index.model,
        SimpleNamespace(image_processor=index.image_processor, qformer_tokenizer=index.tokenizer),
    )
    features = texts[0].half().numpy()[None, None].repeat(4, axis=1).repeat(600, axis=0)
    other._store.add([f"new{number}.png" for number in range(600)], [[0, 0]] * 600, [{"features": features}])
    other._approximate.update(None, show_progress=False)
    assert other._store.approximate_file()[1] == index._store.next_id() + 600
    assert len(index._approximate.propose(texts[:1], 10)) >= 100
    assert recall(index, texts) >= 0.95


def test_as_many_are_found_approximately_as_are_wanted(tmp_path):
    """An eighth of the clusters does not have so many."""
    pytest.importorskip("faiss", reason="approximate search needs faiss-cpu")
    index, texts = clustered_index(tmp_path)
    index._approximate.update(True, show_progress=False)
    rows, scores = index._compare(texts[:1], 2900, exact=False)
    assert len(rows) == len({tuple(row) for row in rows.tolist()}) == len(scores) == 2900


def test_an_approximate_index_that_is_up_to_date_is_left(tmp_path):
    pytest.importorskip("faiss", reason="approximate search needs faiss-cpu")
    index, _ = clustered_index(tmp_path, num_pictures=200)
    index._approximate.update(True, show_progress=False)
    path, _ = index._store.approximate_file()
    before = path.stat().st_mtime_ns
    index._approximate.update(True, show_progress=False)
    assert path.stat().st_mtime_ns == before


def test_a_few_new_pictures_do_not_write_the_approximate_index_anew(tmp_path):
    """Adding a picture would otherwise cost a copy of all others."""
    pytest.importorskip("faiss", reason="approximate search needs faiss-cpu")
    index, texts = clustered_index(tmp_path, num_pictures=999)
    index._approximate.update(True, show_progress=False)
    path, covered = index._store.approximate_file()
    before = path.stat().st_mtime_ns
    features = texts[0].half().numpy()[None, None].repeat(4, axis=1)
    for number in range(10):
        index._store.add([f"new{number}.png"], [[0, 0]], [{"features": features}])
        index._approximate.update(None, show_progress=False)
    assert path.stat().st_mtime_ns == before
    found = {index._store.name(*row) for row in index._compare(texts[:1], 10, exact=False)[0].tolist()}
    assert found == {f"new{number}.png" for number in range(10)}
    index._store.add(["one more.png"], [[0, 0]], [{"features": features}])
    index._approximate.update(None, show_progress=False)
    assert index._store.approximate_file()[1] == covered + 11


def test_clusters_of_the_approximate_index_do_not_become_ever_more(tmp_path, monkeypatch):
    """Each vector is compared with each of them."""
    faiss = pytest.importorskip("faiss", reason="approximate search needs faiss-cpu")
    monkeypatch.setattr("blip2_hf.search.approximate._MOST_CLUSTERS", 40)
    found = []
    for count in (100, 400, 900):
        (tmp_path / str(count)).mkdir()
        index, _ = clustered_index(tmp_path / str(count), num_pictures=count)
        found.append(index._approximate._train(faiss).nlist)
    assert found == [20, 40, 40]


def test_no_approximate_index_where_all_pictures_are_broken(build, pictures):
    pytest.importorskip("faiss", reason="approximate search needs faiss-cpu")
    for path in pictures.rglob("*.png"):
        path.write_bytes(b"no picture")
    index, _ = build(approximate=True)
    assert index.search(TEXT) == index.search(TEXT, rerank=12) == []
    assert len(index.broken()) == 11


def test_without_faiss(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r'pip install "blip2-hf\[search\]"'):
        build(approximate=True)
    monkeypatch.setattr("blip2_hf.search.approximate.APPROXIMATE_FROM", 5)
    with patch.object(logger, "warning") as warning:
        index, _ = build()
    assert "compare with all 10 pictures: approximate search needs faiss" in warning.call_args.args[0]
    assert len(index.search(TEXT, top=3)) == 3


# The commands


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr("blip2_hf.cli.COMMANDS", (index_command, search_command))
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: main([str(argument) for argument in arguments])


def test_the_commands(run, checkpoint, pictures, loaded, capsys, monkeypatch):
    run("index", pictures, "--model", checkpoint, "--device", "cpu", "--num-workers", "1", "--batch-size", "4")
    said = capsys.readouterr()
    assert said.out.startswith("10 pictures are in the index")
    assert "11 pictures, of which 11 new, 0 changed, 0 kept, 0 broken as before; 0 gone." in said.err
    assert "Left out because they can't be read (1, listed in" in said.err
    assert "broken.JPG" in said.err

    run("index", pictures, "--device", "cpu")
    assert "0 new, 0 changed, 10 kept, 1 broken as before; 0 gone." in capsys.readouterr().err

    expected = all_pairs(*loaded, pictures)
    run("search", TEXT, "--index", pictures, "--device", "cpu", "--json", "--top", "3")
    found = [SearchResult(Path(row["path"]), row["score"]) for row in json.loads(capsys.readouterr().out)]
    assert_ranked(found, expected, 3)
    assert not Path("search.png").exists()

    monkeypatch.chdir(pictures)
    run("search", TEXT, "--device", "cpu", "--top", "5", "--rerank", "10")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    best = max((all_pairs(*loaded, pictures, matching=True)).items(), key=lambda item: item[1])
    assert lines[0].split() == [f"{float(lines[0].split()[0]):.4f}", str(best[0])]
    assert lines[-1] == "Sheet: search.png"
    assert Image.open("search.png").format == "PNG"


def test_the_sheet(run, checkpoint, pictures, capsys, monkeypatch):
    colour = (200, 40, 90)
    Image.new("RGB", (30, 40), colour).save(pictures / "3.png")
    SearchIndex.build(pictures, checkpoint, device="cpu", show_progress=False)
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    sheet = pictures.parent / "sheets" / "out.png"
    like = pictures / "3.png"
    run("search", "--image", like, "--index", pictures, "--device", "cpu", "--top", "6", "--sheet", sheet)
    side, gap, top = search_command.PICTURE, search_command.GAP, search_command.TITLE
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert image.size == (gap + 4 * (side + gap), top + 2 * (side + search_command.CAPTION + gap))
        # The picture itself comes first, whole: in the middle of its square, which is wider
        assert image.getpixel((gap + side // 2, top + side // 2)) == colour
        assert image.getpixel((gap + side // 2, top + 1)) == colour
        assert image.getpixel((gap + 1, top + side // 2)) == (0xEE, 0xEE, 0xEE)
        # Below it is its score
        score = image.crop((gap, top + side, gap + side, top + side + search_command.CAPTION)).convert("L")
        assert min(score.tobytes()) < 100
    run("search", TEXT, "--index", pictures, "--device", "cpu", "--open")
    assert len(opened) == 1
    assert opened[0].startswith("file://")
    assert opened[0].endswith("search.png")
    assert capsys.readouterr().out.splitlines()[-1].endswith("search.png")


def test_the_sheet_of_a_picture_that_is_gone(tmp_path):
    results = [SearchResult(tmp_path / ("long name " * 20) / "gone.png", 0.5)]
    sheet = search_command.draw_sheet(results, "a very long text " * 20, tmp_path)
    assert sheet.size[0] == search_command.PICTURE + 2 * search_command.GAP
    assert search_command.draw_sheet([], "nothing", tmp_path).size[1] == search_command.TITLE


def test_a_long_text_loses_its_end_and_a_long_name_its_beginning():
    font = ImageFont.load_default(16)
    text = "a red bus in front of the blue house"
    assert search_command._cut(text, font, 1000) == search_command._cut(text, font, 1000, at_end=True) == text
    shown, name = search_command._cut(text, font, 150, at_end=True), search_command._cut(text, font, 150)
    assert (
        shown.startswith("a red bus") and shown.endswith("...") and name.startswith("...") and name.endswith("house")
    )
    assert all(100 < font.getlength(each) <= 150 for each in (shown, name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search"], "nothing to search for was given"),
        (["search", "x", "--image", "y.png"], "Give one of the two"),
        (["search", "x", "--sheet", "out.jpg"], "ends in .png"),
        (["search", "x", "--index", "nowhere"], "There is no folder nowhere"),
        (["index", "nowhere", "--model", "x"], "There is no folder nowhere"),
        (["index", "pictures"], "has no index"),
    ],
)
def test_commands_that_do_not_fit(run, pictures, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(*arguments)


def test_a_stopped_command_says_how_to_go_on(run, pictures, checkpoint, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(SearchIndex, "build", stop)
    for arguments, message in (([], "same command again to go"), (["--rebuild"], "again, without --rebuild, to go")):
        with pytest.raises(SystemExit, match="130"):
            run("index", pictures, "--model", checkpoint, *arguments)
        assert message in capsys.readouterr().err


def test_names_that_are_not_unicode(build, pictures, run, checkpoint, capsys):
    try:
        shutil.copy(pictures / "0.png", os.fsdecode(os.fsencode(pictures) + b"/\xff0.png"))
    except OSError:
        pytest.skip("this file system has Unicode names alone")
    build()
    run("search", TEXT, "--index", pictures, "--model", checkpoint, "--device", "cpu")
    assert "\\udcff0.png" in capsys.readouterr().out
