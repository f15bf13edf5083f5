"""What errors say."""

import errno

import pytest

from blip2_hf.jobs.errors import describe, did_you_mean


@pytest.mark.parametrize("place", [(), ("out/model",)])
def test_a_full_disk_says_what_to_do(place):
    told = describe(OSError(errno.ENOSPC, "No space left on device", *place))
    assert "No space left on device" in told and told.endswith(
        "Make room on the disk, or give an output on another one."
    )
    assert "Make room" not in describe(OSError(errno.EACCES, "Permission denied", *place))


@pytest.mark.parametrize(
    ("given", "known", "told"),
    [
        ("--modle", ["--model", "--seed"], " Did you mean --model?"),
        ("--lr", ["--help", "--learning-rate"], ""),
        ("--merge", ["--seed", "--help"], ""),
        ("captoin", ["caption", "nocaps"], " Did you mean caption?"),
    ],
)
def test_guesses(given, known, told):
    assert did_you_mean(given, known) == told
