"""No fewer of transformers' tests pass for our BLIP-2 than for its own (runs both: about five minutes)."""

import pytest

from .compare import compare, passes_there_only, table
from .package import Unavailable, load


@pytest.mark.slow
def test_what_passes_for_transformers_own_blip2_passes_for_ours():
    try:
        load("test_modeling_common")
    except Unavailable as reason:
        pytest.skip(str(reason))
    ours, theirs = compare()
    print(table({"blip2_hf": ours, "transformers": theirs}))
    assert "passed" in theirs.values()
    assert passes_there_only(ours, theirs) == []
