"""The store of an index: what a step costs does not depend on how many pictures are there already."""

import gc
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from stage1 import Processor, make_retrieval
from tiny import make_image, make_image_processor

from blip2_hf import Blip2Processor
from blip2_hf.search import SearchIndex
from blip2_hf.search.approximate import ApproximateIndex
from blip2_hf.search.store import Shard, Store, create_store


def make_store(folder: Path) -> Store:
    folder.mkdir(exist_ok=True)
    settings = {"folder": ".", "model": "", "store_embeds": False, "precision": "", "weights": ""}
    create_store(folder, {**settings, "num_query_tokens": 2, "image_text_hidden_size": 4})
    return Store(folder)


def add(store: Store, names: list[str]):
    store.add(names, [[0, 0]] * len(names), [{"features": np.ones((len(names), 2, 4), np.float16)}])


def test_pictures_are_added_without_a_look_at_those_that_are_there(tmp_path, monkeypatch):
    store = make_store(tmp_path / "index")
    add(store, ["a", "b", "c"])
    add(store, ["d"])
    ids = [shard.ids for shard in store.shards]
    for shard in store.shards:
        shard.ids = shard.paths = None
    with monkeypatch.context() as context:
        context.setattr(Path, "iterdir", lambda path: pytest.fail(f"{path} was listed"))
        add(store, ["e", "f"])
    assert [*ids, store.shards[-1].ids] == [[0, 1, 2], [3], [4, 5]]
    assert [shard.number for shard in store.shards] == [0, 1, 2]


def test_numbers_of_pictures_are_never_used_again(tmp_path):
    store = make_store(tmp_path / "index")
    add(store, ["a", "b"])
    store.new_approximate_file(store.next_id()).write_bytes(b"")
    store.drop({"b"})
    store.drop({"a"})
    for each in (store, Store(tmp_path / "index")):
        assert (len(each.rows), each.next_id()) == (0, 2)


def test_the_table_of_rows_is_small(tmp_path):
    store = make_store(tmp_path / "index")
    size = 500
    for number in range(40):
        paths = [None if row % 5 == 0 else f"{number}/{row}" for row in range(size)]
        store.shards.append(Shard(number, list(range(number * size, (number + 1) * size)), paths, []))
    tracemalloc.start()
    rows = store.rows
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    expected = [(n * size + row, n, row) for n in range(40) for row in range(size) if row % 5]
    np.testing.assert_array_equal(rows, expected)
    assert peak < 3 * rows.nbytes


def test_an_open_index_has_no_object_for_each_picture_that_garbage_collection_looks_at(tmp_path):
    store = make_store(tmp_path / "index")
    for number in range(5):
        add(store, [f"{number}/{row}" for row in range(200)])
    before = len(gc.get_objects())
    again = Store(tmp_path / "index")
    assert len(gc.get_objects()) - before < 200
    assert again.stats() == store.stats() == {f"{number}/{row}": [0, 0] for number in range(5) for row in range(200)}


def test_small_shards_are_counted_once(tmp_path, monkeypatch):
    """When they are gathered, each is not counted again with each that joins it."""
    store = make_store(tmp_path / "index")
    names = [f"{number}.png" for number in range(60)]
    for name in names:
        add(store, [name])
    calls, alive = [], Shard.alive
    monkeypatch.setattr(Shard, "alive", lambda shard: calls.append(shard) or alive(shard))
    store.gather_small_shards(60)
    assert len(store.shards) == 1 and sorted(store.shards[0].paths) == sorted(names)
    assert len(calls) <= 6 * len(names)


def test_an_index_of_an_earlier_version(tmp_path):
    """Its files, as text: three pictures in two shards, of which one is gone, and a broken one."""
    description = {"version": 1, "folder": "..", "model": "", "store_embeds": False, "precision": "", "weights": ""}
    description |= {"num_query_tokens": 2, "image_text_hidden_size": 4}
    (tmp_path / "index.json").write_text(json.dumps(description, indent=2) + "\n")
    (tmp_path / "broken.json").write_text('{\n  "x.png": [\n    5,\n    6,\n    "no image"\n  ]\n}\n')
    lists = ['{"ids": [0, 1], "paths": ["a", null], "stats": [[10, 1752000000123456789], [11, 12]]}']
    lists += ['{"ids": [3], "paths": ["d"], "stats": [[13, 14]]}']
    for number, text in enumerate(lists, 1):
        (tmp_path / f"pictures-{number:06d}.json").write_text(text + "\n")
        np.save(tmp_path / f"features-{number:06d}.npy", np.full((3 - number, 2, 4), number, np.float16))
    (tmp_path / "approximate-000000007.faiss").write_bytes(b"")
    store = Store(tmp_path)
    assert store.rows.tolist() == [[0, 0, 0], [3, 1, 0]] and store.next_id() == 7
    assert store.stats() == {"a": [10, 1752000000123456789], "d": [13, 14]}
    assert store.read_broken() == {"x.png": (5, 6, "no image")}
    add(store, ["e"])
    store.drop({"d"})
    store.gather_small_shards(8)
    for each in (store, Store(tmp_path)):
        assert each.rows.tolist() == [[0, 0, 0], [7, 0, 1]] and each.next_id() == 8
        assert each.stats() == {"a": [10, 1752000000123456789], "e": [0, 0]}
        assert each.read("features", 0, [0, 1])[:, 0, 0].tolist() == [1, 1]
    # An earlier version reads it, too
    written = '{"ids": [0, 7], "paths": ["a", "e"], "stats": [[10, 1752000000123456789], [0, 0]]}\n'
    assert (tmp_path / "pictures-000004.json").read_text() == written


class Rows(np.ndarray):
    """Counts what is compared."""

    compared = 0

    def __eq__(self, other):
        Rows.compared += self.size
        return super().__eq__(other)


def test_new_rows_are_shared_out_to_their_shards_at_once(tmp_path, monkeypatch):
    store = make_store(tmp_path / "index")
    for number in range(30):
        add(store, [f"{number}/{row}" for row in range(3)])
    store.drop({"0/0", "7/2"})
    added = []
    index = SimpleNamespace(add_with_ids=lambda vectors, ids: added.append((len(vectors), ids.tolist())))
    ApproximateIndex(store)._add(index, store.rows[store.rows[:, 0] > 10].view(Rows), show_progress=False)
    assert Rows.compared == 0
    assert [number for _, ids in added for number in ids] == [n for n in range(11, 90) if n != 23 for _ in range(2)]
    assert all(count == len(ids) for count, ids in added)


def test_a_long_list_of_broken_pictures_is_not_written_for_each_of_them(tmp_path, monkeypatch):
    count = 100
    for number in range(count):
        make_image(number).save(tmp_path / f"{number:03d}a.png")
        (tmp_path / f"{number:03d}b.png").write_bytes(b"no picture")
    written, write = [], Store.write_broken
    monkeypatch.setattr(Store, "write_broken", lambda self, found: written.append(len(found)) or write(self, found))
    processor = Blip2Processor(make_image_processor(), Processor().tokenizer)
    options = {"batch_size": 2, "rows_per_shard": 1, "show_progress": False}
    index = SearchIndex.build(tmp_path, make_retrieval(), processor, **options)
    assert len(index) == len(index.broken()) == written[-1] == count
    # Written each time, they would be count * count / 2 lines
    assert sum(written) <= 12 * count
