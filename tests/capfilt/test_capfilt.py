"""CapFilt: the best of all captions by each pair alone, whatever interrupts the job and however many share it."""

import json

import datasets
import processes
import pytest
import torch
import transformers
from saved_models import save_captioner, save_stage1
from tiny import VOCAB_SIZE, encode, make_image, make_image_processor, make_tokenizer
from transformers import pipeline

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2Processor
from blip2_hf.capfilt import (
    ModelCaptioner,
    PipelineCaptioner,
    RetrievalFilter,
    capfilt_dataset,
    kept_captions,
    propose_captions,
    rank_captions,
)
from blip2_hf.cli import main
from blip2_hf.data import ImageTextPairs, cache_features, clean_caption, load_cached_features, load_rows
from blip2_hf.search import load_retrieval_model


WORDS = ["a red dog", "two people", "the bus near a street", "a woman", "clouds and grass", "a bike", "an umbrella"]


@pytest.fixture(scope="module")
def stage1_folder(tmp_path_factory):
    return save_stage1(tmp_path_factory.mktemp("stage1"))


@pytest.fixture(scope="module")
def captioner_folder(tmp_path_factory):
    return save_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def retriever(stage1_folder):
    return load_retrieval_model(stage1_folder, "cpu")


@pytest.fixture(scope="module")
def captioner(captioner_folder):
    model = Blip2ForConditionalGeneration.from_pretrained(captioner_folder)
    processor = Blip2Processor.from_pretrained(captioner_folder)
    return ModelCaptioner(model, processor, num_captions=3, prompt="a photo of", max_new_tokens=6)


@pytest.fixture(scope="module")
def rows():
    """Seven rows, of one and of several captions, with a picture that is broken and captions that are none."""
    captions = [["a red dog"], ["two people", "A red dog!"], ["a bike"], ["..."], ["a woman"], None, ["clouds", ""]]
    pictures = [{"bytes": encode(make_image(seed)), "path": None} for seed in range(7)]
    pictures[2] = {"bytes": b"no picture", "path": "broken.jpg"}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.List(datasets.Value("string")),
            "source": datasets.Value("string"),
        }
    )
    return datasets.Dataset.from_dict(
        {"image": pictures, "caption": captions, "source": [f"page {i}" for i in range(7)]}, features=features
    )


def draw_words(pictures) -> list[list[str]]:
    """A captioner of one's own, which draws with PyTorch, writes nothing twice over, and sometimes nothing."""
    return [
        [*(WORDS[i] for i in torch.randint(len(WORDS), (4,))), "", "A  RED dog.", f"{picture.size[0]} clouds"]
        for picture in pictures
    ]


def count_letters(pictures, captions) -> list[list[float]]:
    return [[float(len(text)) for text in texts] for texts in captions]


@torch.no_grad()
def score_of_pair(retriever, image, text: str, score: str) -> float:
    model, processor = retriever
    pixel_values = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    tokens = processor.tokenizer([text], return_tensors="pt")
    inputs = pixel_values, tokens.input_ids, tokens.attention_mask
    itm = model(*inputs, use_image_text_matching_head=True).logits_per_image[0, 1].item()
    itc = model(*inputs).logits_per_image[0, 0].item()
    return {"itm": itm, "itc": itc, "sum": itm + itc}[score]


def run(*arguments):
    main(["capfilt", *map(str, arguments)])


def shards(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "data").iterdir()}


