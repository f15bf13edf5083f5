"""Which URLs are fetched for samples that come from several datasets."""

import pytest

from blip2_hf.evaluation import CaptionSample
from blip2_hf.evaluation.retrieval_benchmark import _allowed_urls
from blip2_hf.evaluation.samples import RowImage


@pytest.mark.parametrize(
    "given, expected",
    [
        ([], None),
        ([False, False], False),
        ([True, False], False),
        ([["a", "b"], False], False),
        ([True, True], []),
        ([True, ["a"]], []),
        ([["a", "b"], ["b", "c"], "b"], ["b"]),
    ],
)
def test_no_row_leads_where_another_may_not(given, expected):
    images = ["a.png", *(RowImage([], 0, "image", allowed) for allowed in given)]
    assert _allowed_urls([CaptionSample(image, i, []) for i, image in enumerate(images)]) == expected
