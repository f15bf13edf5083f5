"""`blip2-hf caption`: the captions of the pipeline, whatever the collection, the format, and what interrupts it."""

import io
import json
import math
import os
import shutil
import tarfile
import threading

import datasets
import processes
import pyarrow.parquet as pq
import pytest
import torch
from saved_models import save_captioner
from scoring import scores_by_forward
from stage1 import make_stage1
from tiny import encode, make_image, make_image_processor, make_model, make_processor
from transformers import pipeline

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.captioning import (
    CollectionError,
    FolderPictures,
    RowPictures,
    TarPictures,
    caption_dataset,
    caption_images,
)
from blip2_hf.captioning.captions import CaptionWriter
from blip2_hf.cli import caption, main, make_parser
from blip2_hf.jobs.errors import StateFileError


NAMES = ["b.png", "a/x.jpg", "a/y.PNG", "c/z/w.webp", "b0.bmp", "d.gif"]
BROKEN = "a/z.jpg"
TOKENS = 5


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_captioner(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def parts(model_folder):
    return (
        Blip2ForConditionalGeneration.from_pretrained(model_folder),
        Blip2Processor.from_pretrained(model_folder),
    )


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures, one of which is broken."""
    folder = tmp_path / "photos"
    for seed, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(seed).save(folder / name)
    (folder / BROKEN).write_bytes(b"no picture")
    (folder / "notes.md").write_text("no picture either")
    return folder


def expected_captions(parts, images, **kwargs) -> list[str]:
    """What the pipeline says of each picture alone."""
    model, processor = parts
    captioner = pipeline("image-to-text", model=model, processor=processor, device="cpu")
    return [captioner(image, **{"max_new_tokens": TOKENS, **kwargs})[0]["generated_text"] for image in images]


def expected_records(parts, photos, **kwargs) -> list[dict]:
    names = sorted(NAMES)
    captions = expected_captions(parts, [str(photos / name) for name in names], **kwargs)
    return [{"file": name, "caption": text} for name, text in zip(names, captions, strict=True)]


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files_beside(path) -> set[str]:
    return {found.name.removeprefix(path.name) for found in path.parent.glob(f"{path.name}*")}


def run(*arguments):
    main(["caption", *map(str, arguments)])


def count_pictures(monkeypatch, limit: int = 10**9) -> list[int]:
    """How many pictures the model is given at a time; interrupts it once it has had `limit`."""
    seen, write = [], CaptionWriter._write

    def counted(self, pixel_values):
        if sum(seen) >= limit:
            raise KeyboardInterrupt
        seen.append(len(pixel_values))
        return write(self, pixel_values)

    monkeypatch.setattr(CaptionWriter, "_write", counted)
    return seen


@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_captions_are_those_of_the_pipeline(language_model):
    torch.manual_seed(0)
    parts = make_model(language_model), make_processor(is_encoder_decoder=language_model == "t5")
    images = [make_image(seed) for seed in range(5)]
    for prompt, beams in ((None, 1), ("a photo of", 3)):
        options = {"prompt": prompt, "num_beams": beams}
        expected = expected_captions(parts, images, **options)
        found = list(caption_images(*parts, images, max_new_tokens=TOKENS, batch_size=2, **options))
        assert [each.text for each in found] == expected
        assert [each.index for each in found] == list(range(5))
    assert len(set(expected)) > 2


@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_confidence_is_the_mean_probability_of_tokens_by_forward(language_model):
    torch.manual_seed(0)
    is_t5 = language_model == "t5"
    parts = make_model(language_model), make_processor(is_encoder_decoder=is_t5)
    images, prompt = [make_image(seed) for seed in range(3)], "a photo of"
    options = {"num_captions": 2, "num_beams": 2, "max_new_tokens": TOKENS, "prompt": prompt, "batch_size": 2}
    plain = list(caption_images(*parts, images, **options))
    found = list(caption_images(*parts, images, with_confidence=True, **options))
    assert [each.texts for each in found] == [each.texts for each in plain]
    assert all(each.confidences is None for each in plain)
    model, processor = parts
    for each in found:
        inputs = processor(images=images[each.index], text=prompt, return_tensors="pt")
        for text, confidence in zip(each.texts, each.confidences, strict=True):
            # Without the end if the caption was cut off
            tokens = processor(text=prompt, candidates=[text])["candidate_labels"][0][0][:TOKENS]
            own = [inputs["input_ids"][0].tolist()], [tokens]
            mean = scores_by_forward(model, inputs["pixel_values"], *own).item() / len(tokens)
            assert confidence == pytest.approx(math.exp(mean), rel=1e-4)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_confidence_in_files_and_on_the_screen(photos, parts, model_folder, tmp_path, monkeypatch, capsys, ending):
    names = sorted(NAMES)
    found = list(
        caption_images(*parts, [str(photos / name) for name in names], max_new_tokens=TOKENS, with_confidence=True)
    )
    output, options = (
        tmp_path / f"captions.{ending}",
        ["--model", model_folder, "--max-new-tokens", TOKENS, "--confidence"],
    )
    with monkeypatch.context() as patch:
        count_pictures(patch, limit=1)
        with pytest.raises(SystemExit):
            run(photos, "--output", output, "--batch-size", 1, *options)
    run(photos, "--output", output, *options)
    rows = datasets.load_dataset(
        "json" if ending == "jsonl" else ending,
        data_files=str(output),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert rows.column_names == ["file", "caption", "confidence"] and rows["file"] == names
    assert rows["confidence"] == pytest.approx([each.confidences[0] for each in found], rel=1e-4)
    with pytest.raises(SystemExit, match="was made otherwise"):
        run(photos, "--output", output, *options[:-1])
    capsys.readouterr()
    run(photos / names[0], *options)
    text = " ".join(found[0].text.split())
    assert capsys.readouterr().out == f"{text}\t{found[0].confidences[0]:.1%}\n"


def test_confidence_of_captions_that_were_cut_off(parts):
    """Such a caption has no end, and fits the positions of the language model as when it was written."""
    model, processor = parts
    options = {"with_confidence": True, "prompt": "a photo of"}
    (found,) = caption_images(*parts, [make_image(0)], max_new_tokens=110, min_new_tokens=110, **options)
    inputs = processor(images=make_image(0), text="a photo of", candidates=found.texts, return_tensors="pt")
    tokens = inputs["candidate_labels"][0, :, :110].tolist()
    mean = scores_by_forward(model, inputs["pixel_values"], inputs["input_ids"].tolist(), tokens).item()
    assert found.confidences == pytest.approx([math.exp(mean / len(tokens[0]))], rel=1e-4)


def test_a_confidence_that_has_no_place(photos, model_folder):
    options = ["--model", model_folder, "--confidence"]
    with pytest.raises(SystemExit, match="Text files, which are written without --output, have no place"):
        run(photos, *options)
    with pytest.raises(SystemExit, match="--existing append joins captions"):
        run(photos, *options, "--output", "captions.jsonl", "--existing", "append")


def test_an_empty_caption_has_no_confidence(parts, monkeypatch):
    monkeypatch.setattr(type(parts[1]), "post_process_image_text_to_text", lambda *args, **kwargs: ["", "a dog"])
    first, second = caption_images(*parts, [make_image(0), make_image(1)], with_confidence=True)
    assert first.confidences == [0.0] and 0 < second.confidences[0] < 1


def test_streams_workers_and_pictures_that_are_broken(parts):
    images = [make_image(0), b"no picture", make_image(1), "missing.jpg", make_image(2)]
    expected = expected_captions(parts, [images[0], images[2], images[4]])
    for given, workers in ((images, 0), (images, 2), (iter(images), 2)):
        found = list(caption_images(*parts, given, max_new_tokens=TOKENS, batch_size=2, num_workers=workers))
        assert [each.text for each in found if each.error is None] == expected
        assert [each.index for each in found if each.text is None] == [1, 3]
        assert found[1].error.startswith("image 2") and "10 bytes" in found[1].error
    with pytest.raises(TypeError, match="list of images"):
        next(caption_images(*parts, "cat.jpg"))
    with pytest.raises(ValueError, match="2 texts about 1 pictures"):
        next(caption_images(*parts, [make_image(0)], num_return_sequences=2, num_beams=2))


def test_the_next_pictures_are_decoded_while_the_model_writes(parts, monkeypatch):
    decoded, write = threading.Event(), CaptionWriter._write

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index == 3:
                decoded.set()
            return make_image(index)

    def waiting(self, pixel_values):
        assert decoded.wait(10)
        return write(self, pixel_values)

    monkeypatch.setattr(CaptionWriter, "_write", waiting)
    assert len(list(caption_images(*parts, Images(), max_new_tokens=1, batch_size=2))) == 4


def test_batches_that_do_not_fit_the_memory_are_halved(parts, monkeypatch):
    images = [make_image(seed) for seed in range(11)]
    expected = expected_captions(parts, images)
    sizes, write, most = [], CaptionWriter._write, 3

    def short_of_memory(self, pixel_values):
        sizes.append(len(pixel_values))
        if len(pixel_values) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return write(self, pixel_values)

    monkeypatch.setattr(CaptionWriter, "_write", short_of_memory)
    found = caption_images(*parts, images, max_new_tokens=TOKENS, batch_size=8)
    assert [each.text for each in found] == expected
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        list(caption_images(*parts, images[:4], batch_size=4))
    monkeypatch.setattr(CaptionWriter, "_write", lambda *_: (_ for _ in ()).throw(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        list(caption_images(*parts, images[:4], batch_size=4))


def test_the_formats_have_the_same_captions(photos, model_folder, parts, tmp_path):
    expected = expected_records(parts, photos, prompt="a photo of", num_beams=2)
    options = ["--model", model_folder, "--prompt", "a photo of", "--num-beams", "2", "--max-new-tokens", TOKENS]
    options += ["--num-workers", "0", "--device", "cpu"]
    lines, table = tmp_path / "out" / "captions.jsonl", tmp_path / "captions.parquet"
    run(photos, *options, "--output", lines)
    run(photos, *options, "--output", table, "--batch-size", "2")
    run(photos, *options, "--output", tmp_path / "texts")
    run(photos, *options)
    assert read_lines(lines) == pq.read_table(table).to_pylist() == expected
    for record in expected:
        sidecar = os.path.splitext(record["file"])[0] + ".txt"
        for folder in (photos, tmp_path / "texts"):
            assert (folder / sidecar).read_text() == record["caption"] + "\n"
    assert len(list((tmp_path / "texts").rglob("*.txt"))) == len(NAMES)
    for base in (lines, table, photos / "captions", tmp_path / "texts" / "captions"):
        assert files_beside(base) - {""} == {".settings.json", ".broken.jsonl"}
        (broken,) = read_lines(base.with_name(f"{base.name}.broken.jsonl"))
        assert broken["file"] == BROKEN and "not an image" in broken["reason"]


def test_tar_files(parts, tmp_path):
    for shard in range(2):
        (tmp_path / "shards").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "shards" / f"{shard}.tar", "w") as archive:
            for sample in range(3):
                for ending, data in {"json": b"{}", "png": encode(make_image(shard * 3 + sample))}.items():
                    member = tarfile.TarInfo(f"x/{sample}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    paths = sorted((tmp_path / "shards").glob("*.tar"))
    output = tmp_path / "captions.jsonl"
    caption_dataset(*parts, TarPictures(paths), output, max_new_tokens=TOKENS)
    expected = expected_captions(parts, [make_image(seed) for seed in range(6)])
    found = read_lines(output)
    assert [record["caption"] for record in found] == expected
    assert [(r["shard"], r["key"]) for r in found] == [(f"{i}.tar", f"x/{j}") for i in range(2) for j in range(3)]
    assert len(TarPictures(paths, "PNG")) == 6 and len(TarPictures(paths, "jpg")) == 0

    data = paths[1].read_bytes()
    paths[1].write_bytes(data[: len(data) // 2])
    cut = TarPictures(paths)
    assert 3 < len(cut) < 6
    assert cut[3].size == make_image(3).size
    paths[1].write_bytes(b"no tar file")
    with pytest.raises(CollectionError, match="not compressed"):
        TarPictures(paths)


def test_a_picture_that_stands_twice(tmp_path):
    """Not one after the other: the captions of both would have one name."""
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in ("0.jpg", "1.jpg", "0.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(CollectionError, match="0.tar has the file '0.jpg' twice"):
        TarPictures([tmp_path / "0.tar"])


def test_a_sample_with_several_pictures(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for ending in ("jpg", "mask.png"):
            archive.addfile(tarfile.TarInfo(f"0.{ending}"))
    with pytest.raises(CollectionError, match="'0' has several pictures, 'jpg' and 'mask.png'"):
        TarPictures([tmp_path / "0.tar"])
    assert TarPictures([tmp_path / "0.tar"], "mask.png").identity(0) == {"shard": "0.tar", "key": "0"}


def test_rows(parts, model_folder, tmp_path):
    pictures = [{"bytes": encode(make_image(seed)), "path": None} for seed in range(4)]
    pictures[2]["bytes"] = b"no picture"
    features = datasets.Features({"photo": datasets.Image(), "n": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"photo": pictures, "n": list(range(4))}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    output = tmp_path / "captions.parquet"
    run(tmp_path / "rows.parquet", "--model", model_folder, "--output", output, "--max-new-tokens", TOKENS)
    table = pq.read_table(output)
    assert table["row"].to_pylist() == [0, 1, 3]
    assert table["caption"].to_pylist() == expected_captions(parts, [make_image(seed) for seed in (0, 1, 3)])
    assert read_lines(tmp_path / "captions.parquet.broken.jsonl")[0]["row"] == 2

    changed = rows.select([1, 0, 2, 3])
    with pytest.raises(CollectionError, match="made otherwise.*pictures"):
        caption_dataset(*parts, changed, output, max_new_tokens=TOKENS)
    with pytest.raises(CollectionError, match="no column 'image'.*--image-column"):
        RowPictures(rows.remove_columns("photo"))
    with pytest.raises(CollectionError, match="one split"):
        RowPictures(datasets.DatasetDict(train=rows))


@pytest.mark.parametrize("ending", ["jsonl", "parquet", None])
def test_work_that_is_interrupted_goes_on(photos, parts, model_folder, tmp_path, monkeypatch, ending, capsys):
    options = {"max_new_tokens": TOKENS, "batch_size": 2}
    whole, output = (tmp_path / name if ending is None else tmp_path / f"{name}.{ending}" for name in ("whole", "out"))
    counts = caption_dataset(*parts, photos, whole, **options)
    assert (counts.pictures, counts.done_before, counts.captioned, counts.broken) == (7, 0, 6, 1)

    with monkeypatch.context() as patch:
        count_pictures(patch, limit=3)
        arguments = ["--output", output, "--max-new-tokens", TOKENS, "--batch-size", "2", "--num-workers", "0"]
        with pytest.raises(SystemExit) as stopped:
            run(photos, "--model", model_folder, *arguments)
        assert stopped.value.code == 130
        assert "same command goes on" in capsys.readouterr().out
    assert ending is None or not output.exists()
    (part,) = (output / "captions" if ending is None else output).parent.glob("*.part-*")
    if ending is not None:
        # A process that is killed may have written half a line
        part.write_bytes(part.read_bytes() + b'{"file": "b.png", "capt')
    seen = count_pictures(monkeypatch)
    counts = caption_dataset(*parts, photos, output, **options)
    assert counts.captioned == sum(seen) == 3
    assert contents(output) == contents(whole)
    assert caption_dataset(*parts, photos, output, **options).captioned == 0
    assert contents(output) == contents(whole)


def contents(output) -> dict[str, bytes]:
    if not output.is_dir():
        return {ending: output.with_name(output.name + ending).read_bytes() for ending in files_beside(output)}
    return {path.name: path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_a_run_that_is_killed_while_it_joins_its_parts(photos, parts, tmp_path, monkeypatch):
    output = tmp_path / "captions.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            caption_dataset(*parts, photos, output, max_new_tokens=TOKENS)
    assert files_beside(output) == {"", ".part-00000.jsonl", ".settings.json", ".broken.jsonl"}
    counts = caption_dataset(*parts, photos, output, max_new_tokens=TOKENS)
    assert counts.captioned == 0
    assert files_beside(output) == {"", ".settings.json", ".broken.jsonl"}
    assert read_lines(output) == expected_records(parts, photos)
    assert len(read_lines(tmp_path / "captions.jsonl.broken.jsonl")) == 1


def test_pictures_that_are_new_or_mended_join_in(photos, parts, tmp_path, monkeypatch):
    output = tmp_path / "captions.jsonl"
    caption_dataset(*parts, photos, output, max_new_tokens=TOKENS)
    make_image(20).save(photos / BROKEN)
    make_image(21).save(photos / "0.png")
    (photos / "b.png").unlink()
    seen = count_pictures(monkeypatch)
    counts = caption_dataset(*parts, photos, output, max_new_tokens=TOKENS)
    assert counts.captioned == sum(seen) == 2 and counts.broken == 0
    # What is gone stays behind what it stood behind
    names = sorted({"0.png", BROKEN, *NAMES} - {"b.png"})
    assert [record["file"] for record in read_lines(output)] == [*names[:3], "b.png", *names[3:]]
    assert not (tmp_path / "captions.jsonl.broken.jsonl").exists()


def test_other_settings_are_refused(photos, parts, tmp_path):
    output = tmp_path / "captions.jsonl"
    caption_dataset(*parts, photos, output, max_new_tokens=TOKENS)
    before = output.read_bytes()
    with pytest.raises(CollectionError, match="prompt: None there, 'a' now.*--overwrite"):
        caption_dataset(*parts, photos, output, prompt="a", max_new_tokens=TOKENS)
    torch.manual_seed(1)
    with pytest.raises(CollectionError, match="weights"):
        caption_dataset(make_model(), parts[1], photos, output, max_new_tokens=TOKENS)
    assert output.read_bytes() == before
    caption_dataset(*parts, photos, output, prompt="a", max_new_tokens=TOKENS, overwrite=True)
    assert read_lines(output) == expected_records(parts, photos, prompt="a")

    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("{}\n")
    with pytest.raises(CollectionError, match="without foreign.jsonl.settings.json"):
        caption_dataset(*parts, photos, foreign)
    assert foreign.read_text() == "{}\n"


def test_parts_of_a_run_whose_settings_are_gone_are_not_taken(photos, parts, tmp_path):
    output = tmp_path / "captions.jsonl"
    caption_dataset(*parts, photos, output, max_new_tokens=TOKENS)
    output.rename(tmp_path / "captions.jsonl.part-00000.jsonl")
    (tmp_path / "captions.jsonl.settings.json").unlink()
    with pytest.raises(CollectionError, match="without captions.jsonl.settings.json.*--overwrite"):
        caption_dataset(*parts, photos, output, max_new_tokens=TOKENS + 1)


def test_a_batch_of_nothing_is_refused(photos, parts, tmp_path):
    with pytest.raises(ValueError, match="batch_size=0: at least 1 was expected"):
        caption_dataset(*parts, photos, tmp_path / "captions.jsonl", batch_size=0)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_files_that_can_not_be_read(photos, parts, tmp_path, ending):
    output = tmp_path / f"captions.{ending}"
    caption_dataset(*parts, photos, output, max_new_tokens=TOKENS)
    settings = tmp_path / f"{output.name}.settings.json"
    content = settings.read_bytes()
    for broken, advice in ((settings, "what made .*captions.*--overwrite"), (output, "captioned again")):
        broken.write_bytes(b'{"file": \n')
        with pytest.raises(StateFileError, match=f"{broken.name}.* can't be read.*{advice}"):
            caption_dataset(*parts, photos, output, max_new_tokens=TOKENS)
        settings.write_bytes(content)
    if ending == "jsonl":
        output.write_text('{"name": "b.png"}\n')
        with pytest.raises(StateFileError, match="line 1: an object of JSON with file was expected.*the file or"):
            caption_dataset(*parts, photos, output, max_new_tokens=TOKENS)
    output.unlink()
    assert caption_dataset(*parts, photos, output, max_new_tokens=TOKENS).captioned == len(NAMES)


def test_a_folder_that_is_deleted_meanwhile_is_no_success(photos, model_folder, tmp_path, monkeypatch, capsys):
    output, write = tmp_path / "out" / "captions.jsonl", CaptionWriter._write

    def delete(self, pixel_values):
        shutil.rmtree(output.parent)
        return write(self, pixel_values)

    options = ["--model", model_folder, "--output", output, "--max-new-tokens", TOKENS, "--num-workers", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(CaptionWriter, "_write", delete)
        with pytest.raises(SystemExit, match="captions.jsonl was deleted.*7 of 7 pictures.*same command again"):
            run(photos, *options)
    assert "Captions written" not in capsys.readouterr().err
    run(photos, *options)
    assert len(read_lines(output)) == len(NAMES)


def test_texts_that_people_wrote_are_kept(photos, parts):
    (photos / "b.txt").write_text("my own caption")
    counts = caption_dataset(*parts, photos, max_new_tokens=TOKENS)
    assert (counts.done_before, counts.captioned) == (1, 5)
    assert (photos / "b.txt").read_text() == "my own caption"
    caption_dataset(*parts, photos, max_new_tokens=TOKENS, overwrite=True)
    assert (photos / "b.txt").read_text() != "my own caption"


def test_what_does_not_fit(photos, parts, model_folder, tmp_path):
    with pytest.raises(CollectionError, match="ending does not tell"):
        caption_dataset(*parts, photos, tmp_path / "captions.xml")
    with pytest.raises(CollectionError, match="needs the name of a file"):
        caption_dataset(*parts, photos, output_format="jsonl")
    with pytest.raises(CollectionError, match="folder of pictures"):
        caption_dataset(*parts, datasets.Dataset.from_dict({"image": ["x.png"]}), tmp_path / "texts")
    with pytest.raises(CollectionError, match="no pictures in"):
        caption_dataset(*parts, model_folder, tmp_path / "captions.jsonl")
    make_image(0).save(photos / "b.jpeg")
    with pytest.raises(CollectionError, match="b.jpeg and b.png would both"):
        caption_dataset(*parts, photos)
    with pytest.raises(SystemExit, match="no file is called"):
        run(tmp_path / "*.tar", "--model", model_folder)
    assert not list(photos.rglob("*.txt"))


def test_two_processes_are_one(photos, parts, model_folder, tmp_path):
    output = tmp_path / "captions.jsonl"
    command = ["caption", str(photos), "--model", str(model_folder), "--output", str(output), "--num-workers", "0"]
    command += ["--max-new-tokens", str(TOKENS)]
    errors = [printed.stderr for printed in processes.run(main, command, folder=tmp_path, processes=2)]
    assert "7 to caption in 2 processes" in errors[0] and "Captions written: 6." in errors[0]
    assert "to caption" not in errors[1]
    assert read_lines(output) == expected_records(parts, photos)
    assert files_beside(output) == {"", ".settings.json", ".broken.jsonl"}
    assert len(FolderPictures(photos)) == 7


def test_a_preset_and_what_is_said_besides(photos, model_folder, parts, tmp_path):
    settings = {}
    for name, options in {"preset": [], "both": ["--num-beams", "2", "--prompt", "a"]}.items():
        output = tmp_path / f"{name}.jsonl"
        options = ["--preset", "caption", "--max-new-tokens", TOKENS, *options]
        run(photos, "--model", model_folder, "--output", output, "--num-workers", "0", *options)
        settings[name] = json.loads((tmp_path / f"{name}.jsonl.settings.json").read_text())
    assert settings["preset"]["prompt"] == "a photo of"
    assert settings["preset"]["generation"]["num_beams"] == 5
    assert settings["both"]["prompt"] == "a"
    assert settings["both"]["generation"]["num_beams"] == 2


def test_a_preset_under_fewer_tokens_than_it_asks_for(photos, model_folder, tmp_path):
    kept = {}
    for tokens, options in {4: ["--max-new-tokens", "4"], 30: [], 5: ["--generate", "max_new_tokens=5"]}.items():
        output = tmp_path / f"{tokens}.jsonl"
        options = ["--preset", "caption", "--num-beams", "2", *options]
        run(photos, "--model", model_folder, "--output", output, "--num-workers", "0", *options)
        generation = json.loads((tmp_path / f"{tokens}.jsonl.settings.json").read_text())["generation"]
        assert generation["max_new_tokens"] == tokens
        kept[tokens] = generation["min_new_tokens"]
    assert kept == {4: 4, 5: 5, 30: 7}


def test_arguments_of_generate_and_the_size_of_pictures(photos, model_folder, parts, tmp_path, capsys):
    options = ["--model", model_folder, "--num-workers", "0", "--max-new-tokens", TOKENS]
    penalties = ["--generate", "repetition_penalty=1.5", "num_beams=2"]
    output = tmp_path / "other.jsonl"
    run(photos, *options, "--output", output, "--image-size", "42", *penalties)
    model, processor = parts[0], make_processor()
    processor.image_processor = make_image_processor(42)
    expected = expected_records((model, processor), photos, repetition_penalty=1.5, num_beams=2)
    assert read_lines(output) == expected != expected_records(parts, photos, repetition_penalty=1.5, num_beams=2)
    with pytest.raises(SystemExit, match="made otherwise.*image_processor"):
        run(photos, *options, "--output", output, *penalties)
    assert "The paper's have" not in capsys.readouterr().err
    run(photos, *options, "--output", tmp_path / "paper.jsonl", "--preset", "caption")
    assert "The paper's have 364 px: --image-size 364" in capsys.readouterr().err


def test_what_people_mistake(photos, model_folder, tmp_path):
    with pytest.raises(SystemExit, match="blip2-hf: .*nosuch"):
        run(photos, "--model", tmp_path / "nosuch", "--output", tmp_path / "captions.jsonl")
    with pytest.raises(SystemExit, match="blip2-hf: .*nosuch"):
        run(tmp_path / "nosuch", "--model", model_folder, "--output", tmp_path / "captions.jsonl")
    make_stage1().save_pretrained(tmp_path / "stage1")
    make_processor().save_pretrained(tmp_path / "stage1")
    with pytest.raises(SystemExit, match="blip2-hf: .*stage1 is a model of stage 1 .*has no language model"):
        run(photos, "--model", tmp_path / "stage1", "--output", tmp_path / "captions.jsonl")
    model = make_model()
    weights = {name: x for name, x in model.state_dict().items() if not name.startswith("language_projection")}
    model.save_pretrained(tmp_path / "half", state_dict=weights)
    make_processor().save_pretrained(tmp_path / "half")
    with pytest.raises(SystemExit, match="half lacks 2 weights .*language_projection.*A model that writes text"):
        run(photos, "--model", tmp_path / "half", "--output", tmp_path / "captions.jsonl")
    assert not files_beside(tmp_path / "captions.jsonl")


@pytest.mark.parametrize("name", ["captions.jsonl", "texts"])
def test_a_mistake_in_the_arguments_binds_no_later_run(photos, model_folder, parts, tmp_path, name):
    options = ["--model", model_folder, "--output", tmp_path / name, "--max-new-tokens", TOKENS, "--num-workers", "0"]
    with pytest.raises(SystemExit, match="blip2-hf: .*num_beam'"):
        run(photos, *options, "--generate", "num_beam=2")
    run(photos, *options, "--generate", "num_beams=2")
    expected = expected_records(parts, photos, num_beams=2)
    if name == "texts":
        found = {path.relative_to(tmp_path / name).as_posix() for path in (tmp_path / name).rglob("*.txt")}
        assert found == {os.path.splitext(record["file"])[0] + ".txt" for record in expected}
    else:
        assert read_lines(tmp_path / name) == expected
    with pytest.raises(SystemExit, match="made otherwise"):
        run(photos, *options, "--generate", "num_beams=3")


def test_what_is_opened(photos, model_folder, tmp_path):
    def opened(data, *arguments):
        options = make_parser().parse_args(["caption", str(data), "--model", "x", *arguments])
        return caption._open_pictures(options)

    rows = datasets.Dataset.from_list([{"image": make_image(seed)} for seed in range(3)])
    rows.save_to_disk(tmp_path / "saved")
    for number in range(2):
        rows.to_parquet(tmp_path / f"rows-{number}.parquet")
    (tmp_path / "shards" / "more").mkdir(parents=True)
    for folder in ("shards", "shards/more"):
        with tarfile.open(tmp_path / folder / "0.tar", "w") as archive:
            archive.addfile(tarfile.TarInfo("0.jpg"))
    assert len(opened(photos)) == 7
    assert len(opened(tmp_path / "saved")) == 3
    assert len(opened(tmp_path / "rows-0.parquet", "--split", "train[:2]")) == 2
    assert len(opened(tmp_path / "rows-*.parquet")) == 6
    assert len(opened(tmp_path / "shards" / "*.tar")) == 1
    tars = opened(tmp_path / "shards")
    assert [tars.identity(i)["shard"] for i in range(2)] == ["0.tar", "more/0.tar"]