@pytest.mark.parametrize("score", ["sum", "itm", "itc"])
def test_the_best_by_each_pair_alone_are_kept(rows, retriever, tmp_path, score):
    caption_filter = RetrievalFilter(*retriever, score=score, batch_size=5)
    arguments = {"keep": 2, "batch_size": 3, "rows_per_shard": 4, "seed": 3}
    counts = capfilt_dataset(rows, draw_words, caption_filter, tmp_path / "out", **arguments)
    found = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert found["capfilt_row"] == [0, 1, 3, 4, 5, 6]
    assert found.column_names == [*rows.column_names, "kept_captions", "candidates", "capfilt_row"]
    originals = originals_kept = proposals = 0
    for row in found:
        given = rows[row["capfilt_row"]]
        assert row["image"].tobytes() == given["image"].tobytes()
        assert (row["caption"], row["source"]) == (given["caption"], given["source"])
        own = {clean_caption(text) for text in given["caption"] or [] if clean_caption(text)}
        texts = [clean_caption(candidate["text"]) for candidate in row["candidates"]]
        assert len(set(texts)) == len(texts) and own <= set(texts) and "" not in texts and "a red dog" in texts
        assert {clean_caption(c["text"]) for c in row["candidates"] if c["is_original"]} == own
        alone = {text: score_of_pair(retriever, row["image"], text, score) for text in texts}
        assert [c["score"] for c in row["candidates"]] == pytest.approx([alone[text] for text in texts], abs=2e-5)
        best = sorted(texts, key=lambda text: -alone[text])
        assert texts == best and [clean_caption(text) for text in row["kept_captions"]] == best[:2]
        originals += len(own)
        originals_kept += len(own & set(best[:2]))
        proposals += len(set(texts) - own)
    assert (counts.rows, counts.left_out, counts.originals_empty) == (7, 1, 3)
    assert (counts.originals, counts.originals_kept, counts.proposals) == (originals, originals_kept, proposals)
    assert 0 < originals_kept < originals and counts.proposals_kept == 12 - originals_kept


def test_a_picture_is_read_once_for_all_its_captions(rows, retriever, monkeypatch):
    model, _ = retriever
    seen = {"get_image_embeds": 0, "get_image_key_values": 0}
    for name in seen:
        method = getattr(model, name)

        def count(images, *args, name=name, method=method, **kwargs):
            seen[name] += len(images)
            return method(images, *args, **kwargs)

        monkeypatch.setattr(model, name, count)
    scores = RetrievalFilter(*retriever, batch_size=4)([make_image(0), make_image(1)], [WORDS, WORDS[:3]])
    assert [len(row) for row in scores] == [7, 3]
    # Keys and values once for contrast, and once for matching with all captions
    assert seen == {"get_image_embeds": 2, "get_image_key_values": 4}


def test_what_is_stopped_goes_on_as_if_it_had_not_been(rows, captioner, retriever, tmp_path):
    caption_filter = RetrievalFilter(*retriever)
    arguments = {"batch_size": 2, "rows_per_shard": 2}
    whole = capfilt_dataset(rows, captioner, caption_filter, tmp_path / "whole", **arguments)
    assert sorted(shards(tmp_path / "whole")) == [f"train-{shard:05d}-of-00004.parquet" for shard in range(4)]
    calls = []

    def interrupted(pictures, captions):
        calls.append(len(pictures))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return caption_filter(pictures, captions)

    stopped = RetrievalFilter(*retriever)
    stopped.__class__ = type("Interrupted", (RetrievalFilter,), {"__call__": lambda self, *given: interrupted(*given)})
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        capfilt_dataset(rows, captioner, stopped, tmp_path / "parts", **arguments)
    assert not (tmp_path / "parts" / "data").exists()  # half a data set does not load
    assert len(list((tmp_path / "parts" / ".unfinished").glob("*.parquet"))) == 2
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert capfilt_dataset(rows, captioner, stopped, tmp_path / "parts", **arguments) == whole
    assert torch.equal(torch.get_rng_state(), before)
    assert calls == [2, 1, 2, 2, 1]  # the third again, and the fourth
    assert shards(tmp_path / "parts") == shards(tmp_path / "whole")
    assert capfilt_dataset(rows, captioner, stopped, tmp_path / "parts", **arguments) == whole
    assert len(calls) == 5
    other = capfilt_dataset(rows, captioner, caption_filter, tmp_path / "other", **arguments, seed=1)
    assert shards(tmp_path / "other") != shards(tmp_path / "whole") and other.rows == whole.rows


