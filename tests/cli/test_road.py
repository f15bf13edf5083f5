"""A folder of pictures, from command to command: each reads what the one before it has written."""

import json
from pathlib import Path

import datasets
import pytest
from saved_models import save_captioner, save_stage1
from tiny import make_image

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.cli import main
from blip2_hf.data import ImageTextPairs, LanguageModelCollator, load_cached_features, load_rows
from blip2_hf.training import Blip2Trainer, Stage2Arguments


NAMES = ["a.png", "b.jpg", "trips/c.PNG", "trips/sea/d.png"]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Pictures in folders, and what is none: a broken file, a hidden folder, a text."""
    folder = tmp_path / "photos"
    for seed, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(seed).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / ".thumbnails").mkdir()
    make_image(9).save(folder / ".thumbnails" / "a.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def train(name: str, pairs: ImageTextPairs):
    """Fine-tune a captioner for two large steps, and save it as `trained`."""
    model, processor = Blip2ForConditionalGeneration.from_pretrained(name), Blip2Processor.from_pretrained(name)
    arguments = Stage2Arguments("trained", max_steps=2, warmup_steps=0, learning_rate=0.5, report_to=[], use_cpu=True)
    collator = LanguageModelCollator(processor)
    trainer = Blip2Trainer(model, arguments, train_dataset=pairs, data_collator=collator, processing_class=processor)
    trainer.train()
    trainer.save_model()


def test_from_a_folder_to_captions_search_training_data_and_scores(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    # With its code, as on the Hub
    save_captioner(tmp_path / "captioner", with_code=True)
    save_stage1(tmp_path / "stage1")

    caption = ["caption", "photos", "--model", "captioner", "--output", "captions.jsonl", "--max-new-tokens", "5"]
    main([*caption, "--num-workers", "0"])
    captions = [json.loads(line) for line in Path("captions.jsonl").read_text().splitlines()]
    broken = [json.loads(line) for line in Path("captions.jsonl.broken.jsonl").read_text().splitlines()]
    assert [row["file"] for row in captions] == NAMES and [row["file"] for row in broken] == ["broken.png"]

    main(["index", "photos", "--model", "stage1", "--num-workers", "0"])
    assert "broken.png" in json.loads((photos / ".blip2-index" / "broken.json").read_text())
    capsys.readouterr()
    main(["search", "a dog", "--index", "photos", "--json"])
    found = json.loads(capsys.readouterr().out)
    # The pictures that are captioned are those that are found
    assert sorted(Path(row["path"]).relative_to(photos).as_posix() for row in found) == NAMES

    rows = [{"image": str(photos / row["file"]), "caption": f"a picture of {row['file']}"} for row in captions]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet("rows.parquet")
    capfilt = ["capfilt", "rows.parquet", "--captioner", "captioner", "--filter", "stage1", "--output", "filtered"]
    main([*capfilt, "--num-captions", "2", "--keep", "1", "--max-new-tokens", "5", "--num-workers", "0"])
    # What is kept is learned from as it is
    pairs = ImageTextPairs(load_rows("filtered"), text_column="kept_captions")
    assert len(pairs) == len(NAMES) and all(pair["text"] for pair in pairs)

    cache = ["cache-features", "filtered", "--model", "stage1", "--size", "28", "--dtype", "float32"]
    main([*cache, "--output", "features"])
    features = ImageTextPairs(load_cached_features("features"), text_column="kept_captions")
    assert [pair["text"] for pair in features] == [pair["text"] for pair in pairs]
    assert features[0]["image_embeds"].shape[1] == 32

    evaluate = ["evaluate", "caption", "--data", "rows.parquet", "--model", "captioner", "--output", "scores"]
    main([*evaluate, "--generate", "max_new_tokens=5", "min_new_tokens=0", "--num-workers", "0"])
    results = json.loads(Path("scores/results.json").read_text())
    assert results["num_scored"] == {"overall": len(NAMES)} and "CIDEr-D" in results["scores"]

    # A model that has learned writes other captions: they are not mixed with those that are there
    train("captioner", pairs)
    caption[caption.index("captioner")] = "trained"
    with pytest.raises(SystemExit, match="captions.jsonl was made otherwise .*weights.*--overwrite"):
        main([*caption, "--num-workers", "0"])
    main([*caption, "--num-workers", "0", "--overwrite"])
    again = [json.loads(line) for line in Path("captions.jsonl").read_text().splitlines()]
    assert [row["file"] for row in again] == NAMES and again != captions


def test_a_picture_that_comes_later_is_found_among_those_of_an_approximate_index(tmp_path, monkeypatch, capsys):
    """It is compared exactly until it is added to the approximate index, which is then copied as a whole."""
    pytest.importorskip("faiss", reason="approximate search needs faiss-cpu")
    monkeypatch.chdir(tmp_path)
    save_stage1(tmp_path / "stage1")
    Path("photos").mkdir()
    for number in range(120):
        make_image(number).save(f"photos/{number:03d}.png")
    index = ["index", "photos", "--model", "stage1", "--num-workers", "0", "--batch-size", "40"]

    def search(*options: str) -> list[dict]:
        capsys.readouterr()
        main(["search", "--image", "photos/later.png", "--index", "photos", "--top", "3", "--json", *options])
        return json.loads(capsys.readouterr().out)

    main([*index, "--approximate"])
    (clusters,) = Path("photos/.blip2-index").glob("*.faiss")
    before = clusters.stat().st_mtime_ns
    make_image(500).save("photos/later.png")
    main([*index, "--approximate"])
    assert clusters.stat().st_mtime_ns == before
    found, exact = search(), search("--exact")
    assert Path(found[0]["path"]).name == "later.png" and found[0] == exact[0]
    for number in range(200, 203):
        make_image(number).save(f"photos/{number}.png")
    main([*index, "--approximate"])
    (clusters,) = Path("photos/.blip2-index").glob("*.faiss")
    assert clusters.stat().st_mtime_ns > before
    assert search()[0] == exact[0]
