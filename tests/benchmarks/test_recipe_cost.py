"""The cost of the recipe, counted again: the table of docs/performance.md."""

import subprocess
import sys

import pytest
from paths import DOCS, REPOSITORY


@pytest.mark.slow
def test_the_table_is_that_of_the_page():
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "benchmarks" / "recipe_cost.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    table, _, notes = printed.partition("\n\n")
    page = (DOCS / "performance.md").read_text()
    assert len(table.splitlines()) == 11 and table in page
    share, disk = "14% of the peak", "93 TB"
    assert share in notes and disk in notes and share in page and disk in page