def test_two_processes_are_one(rows, stage1_folder, captioner_folder, tmp_path):
    rows.to_parquet(tmp_path / "rows.parquet")
    options = ["--captioner", captioner_folder, "--filter", stage1_folder, "--num-captions", "3"]
    options += ["--max-new-tokens", "6", "--rows-per-shard", "2", "--num-workers", "0"]
    command = ["capfilt", str(tmp_path / "rows.parquet"), *map(str, options), "--output", str(tmp_path / "two")]
    errors = [printed.stderr for printed in processes.run(main, command, folder=tmp_path, processes=2)]
    assert "7 rows, files to write: 4 of 4 in 2 processes" in errors[0]
    assert "Original captions:" in errors[0] and "Original captions:" not in errors[1]
    run(tmp_path / "rows.parquet", *options, "--output", tmp_path / "one")
    assert shards(tmp_path / "two") == shards(tmp_path / "one")
    assert (tmp_path / "two" / "left_out.jsonl").read_text() == (tmp_path / "one" / "left_out.jsonl").read_text()


def test_the_command_and_what_it_says(rows, stage1_folder, captioner_folder, retriever, tmp_path, capsys):
    rows.to_parquet(tmp_path / "rows.parquet")
    options = ["--filter", stage1_folder, "--output", tmp_path / "out", "--device", "cpu", "--num-workers", "0"]
    options += ["--max-new-tokens", "5", "--keep", "1", "--score", "itm", "--num-captions", "2"]
    run(
        tmp_path / "rows.parquet",
        *options,
        "--captioner",
        captioner_folder,
        "--generate",
        "do_sample=false",
        "num_beams=2",
    )
    said = capsys.readouterr().err
    assert (
        "6 of 7 rows are in the result" in said
        and "Left out: 1 bad row: 1 picture unreadable." in said
        and "3 empty." in said
    )
    left_out = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert [(row["row"], row["kind"]) for row in left_out] == [(2, "picture unreadable")]
    settings = json.loads((tmp_path / "out" / "capfilt.json").read_text())
    assert settings["captioner"]["generation"]["num_beams"] == 2 and "top_p" not in settings["captioner"]["generation"]
    found = load_rows(tmp_path / "out")
    model, processor = (c.from_pretrained(captioner_folder) for c in (Blip2ForConditionalGeneration, Blip2Processor))
    for row in found:
        inputs = processor(images=[row["image"]], text="", return_tensors="pt")
        beams = model.generate(**inputs, num_beams=2, num_return_sequences=2, do_sample=False, max_new_tokens=5)
        texts = {clean_caption(t) for t in processor.post_process_image_text_to_text(beams, inputs["input_ids"])}
        assert texts - {""} <= {clean_caption(candidate["text"]) for candidate in row["candidates"]}
        assert row["kept_captions"] == [row["candidates"][0]["text"]]
    with pytest.raises(SystemExit, match="made otherwise.*captioner"):
        run(tmp_path / "rows.parquet", *options, "--captioner", captioner_folder)
    with pytest.raises(SystemExit, match="give --captioner, or --num-captions 0"):
        run(tmp_path / "rows.parquet", *options)
    with pytest.raises(SystemExit, match="blip2-hf: .*nosuch"):
        run(tmp_path / "rows.parquet", *options, "--captioner", tmp_path / "nosuch")
    retriever[0].save_pretrained(tmp_path / "retriever")
    with pytest.raises(SystemExit, match="retriever is a model for retrieval .*writes no text"):
        run(tmp_path / "rows.parquet", *options, "--captioner", tmp_path / "retriever")
    with pytest.raises(SystemExit, match="no column 'title'"):
        run(tmp_path / "rows.parquet", *options, "--captioner", captioner_folder, "--text-column", "title")
    run(tmp_path / "rows.parquet", *options, "--captioner", stage1_folder, "--overwrite")
    assert load_rows(tmp_path / "out")["capfilt_row"] == [0, 1, 3, 4, 5, 6]
    with pytest.raises(SystemExit, match="has not learned to match images with texts"):
        run(tmp_path / "rows.parquet", "--captioner", captioner_folder, "--filter", captioner_folder, "--output", "x")


