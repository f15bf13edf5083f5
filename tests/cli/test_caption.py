"""`blip2-hf caption` of picture files, and its options."""

import json
from pathlib import Path

import pytest
import torch
from picture_server import picture_server
from PIL import Image
from saved_models import save_captioner
from tiny import make_image, make_model, make_processor

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.captioning import caption_images
from blip2_hf.cli import main


TWO_BEAMS = {"num_beams": 2, "do_sample": True, "length_penalty": 1.0}


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_captioner(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for seed, name in enumerate(["a.png", "b.png", "sub/c.JPG"]):
        make_image(seed).save(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


@pytest.fixture
def run(model, capsys):
    """Run the command, and return the lines that it prints."""

    def run(*arguments, tokens=4):
        rest = ["--model", str(model), "--max-new-tokens", str(tokens), "--num-workers", "0", "--device", "cpu"]
        main(["caption", *map(str, arguments), *rest])
        return capsys.readouterr().out.splitlines()

    return run


def texts(model, pictures, **options) -> list[str]:
    parts = Blip2ForConditionalGeneration.from_pretrained(model), Blip2Processor.from_pretrained(model)
    found = caption_images(*parts, [str(picture) for picture in pictures], max_new_tokens=4, **options)
    return [" ".join(text.split()) for caption in found for text in caption.texts]


def test_the_caption_of_a_picture_is_printed_alone(photos, model, run, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert run("photos/a.png") == texts(model, ["photos/a.png"])
    assert sorted(tmp_path.rglob("*")) == before


def test_pictures_and_wildcards(photos, model, run):
    names = ["photos/a.png", "photos/b.png", "photos/sub/c.JPG"]
    expected = [f"{name}\t{text}" for name, text in zip(names, texts(model, names), strict=True)]
    assert run("photos/*.png", "photos/sub/c.JPG", "photos/a.png") == expected
    assert run("photos/**/*") == expected
    several = run("photos/a.png", "photos/b.png", "--captions-per-image", "2", "--num-beams", "2", "--suffix", "x")
    found = texts(model, names[:2], num_captions=2, num_beams=2, suffix="x")
    assert several == [
        f"{name}\t{text}" for name, text in zip([n for n in names[:2] for _ in "ab"], found, strict=True)
    ]


def test_a_url(photos, model, run):
    with picture_server() as server:
        (printed,) = run(f"{server.url}/picture.png")
        assert printed and server.connections == 1
        with pytest.raises(SystemExit, match="captions of URLs are printed. To write them, download"):
            run(f"{server.url}/picture.png", "--output", "captions.jsonl")


def test_a_broken_picture_among_others(photos, model, capsys):
    (photos / "b.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stopped:
        main(["caption", "photos/a.png", "photos/b.png", "--model", str(model), "--max-new-tokens", "4"])
    printed = capsys.readouterr()
    assert stopped.value.code == 1
    assert printed.out.splitlines() == [f"photos/a.png\t{texts(model, ['photos/a.png'])[0]}"]
    assert "('photos/b.png'): not an image" in printed.err and "Traceback" not in printed.err
    assert "Empty captions" not in printed.err


def test_empty_captions_are_counted(photos, tmp_path, capsys):
    """Those of a model that ends each text at once."""
    model = make_model("opt")
    head = model.language_model
    with torch.no_grad():
        head.model.decoder.final_layer_norm.bias.copy_(20 * head.get_input_embeddings().weight[2])
    model.save_pretrained(tmp_path / "silent")
    make_processor().save_pretrained(tmp_path / "silent")
    rest = ["--model", "silent", "--max-new-tokens", "4", "--num-workers", "0", "--device", "cpu"]
    main(["caption", "photos/a.png", "photos/b.png", *rest])
    printed = capsys.readouterr()
    assert printed.out == "photos/a.png\t\nphotos/b.png\t\n"
    assert 'Empty captions: 2. Another prompt may help, such as "a photo of" (--prompt).' in printed.err
    main(["caption", "photos", "--output", "captions.jsonl", *rest])
    assert "Captions written: 3. Empty captions: 3." in capsys.readouterr().err


def test_a_collection_of_broken_pictures(photos, model, run):
    for name in ("a.png", "b.png"):
        (photos / name).write_bytes(b"no picture")
    run("photos", "--output", "captions.jsonl")
    (photos / "sub" / "c.JPG").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stopped:
        run("photos", "--output", "broken.jsonl")
    assert stopped.value.code == 1 and len(read_lines("broken.jsonl.broken.jsonl")) == 3


def test_pictures_are_written_if_that_is_asked_for(photos, model, run):
    names = ["photos/a.png", "photos/sub/c.JPG"]
    expected = texts(model, names)
    assert run(*names, "--output", "captions.jsonl") == []
    rows = read_lines("captions.jsonl")
    assert [row["file"] for row in rows] == ["a.png", "sub/c.JPG"]
    assert [" ".join(row["caption"].split()) for row in rows] == expected
    run("photos/*.png", "--output", "photos/metadata.csv")
    assert (photos / "metadata.csv").read_text().startswith("file_name,caption\na.png,")
    run(*names, "--extension", "caption")
    found = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.caption"))
    assert found == ["a.caption", "sub/c.caption"]
    run("photos", "--existing", "prepend", "--prefix", "sks,", "--extension", ".caption")
    assert all((photos / name).read_text().startswith("sks, ") for name in (*found, "b.caption"))


def test_larger_pictures_are_broken(photos, run, recwarn):
    Image.new("RGB", (100, 100)).save(photos / "large.png")
    limit = Image.MAX_IMAGE_PIXELS
    for workers in ("0", "1"):
        run("photos", "--output", f"{workers}.jsonl", "--max-pixels", "9999", "--num-workers", workers)
        (broken,) = read_lines(f"{workers}.jsonl.broken.jsonl")
        assert broken["file"] == "large.png" and "100x100 pixels, the limit is 9999" in broken["reason"]
    run("photos", "--output", "few.jsonl", "--max-pixels", "2000")
    (broken,) = read_lines("few.jsonl.broken.jsonl")
    assert "(more than 2000 pixels)" in broken["reason"]
    run("photos", "--output", "all.jsonl", "--max-pixels", "10000")
    assert len(read_lines("all.jsonl")) == 4
    assert limit == Image.MAX_IMAGE_PIXELS
    assert not [each for each in recwarn if each.category is Image.DecompressionBombWarning]


@pytest.mark.parametrize(
    ("options", "generation"),
    [
        ([], {"num_beams": 5, "length_penalty": 1.0}),
        (["--top-p", "0.5"], {"num_beams": 1, "do_sample": True, "top_p": 0.5}),
        (["--temperature", "0.5", "--num-beams", "2"], {**TWO_BEAMS, "temperature": 0.5}),
        (["--generate", "top_k=3"], {"num_beams": 1, "do_sample": True, "top_k": 3}),
        (["--generate", "do_sample=false"], {"num_beams": 5, "length_penalty": 1.0}),
    ],
)
def test_sampling_beside_a_preset(photos, run, options, generation):
    run("photos/a.png", "--preset", "caption", "--output", "out.jsonl", *options)
    found = json.loads(Path("out.jsonl.settings.json").read_text())["generation"]
    names = {"num_beams", "do_sample", "top_p", "top_k", "temperature", "length_penalty"}
    assert {name: value for name, value in found.items() if name in names} == generation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos/a.png", "nosuch.png"], "no (picture|file) nosuch.png"),
        (["photos/a.png", "photos"], "photos is no picture.*one folder or dataset"),
        (["photos/a.png", "--existing", "append"], "printed without --output: leave out --existing"),
        (["photos/a.png", "--overwrite", "--split", "test"], "leave out --split and --overwrite"),
        (["photos", "--overwrite", "--existing", "append"], "--overwrite and --existing append"),
        (["photos", "--config", "english"], "photos is a folder of pictures: leave out --config"),
        (["photos", "--image-column", "x", "--allow-urls"], "leave out --image-column and --allow-urls"),
        (["photos", "--captions-per-image", "3"], "3 captions.*--num-beams 1 writes at most 1.*Give --num-beams 3"),
        (["photos", "--captions-per-image", "3", "--num-beams", "2", "--top-p", "0.9"], "at most 2"),
        (["photos", "--captions-per-image", "2", "--output", "x.csv"], "A cell of CSV has one caption"),
        (["photos", "--output", "elsewhere/metadata.jsonl"], "does not find the pictures"),
        (["photos/a.png", "--output", "a.txt"], "a.txt: a folder was expected.*Give a, or for one file"),
        (["photos", "--output", "a.cap", "--format", "txt", "--extension", "cap"], "a.cap: a folder was"),
        (["photos", "--output", "a.jsonl", "--extension", "cap"], "--extension .cap .* a.jsonl is one file"),
        (["photos", "--seed", "1"], "--seed 1: nothing is sampled"),
        (["photos", "--seed", "1", "--preset", "caption"], "--seed 1: nothing is sampled"),
        (["photos", "--generate", "prompt=x"], "no argument 'prompt' .*Give --prompt"),
        (["photos", "--generate", "num_beam=2"], "no argument 'num_beam' .*Did you mean num_beams"),
        (["photos", "--generate", "do_sample=yes"], "do_sample='yes' was given, true or false was expected"),
        (["photos", "--generate", "top_p=1.5"], "top_p=1.5 was given, a number above 0 and at most 1"),
        (["photos", "--generate", "num_beams=true"], "num_beams=True was given, a whole number of at least 1"),
        (["photos", "--generate", "output_scores=true"], "no argument 'output_scores'"),
        (["photos", "--generate", "cache_implementation=x"], "cache_implementation"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(photos, run, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr("blip2_hf.cli.caption.load_captioner", lambda *_: pytest.fail("the model was loaded"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"^blip2-hf: .*({message})") as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before] == []


def test_more_tokens_than_positions(photos, run, monkeypatch):
    assert run("photos/a.png", tokens=128 - 4)  # 4 queries and a first token; the last new one is not read
    with pytest.raises(SystemExit, match="the language model has 128 positions, and 15 are taken.*at most 114"):
        run("photos/a.png", "--prompt", "a photo of a dog", tokens=115)
    assert run("photos/a.png", "--prompt", "a photo of a dog", tokens=114)
    monkeypatch.setattr("blip2_hf.cli.caption.load_captioner", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit, match="128 positions, and 5 are taken"):
        run("photos/a.png", tokens=3000)
