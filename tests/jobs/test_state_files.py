"""What an earlier run wrote is read, or an error names the file and says what to do."""

import errno
import os

import pytest

from blip2_hf.jobs.errors import StateFileError
from blip2_hf.jobs.state_files import appended_lines, read_json, read_json_lines


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{}", b"null"])
def test_a_file_that_is_no_object(tmp_path, content):
    path = tmp_path / "index.json"
    path.write_bytes(content)
    with pytest.raises(StateFileError, match="index.json.*Build it anew.$"):
        read_json(path, "Build it anew.")
    path.write_text('{"a": [1]}')
    assert read_json(path, "") == read_json(path, "", keys=["a"]) == {"a": [1]}
    with pytest.raises(StateFileError, match=r"index.json: .* with a, b was expected, got \{'a': \[1\]\}"):
        read_json(path, "", keys=["a", "b"])


def test_lines(tmp_path):
    path = tmp_path / "part.jsonl"
    path.write_bytes(b'{"a": 1}\n[2]\n{"a": 3')
    assert list(read_json_lines(path, "", "a list", lambda line: True)) == [{"a": 1}, [2]]
    with pytest.raises(StateFileError, match=r"line 1: a list was expected, got \{'a': 1\}. Delete it.$"):
        list(read_json_lines(path, "Delete it.", "a list", lambda line: isinstance(line, list)))
    path.write_bytes(b'{"a": 1}\n\x00\x00\n{"a": 3}\n')
    lines = read_json_lines(path, "Delete that line.", "an object", lambda line: True)
    assert next(lines) == {"a": 1}
    with pytest.raises(StateFileError, match="part.jsonl, line 2 .*Delete that line.$"):
        next(lines)


def test_lines_are_added_behind_whole_ones(tmp_path):
    path = tmp_path / "part.jsonl"
    for before, after in (("", []), ('{"a": 1}\n{"a": 2', [{"a": 1}]), ('{"a": 1}\n', [{"a": 1}])):
        path.write_text(before)
        with appended_lines(path) as add:
            add({"b": "\udcff"})
            # Out of the process at once
            lines = read_json_lines(path, "", "an object", lambda line: True)
            assert list(lines) == [*after, {"b": "\udcff"}]
    with pytest.raises(OSError, match="part.jsonl"), appended_lines(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
