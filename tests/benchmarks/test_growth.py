"""How time, memory and disk space grow, at tiny sizes."""

import subprocess
import sys

import pytest
from paths import DOCS, REPOSITORY


def read_tables(text: str) -> dict[str, dict[str, list[str]]]:
    """Return the cells of each row of tables, by the first cell of the table and of the row."""
    tables = {}
    for block in text.strip().split("\n\n"):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        tables[rows[0][0]] = {"": rows[0][1:], **{name: cells for name, *cells in rows[2:]}}
    return tables


@pytest.fixture(scope="module")
def tables() -> dict[str, dict[str, list[str]]]:
    pytest.importorskip("faiss", reason="approximate search needs faiss-cpu")
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "benchmarks" / "growth.py")]
    command += ["--pictures", "1000", "2000", "--query-tokens", "4", "--queries", "5", "--new", "30"]
    command += ["--rows", "100", "200"]
    return read_tables(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory")
def test_search_grows_as_the_features_do(tables):
    search = tables["search, pictures of 4 × 256 values"]
    assert search[""] == ["1,000", "2,000"]
    # Features of 16 bits, and an index of 8 bits with its clusters
    assert search["disk: features, approximate index, GB"] == ["0.002 and 0.001", "0.004 and 0.002"]
    assert all(0.5 < float(cell) <= 1 for cell in search["recall@10 of approximate search"])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory")
@pytest.mark.parametrize("part", ["caption", "evaluate"])
def test_memory_stays_as_rows_are_written(tables, part):
    rows = tables[f"{part}, rows"]
    assert rows[""] == ["100", "200"]
    for cell in rows["memory after 10%, 50%, 90%, MiB"]:
        first, _, last = map(int, cell.split(", "))
        assert last - first <= 20
    assert all(float(cell) > 0 for cell in rows["milliseconds a row"])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory")
def test_the_page_has_the_same_rows(tables):
    page = (DOCS / "performance.md").read_text()
    names = [name for table in tables.values() for name in table if name and not name.startswith("add 30")]
    assert len(names) == 25
    assert [name for name in names if f"\n| {name} |" not in page] == []