def test_the_filter_alone_and_a_lowest_score(rows, stage1_folder, retriever, tmp_path, capsys):
    rows.to_parquet(tmp_path / "rows.parquet")
    options = ["--filter", stage1_folder, "--num-captions", "0", "--num-workers", "0", "--score", "itc"]
    run(tmp_path / "rows.parquet", *options, "--output", tmp_path / "all")
    found = load_rows(tmp_path / "all")
    assert found["capfilt_row"] == [0, 1, 4, 6]
    assert all(candidate["is_original"] for row in found["candidates"] for candidate in row)
    scores = [row["candidates"][0]["score"] for row in found]
    for row, score in zip(found, scores, strict=True):
        best = max(score_of_pair(retriever, row["image"], clean_caption(t), "itc") for t in row["caption"] if t)
        assert score == pytest.approx(best, abs=2e-5)
    bound = sorted(scores)[1]
    run(tmp_path / "rows.parquet", *options, "--output", tmp_path / "some", "--min-score", bound - 1e-6)
    found = load_rows(tmp_path / "some")
    assert [row["candidates"][0]["score"] for row in found] == [score for score in scores if score >= bound]
    assert all(c["score"] >= bound for r in found for c in r["candidates"] if c["text"] in r["kept_captions"])
    left_out = [json.loads(line) for line in (tmp_path / "some" / "left_out.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in left_out if row["row"] in (2, 3, 5)] == [
        "picture unreadable",
        "text empty",
        "text missing",
    ]
    assert sum(row["kind"] == "no caption kept" for row in left_out) == 1
    assert "has no caption of the score" in capsys.readouterr().err


def test_one_of_the_kept_is_drawn_each_epoch(rows, tmp_path):
    capfilt_dataset(rows, draw_words, count_letters, tmp_path / "out", keep=2)
    found = load_rows(tmp_path / "out")
    pairs = ImageTextPairs(found, text_column="kept_captions")
    drawn = [set() for _ in found]
    for epoch in range(20):
        pairs.set_epoch(epoch)
        for index, texts in enumerate(drawn):
            texts.add(pairs[index]["text"])
    assert drawn == [{clean_caption(text) for text in kept} for kept in found["kept_captions"]]
    assert all(len(texts) == 2 for texts in drawn)


def test_features_in_place_of_pictures(rows, captioner, stage1_folder, retriever, tmp_path):
    readable = rows.select([0, 1, 4])
    assert readable.column_names[0] == "image"
    # A captioner and a filter that share their tower, as they must to read the same features
    stage1, processor = Blip2ForPreTraining.from_pretrained(stage1_folder), retriever[1]
    own = ModelCaptioner(stage1, processor, num_captions=3, prompt="a photo", max_new_tokens=5)
    cache_features(readable, stage1, processor, tmp_path / "features", dtype="float32", rows_per_shard=2)
    cached = load_cached_features(tmp_path / "features")
    caption_filter = RetrievalFilter(*retriever)
    capfilt_dataset(readable, own, caption_filter, tmp_path / "pictures")
    capfilt_dataset(cached, own, caption_filter, tmp_path / "out")
    by_pictures, by_features = load_rows(tmp_path / "pictures"), load_rows(tmp_path / "out")
    assert by_features["kept_captions"] == by_pictures["kept_captions"]
    assert all(len(row) > 1 for row in by_features["candidates"])
    pairs = ImageTextPairs(by_features, text_column="kept_captions", train=False)
    assert torch.equal(pairs[1]["image_embeds"], ImageTextPairs(cached, train=False)[1]["image_embeds"])
    pipe = pipeline("image-to-text", model=captioner.model, processor=captioner.processor, device="cpu")
    with pytest.raises(ValueError, match="features in place of pictures"):
        capfilt_dataset(cached, PipelineCaptioner(pipe), caption_filter, tmp_path / "pipe")
    cache_features(readable, stage1, processor, tmp_path / "half")  # bfloat16, read by models in float32
    assert (
        capfilt_dataset(load_cached_features(tmp_path / "half"), own, caption_filter, tmp_path / "out16").left_out == 0
    )


def test_captioners_write_what_generate_writes(captioner, stage1_folder):
    images = [make_image(seed) for seed in range(2)]
    greedy = {"do_sample": False, "num_beams": 2, "max_new_tokens": 5}
    model, processor = captioner.model, captioner.processor
    expected = []
    for image in images:
        inputs = processor(images=[image], text="a photo of", return_tensors="pt")
        sequences = model.generate(**inputs, **greedy, num_return_sequences=2)
        expected.append(processor.post_process_image_text_to_text(sequences, inputs["input_ids"]))
    assert ModelCaptioner(model, processor, 2, "a photo of", **greedy)(images) == expected
    pipe = pipeline("image-to-text", model=model, processor=processor, device="cpu")
    assert PipelineCaptioner(pipe, 2, prompt="a photo of", **greedy)(images) == expected

    stage1, processor = (c.from_pretrained(stage1_folder) for c in (Blip2ForPreTraining, Blip2Processor))
    stage1.eval()
    expected = []
    for image in images:
        inputs = processor(images=[image], text="a photo of", return_tensors="pt")
        sequences = stage1.generate(**inputs, **greedy, num_return_sequences=2)
        texts = processor.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        expected.append([text.removeprefix("a photo of").strip() for text in texts])
    found = ModelCaptioner(stage1, processor, 2, "a photo of", **greedy)(images)
    assert found == expected and any(any(texts) for texts in found)


def test_samples_are_the_same_each_time(captioner):
    images = [make_image(seed) for seed in range(2)]
    first, again, other = (propose_captions(captioner, images, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first[0])) > 1 and [len(texts) for texts in first] == [3, 3]


def test_batches_have_seeds_of_their_own(rows, tmp_path):
    drawn = []

    def captioner(pictures):
        drawn.append(torch.rand(()).item())
        return [["a dog"] for _ in pictures]

    for folder in ("first", "again"):
        capfilt_dataset(rows, captioner, count_letters, tmp_path / folder, batch_size=2, rows_per_shard=4)
    assert drawn[:4] == drawn[4:] and len(set(drawn)) == 4


def test_batches_that_do_not_fit_the_memory_are_halved(captioner, monkeypatch):
    images = [make_image(seed) for seed in range(5)]
    greedy = {"do_sample": False, "num_beams": 2, "max_new_tokens": 4}
    proposer = ModelCaptioner(captioner.model, captioner.processor, 2, **greedy)
    expected, generate, sizes = proposer(images), captioner.model.generate, []

    def short_of_memory(pixel_values, **kwargs):
        sizes.append(len(pixel_values))
        if len(pixel_values) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(captioner.model, "generate", short_of_memory)
    assert proposer(images) == expected
    assert sizes == [5, 2, 2, 1]


def test_any_pipeline_on_the_command_line(rows, stage1_folder, tmp_path):
    """A GIT, which is none of ours."""
    tokenizer = make_tokenizer()
    tokenizer.cls_token = "<s>"
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GitConfig(
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        **vision,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=64,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    transformers.GitForCausalLM(config).save_pretrained(tmp_path / "git")
    tokenizer.save_pretrained(tmp_path / "git")
    make_image_processor().save_pretrained(tmp_path / "git")
    rows.select([0, 1]).to_parquet(tmp_path / "rows.parquet")
    options = ["--filter", stage1_folder, "--captioner", tmp_path / "git", "--num-captions", "3", "--num-workers", "0"]
    run(tmp_path / "rows.parquet", *options, "--output", tmp_path / "out", "--max-new-tokens", "5")
    candidates = load_rows(tmp_path / "out")["candidates"]
    assert all(any(not candidate["is_original"] for candidate in row) for row in candidates)


def test_a_clip_as_the_filter(rows, tmp_path):
    """The function that docs/capfilt.md shows."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": VOCAB_SIZE, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1},
        vision_config={**sizes, "image_size": 28, "patch_size": 14},
        projection_dim=16,
    )
    clip, tokenizer, image_processor = (
        transformers.CLIPModel(config).eval(),
        make_tokenizer(eos=True),
        make_image_processor(),
    )

    @torch.no_grad()
    def caption_filter(pictures, captions):
        inputs = tokenizer(sum(captions, []), padding=True, return_tensors="pt", return_token_type_ids=False)
        inputs |= image_processor(images=pictures, return_tensors="pt")
        scores = clip(**inputs).logits_per_image.split([len(own) for own in captions], dim=1)
        return [own[number].tolist() for number, own in enumerate(scores)]

    capfilt_dataset(rows, draw_words, caption_filter, tmp_path / "out")
    for row in load_rows(tmp_path / "out"):
        texts = [clean_caption(candidate["text"]) for candidate in row["candidates"]]
        alone = {text: caption_filter([row["image"]], [[text]])[0][0] for text in texts}
        assert texts == sorted(texts, key=lambda text: -alone[text])
        assert len(set(alone.values())) > 2


def test_what_is_refused(rows, retriever, tmp_path):
    caption_filter = RetrievalFilter(*retriever)
    capfilt_dataset(rows, draw_words, count_letters, tmp_path / "out")
    before = shards(tmp_path / "out")
    for changed in ({"keep": 1}, {"min_score": 0.0}, {"seed": 1}, {"batch_size": 3}, {"rows_per_shard": 3}):
        with pytest.raises(ValueError, match=f"made otherwise \\({next(iter(changed))}: "):
            capfilt_dataset(rows, draw_words, count_letters, tmp_path / "out", **changed)
    with pytest.raises(ValueError, match="made otherwise \\(filter: "):
        capfilt_dataset(rows, draw_words, caption_filter, tmp_path / "out")
    with pytest.raises(ValueError, match="made otherwise \\(captioner: "):
        capfilt_dataset(rows, None, count_letters, tmp_path / "out")
    with pytest.raises(ValueError, match="made otherwise \\(dataset: "):
        capfilt_dataset(rows.select([1, 0, *range(2, 7)]), draw_words, count_letters, tmp_path / "out")
    assert shards(tmp_path / "out") == before
    (tmp_path / "out" / "data" / "train-00000-of-00001.parquet").unlink()
    capfilt_dataset(rows, draw_words, count_letters, tmp_path / "out", num_workers=2)
    assert shards(tmp_path / "out") == before
    capfilt_dataset(rows, draw_words, count_letters, tmp_path / "out", keep=1, overwrite=True)
    assert all(len(kept) == 1 for kept in load_rows(tmp_path / "out")["kept_captions"])
    (tmp_path / "out" / "capfilt.json").unlink()
    kept = shards(tmp_path / "out")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="there already, without capfilt.json"):
            capfilt_dataset(rows, draw_words, count_letters, tmp_path / "out", overwrite=overwrite)
    assert shards(tmp_path / "out") == kept


def test_what_a_stopped_run_has_begun_is_no_part_of_another_result(rows, tmp_path):
    def interrupted(pictures, captions):
        # What the first batch gave is in the file by then
        monkey.setattr("blip2_hf.capfilt.result._GROUP_BYTES", 1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(pictures)
        return count_letters(pictures, captions)

    calls = []
    with pytest.MonkeyPatch.context() as monkey, pytest.raises(KeyboardInterrupt):
        capfilt_dataset(rows, draw_words, interrupted, tmp_path / "out", batch_size=2)
    unfinished = tmp_path / "out" / ".unfinished"
    assert len(calls) == 2 and not list(unfinished.iterdir())
    # What a run of another machine has left, which was killed
    (unfinished / ".blip2-hf-00000000-1-01234567.tmp").write_bytes(b"half a file")
    capfilt_dataset(rows, draw_words, count_letters, tmp_path / "out", rows_per_shard=4)
    assert sorted(shards(tmp_path / "out")) == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert len(datasets.load_dataset(str(tmp_path / "out"), split="train")) == 6


def test_a_result_holds_pictures_that_the_rows_only_name(rows, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        make_image(number).save(pictures / f"{number}.png")
    lines = [{"file_name": f"{number}.png", "caption": WORDS[number]} for number in range(3)]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = datasets.load_dataset(str(pictures), split="train")
    expected = [image.tobytes() for image in folder["image"]]
    capfilt_dataset(folder, draw_words, count_letters, tmp_path / "out")
    for path in pictures.iterdir():
        path.unlink()
    found = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert [image.tobytes() for image in found["image"]] == expected
    assert found.features["image"] == datasets.Image()


def test_a_part_of_the_rows(rows, stage1_folder, tmp_path):
    rows.to_parquet(tmp_path / "rows-0.parquet")
    rows.save_to_disk(tmp_path / "disk")
    arguments = ["--filter", stage1_folder, "--num-captions", 0, "--device", "cpu", "--split", "train[:2]"]
    run(tmp_path / "rows-*.parquet", *arguments, "--output", tmp_path / "out")
    assert datasets.load_dataset(str(tmp_path / "out"), split="train")["capfilt_row"] == [0, 1]
    run(tmp_path / "disk", *arguments, "--output", tmp_path / "other")
    assert datasets.load_dataset(str(tmp_path / "other"), split="train")["capfilt_row"] == [0, 1]


def test_arguments_that_do_not_fit(rows, retriever, captioner, tmp_path):
    def refused(message, dataset=rows, captioner=draw_words, caption_filter=count_letters, **kwargs):
        with pytest.raises(ValueError, match=message):
            capfilt_dataset(dataset, captioner, caption_filter, tmp_path / "out", **kwargs)
        assert not (tmp_path / "out" / "data").exists()

    refused("datasets.Dataset was expected, got a list", dataset=[{"image": None}])
    refused("no rows", dataset=rows.select([]))
    refused("a column 'candidates' already", dataset=rows.rename_column("source", "candidates"))
    refused("keep=0", keep=0)
    refused("no column 'title'", text_column="title")
    refused("has 0 in column 'n'", dataset=rows.add_column("n", list(range(7))), text_column="n")
    refused("given 6 pictures and returned 1 lists", captioner=lambda pictures: [["a"]])
    refused("returned such as 'a dog'", captioner=lambda pictures: ["a dog" for _ in pictures])
    refused("a finite number for each", caption_filter=lambda pictures, captions: [[1.0] for _ in captions])
    refused("a finite number for each", caption_filter=lambda p, captions: [[float("nan")] * len(c) for c in captions])
    with pytest.raises(ValueError, match="one of sum, itm, itc"):
        RetrievalFilter(*retriever, score="clip")
    with pytest.raises(ValueError, match="num_captions=0: 1 at least"):
        ModelCaptioner(captioner.model, captioner.processor, num_captions=0)


def test_equal_scores_and_few_candidates():
    def constant(pictures, captions):
        return [[1.0] * len(texts) for texts in captions]

    ranked = rank_captions(constant, [0, 1], [["B."], []], [["a", "b", " "], []])
    assert [(c.text, c.is_original) for c in ranked[0]] == [("B.", True), ("a", False)]
    assert ranked[1] == []
    assert kept_captions(ranked[0], keep=3) == ["B.", "a"]
    assert kept_captions(ranked[0], keep=1) == ["B."]
    assert kept_captions(ranked[0], min_score=1.5) == []
