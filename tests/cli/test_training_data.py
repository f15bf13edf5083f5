"""What `finetune` and `pretrain` learn from and what they hold out, without a model."""

from argparse import Namespace

import datasets
import pytest
from tiny import make_image

from blip2_hf.cli._training import find_ids, open_rows, prefer_loss_of_few, prepare_rows
from blip2_hf.data import ImageTextPairs


@pytest.fixture
def options(tmp_path) -> Namespace:
    """Options of a table with four embedded pictures in three rows each."""
    rows = {"image": [make_image(n % 4) for n in range(12)], "caption": [f"text {n}" for n in range(12)]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    unset = dict.fromkeys(("validation", "id_column", "image_column", "image_root"))
    return Namespace(data=str(tmp_path / "rows.parquet"), held_out=2, seed=0, skip_bad_rows=False, **unset)


def split(options: Namespace) -> tuple[datasets.Dataset, datasets.Dataset]:
    rows = prepare_rows(options, open_rows(options), {"--text-column": "caption"}, "caption")
    return rows["train"], rows["validation"]


@pytest.mark.parametrize(("held_out", "pictures"), [(2, 2), (0.25, 1), (0.01, 1)])
def test_embedded_pictures_are_held_out_with_all_their_rows(held_out, pictures, options):
    options.held_out = held_out
    train, validation = split(options)
    (ids,) = find_ids(options, validation)
    column = ids["id_column"]
    assert len(set(validation[column])) == pictures and len(validation) == 3 * pictures
    assert not set(validation[column]) & set(train[column]) and len(train) + len(validation) == 12


@pytest.mark.parametrize(("images", "expected"), [(9, "loss"), (10, "mean_recall")])
def test_the_loss_decides_if_few_pictures_are_held_out(images, expected, capsys):
    captions = [f"text {n}" for n in range(3 * images)]
    rows = [{"image": make_image(n % images), "caption": caption} for n, caption in enumerate(captions)]
    arguments = Namespace(load_best_model_at_end=True, metric_for_best_model="mean_recall", greater_is_better=True)
    prefer_loss_of_few(arguments, ImageTextPairs(rows), "mean_recall")
    assert arguments.metric_for_best_model == expected and arguments.greater_is_better == (expected != "loss")
    assert ("Held-out pictures: 9, too few" in capsys.readouterr().out) == (expected == "loss")
