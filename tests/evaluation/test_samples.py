"""What an evaluation takes for one picture, for a prediction that is there, for a score, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from benchmark_files import karpathy_file, make_pictures, write
from benchmark_runs import (
    caption_samples,
    command,
    fast_preset,
    make_retrieval_and_processor,
    one_by_one,
    predictions,
    question_samples,
)
from saved_models import save_captioner
from tiny import make_image, make_model, make_processor

from blip2_hf.cli import evaluate, main
from blip2_hf.data import clean_question
from blip2_hf.evaluation import retrieval_recall
from blip2_hf.evaluation.benchmarks import evaluate_captioning, evaluate_vqa
from blip2_hf.evaluation.metrics import caption_metrics, vqa_accuracy
from blip2_hf.evaluation.readers import read_caption_rows, read_karpathy, read_question_rows
from blip2_hf.evaluation.retrieval_benchmark import evaluate_retrieval
from blip2_hf.evaluation.samples import CaptionSample, QuestionSample, samples_fingerprint
from blip2_hf.models.image_loading import ImageLoadError


@pytest.fixture(scope="module")
def retrieval():
    return make_retrieval_and_processor()


@pytest.fixture
def generated(opt, monkeypatch):
    """How many texts were generated at a time."""
    generate, sizes = opt[0].generate, []
    monkeypatch.setattr(opt[0], "generate", lambda **kw: sizes.append(len(kw["input_ids"])) or generate(**kw))
    return sizes


def tower_outputs(folder):
    """The tower's output for each picture of an evaluation of retrieval, as it was stored."""
    (path,) = (folder / "parts" / "features").glob("*.arrow")
    return [row["image_embeds"] for row in datasets.Dataset.from_file(str(path))]


# Samples without references


def test_captions_without_references_are_not_scored(opt, tmp_path):
    model, processor = opt
    samples = caption_samples(5)
    for number in (0, 3):
        samples[number] = replace(samples[number], captions=[])
    results = evaluate_captioning(model, processor, samples, tmp_path, fast_preset("caption", model))
    captions = [prediction["caption"] for prediction in predictions(tmp_path)]
    assert len(captions) == 5

    def score(*numbers):
        return pytest.approx(caption_metrics([captions[n] for n in numbers], [samples[n].captions for n in numbers]))

    assert results["scores"] == score(1, 2, 4)
    assert results["scores_by_group"] == {"in-domain": score(2, 4), "near-domain": score(1)}
    assert results["num_samples"] == {"in-domain": 3, "near-domain": 2, "overall": 5}
    assert results["num_scored"] == {"in-domain": 2, "near-domain": 1, "overall": 3}
    assert results["without_references"] == [100, 103]
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[4].startswith("| overall | 3 |")
    assert lines[6] == "Not scored, because they have no references: 2 of 5 samples (100, 103)."


@pytest.mark.parametrize("protocol", ["official", "lavis", "exact"])
def test_answers_without_references_are_not_scored(opt, tmp_path, protocol):
    """And a group without any has no score."""
    model, processor = opt
    samples = [
        replace(sample, answers=[] if sample.group == "other" else ["bus"] * 10) for sample in question_samples()
    ]
    preset = fast_preset("vqa", model)
    results = evaluate_vqa(model, processor, samples, tmp_path, preset, protocol=protocol)
    expected = evaluate_vqa(model, processor, samples[1::2], tmp_path / "others", preset, protocol=protocol)
    assert len(predictions(tmp_path)) == 6 and results["scores"] == expected["scores"]
    assert results["scores_by_group"] == {"number": expected["scores"]}
    assert results["num_scored"] == {"number": 3, "other": 0, "overall": 3}
    assert results["without_references"] == [70, 72, 74]


def test_many_samples_without_references(opt, tmp_path):
    model, processor = opt
    samples = [QuestionSample(make_image(0), 0, i, "What?", ["bus"] * 10 if i == 11 else []) for i in range(12)]
    results = evaluate_vqa(model, processor, samples, tmp_path, fast_preset("vqa", model))
    assert results["without_references"] == list(range(10))
    assert "11 of 12 samples (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)." in (tmp_path / "table.md").read_text()


def test_pictures_without_captions_in_retrieval(retrieval, tmp_path):
    """Captions may find such a picture; it is not asked for any."""
    model, processor = retrieval
    samples = [CaptionSample(make_image(i), i, [f"picture {i}", f"number {i}"]) for i in range(6)]
    samples[2] = replace(samples[2], captions=[])
    results = evaluate_retrieval(model, processor, samples, tmp_path, k=0, show_progress=False)
    found = predictions(tmp_path)
    assert len(found["image_to_text"]) == 6 and len(found["text_to_image"]) == 10
    asked = [entry for entry in found["image_to_text"] if entry["image_id"] != 2]
    hits = [entry["captions"][0].endswith(f" {entry['image_id']}") for entry in asked]
    assert results["scores"]["image_to_text_r1"] == sum(hits) / 5
    assert results["scores"]["image_to_text_r10"] == 1
    hits = [entry["caption"].endswith(f" {entry['image_ids'][0]}") for entry in found["text_to_image"]]
    assert results["scores"]["text_to_image_r1"] == sum(hits) / 10
    assert any(2 in entry["image_ids"] for entry in found["text_to_image"])
    assert (results["num_samples"], results["num_scored"]) == ({"overall": 6}, {"overall": 5})
    assert results["without_references"] == [2]
    assert "1 of 6 samples (2)." in (tmp_path / "table.md").read_text()
    with pytest.raises(ValueError, match="None of 1 images has a caption"):
        evaluate_retrieval(model, processor, [samples[2]], tmp_path / "none")


def test_recall_of_an_image_without_a_text():
    is_match = torch.tensor([[True, False], [False, False], [False, True]])
    recall = retrieval_recall(is_match.float(), is_match, k=(1,))
    assert recall == {"image_to_text_r1": 1.0, "text_to_image_r1": 1.0}


def test_the_command_tells_of_samples_without_references(opt, tmp_path, capsys):
    for part in opt:
        part.save_pretrained(tmp_path / "model")
    path, images = karpathy_file(tmp_path, {}, {"sentences": []})
    main(command(tmp_path, "coco-caption", tmp_path / "out", "--annotations", path, "--images", images))
    assert "Not scored, because they have no references: 1 of 2 samples (1)." in capsys.readouterr().out
    rows = [{"image": make_image(i), "question": "What?", "answer": ["bus"] * (i % 2)} for i in range(4)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    main(command(tmp_path, "vqa", tmp_path / "vqa", "--data", tmp_path / "rows.parquet"))
    assert "2 of 4 samples (0, 2)." in capsys.readouterr().out


# Predictions that are there


def test_predictions_stay_when_references_names_and_groups_change(opt, tmp_path, generated):
    model, processor = opt
    samples, preset = caption_samples(3), fast_preset("caption", model)
    evaluate_captioning(model, processor, samples, tmp_path, preset)
    texts = [prediction["caption"] for prediction in predictions(tmp_path)]
    mended = [
        replace(sample, captions=["mended"], image_id=f"x{sample.image_id}", group="all", source="row 0")
        for sample in samples
    ]
    results = evaluate_captioning(
        model, processor, mended, tmp_path, replace(preset, name="another"), task="coco-caption"
    )
    assert generated == [3]
    assert results["scores"] == pytest.approx(caption_metrics(texts, [["mended"]] * 3))
    assert set(results["scores_by_group"]) == {"all"} and results["settings"]["preset"] == "another"
    assert predictions(tmp_path) == [{"image_id": f"x{100 + i}", "caption": text} for i, text in enumerate(texts)]


def test_predictions_stay_when_answers_change(opt, tmp_path, generated):
    model, processor = opt
    samples, preset = question_samples(), fast_preset("vqa", model)
    evaluate_vqa(model, processor, samples, tmp_path, preset)
    texts = [prediction["answer"] for prediction in predictions(tmp_path)]
    mended = [replace(sample, answers=[text] * 10) for sample, text in zip(samples, texts, strict=True)]
    results = evaluate_vqa(model, processor, mended, tmp_path, preset)
    assert generated == [6]
    assert results["scores"] == vqa_accuracy(texts, [sample.answers for sample in mended])
    with pytest.raises(ValueError, match="made otherwise .*samples"):
        evaluate_vqa(model, processor, [*samples[:5], replace(samples[5], question="Why?")], tmp_path, preset)


def test_predictions_of_other_defaults_of_generation_are_refused(opt, tmp_path, monkeypatch):
    model, processor = opt
    samples, preset = caption_samples(1), fast_preset("caption", model)
    evaluate_captioning(model, processor, samples, tmp_path, preset)
    monkeypatch.setattr(model.generation_config, "no_repeat_ngram_size", 2)
    with pytest.raises(ValueError, match="made otherwise .*generation_config: .*no_repeat_ngram_size"):
        evaluate_captioning(model, processor, samples, tmp_path, preset)


def test_captions_are_what_retrieval_reads(retrieval, tmp_path):
    model, processor = retrieval
    samples = [CaptionSample(make_image(i), i, [f"picture {i}"]) for i in range(3)]
    results = evaluate_retrieval(model, processor, samples, tmp_path, k=1, show_progress=False)
    named = [
        replace(sample, image_id=f"x{sample.image_id}", captions=[f"Picture {sample.image_id}!"]) for sample in samples
    ]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.*")}
    again = evaluate_retrieval(model, processor, named, tmp_path, k=1, task="coco-retrieval", show_progress=False)
    assert again["scores"] == results["scores"]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    other = [*samples[:2], replace(samples[2], captions=["a bus"])]
    with pytest.raises(ValueError, match="made otherwise .*samples"):
        evaluate_retrieval(model, processor, other, tmp_path, k=1, show_progress=False)


def test_what_tells_samples_apart(tmp_path):
    folders = [make_pictures(tmp_path / name, "0.jpg") for name in "ab"]
    paths = [CaptionSample(str(folder / "0.jpg"), 0, ["a dog"]) for folder in folders]
    fingerprints = [samples_fingerprint([sample]) for sample in paths]
    fingerprints += [samples_fingerprint([sample]) for sample in (CaptionSample(make_image(i), 0, []) for i in (1, 2))]
    fingerprints += [samples_fingerprint(paths[:1], texts) for texts in (["What?"], ["Where?"])]
    assert len(set(fingerprints)) == 6


@pytest.mark.parametrize("stored", [list, datasets.Dataset.from_list])
def test_every_picture_of_a_data_set_tells_it_apart(stored):
    rows = [{"image": make_image(i, (8, 8)), "caption": f"picture {i}", "id": i} for i in range(40)]
    expected = samples_fingerprint(read_caption_rows(stored(rows)))
    assert samples_fingerprint(read_caption_rows(stored(rows))) == expected
    # A row more of a picture that is there already is another caption
    more = stored([rows[0], *rows])
    assert samples_fingerprint(read_caption_rows(more, id_column="id")) == expected
    rows[4], rows[9] = rows[9], rows[4]  # which are not among the 32
    assert samples_fingerprint(read_caption_rows(stored(rows))) != expected


# Pictures


def test_files_of_one_name_have_captions_of_their_own(opt, tmp_path):
    model, processor = opt
    names = ["cats/1.jpg", "dogs/1.jpg", "birds/1.jpg"]
    images = make_pictures(tmp_path / "images", *names)
    changes = [{"filepath": str(Path(name).parent), "filename": "1.jpg", "cocoid": ...} for name in names]
    samples = read_karpathy(karpathy_file(tmp_path, *changes)[0], images)
    preset = fast_preset("caption", model)
    evaluate_captioning(model, processor, samples, tmp_path / "out", preset)
    expected = one_by_one(model, processor, samples, [preset.prompt] * 3, preset)
    assert len(set(expected)) == 3
    assert predictions(tmp_path / "out") == [
        {"image_id": name.removesuffix(".jpg"), "caption": text} for name, text in zip(names, expected, strict=True)
    ]


def test_questions_about_pictures_of_one_id(opt, tmp_path):
    """The id is a name: what is looked at is the picture."""
    model, processor = opt
    samples = [QuestionSample(make_image(i), 7, i, "What is this?", []) for i in range(3)]
    preset = fast_preset("vqa", model)
    evaluate_vqa(model, processor, samples, tmp_path, preset)
    prompts = [preset.prompt.format(clean_question(sample.question)) for sample in samples]
    expected = one_by_one(model, processor, samples, prompts, preset)
    assert len(set(expected)) > 1
    assert [prediction["answer"] for prediction in predictions(tmp_path)] == expected


def test_a_picture_of_several_rows_is_seen_once(opt, tmp_path):
    model, processor = opt
    rows = [{"image": make_image(i // 2), "question": f"What is {i}?", "answer": [], "of": i // 2} for i in range(4)]
    samples = read_question_rows(datasets.Dataset.from_list(rows), image_id_column="of")
    passes = []
    hook = model.vision_model.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    evaluate_vqa(model, processor, samples, tmp_path, fast_preset("vqa", model))
    hook.remove()
    assert passes == [2]


def test_rows_of_one_id_are_one_picture_of_retrieval(retrieval, tmp_path):
    model, processor = retrieval
    rows = [{"image": make_image(i // 2), "caption": f"picture {i}", "id": 10 + i // 2} for i in range(6)]
    samples = read_caption_rows(datasets.Dataset.from_list(rows), id_column="id")
    results = evaluate_retrieval(model, processor, samples, tmp_path, k=0, show_progress=False)
    assert results["num_samples"] == {"overall": 3} and results["settings"]["num_texts"] == 6
    assert len(set(tower_outputs(tmp_path))) == 3


def test_samples_of_several_data_sets_in_retrieval(retrieval, tmp_path):
    model, processor = retrieval
    rows = [{"image": make_image(i), "caption": f"picture {i}", "id": i} for i in range(4)]
    whole = read_caption_rows(datasets.Dataset.from_list(rows), id_column="id")
    parts = [read_caption_rows(datasets.Dataset.from_list(part), id_column="id") for part in (rows[:2], rows[2:])]
    results = [
        evaluate_retrieval(model, processor, samples, tmp_path / name, k=0, show_progress=False)
        for name, samples in (("whole", whole), ("parts", parts[0] + parts[1]))
    ]
    assert tower_outputs(tmp_path / "parts") == tower_outputs(tmp_path / "whole")
    assert results[0]["scores"] == results[1]["scores"]


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": None}, "image_id=7 has no picture"),
        ({"image_id": None}, "image_id=None: image_id is None; an integer or a text was expected"),
        ({"image_id": True}, "image_id is True; an integer or a text was expected"),
        ({"captions": "a dog"}, "captions is 'a dog'; a list was expected"),
        ({"captions": None}, "captions is None; a list was expected"),
        ({"captions": ["a dog", None]}, r"image_id=7: captions\[1\] is None; a text was expected"),
        ({"captions": [3.5]}, r"captions\[0\] is 3.5; a text was expected. Write numbers as texts"),
        ({"group": "overall"}, "group is 'overall', as all samples together are called"),
        ({"captions": [None], "source": "k.json, images[3]"}, r"^k.json, images\[3\]: captions\[0\] is None"),
    ],
)
def test_caption_samples_that_can_not_be_right(fields, message):
    with pytest.raises(ValueError, match=message):
        CaptionSample(**{"image": "x.jpg", "image_id": 7, "captions": ["a dog"], **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question_id": None}, "question_id=None: question_id is None; an integer or a text was expected"),
        ({"question": None}, "question_id=9: question is None; a text was expected"),
        ({"question": "What is \ud83d?"}, r"question is 'What is \\ud83d\?', with a lone surrogate"),
        ({"answers": [2]}, r"question_id=9: answers\[0\] is 2; a text was expected. Write numbers as texts"),
    ],
)
def test_question_samples_that_can_not_be_right(fields, message):
    sample = {"image": "x.jpg", "image_id": 7, "question_id": 9, "question": "What?", "answers": ["bus"], **fields}
    with pytest.raises(ValueError, match=message):
        QuestionSample(**sample)


def test_samples_that_do_not_go_together(opt, retrieval, tmp_path, generated):
    model, processor = opt
    captions, questions = caption_samples(2), question_samples()[:2]
    same = [captions[0], replace(captions[1], image_id=100)]
    with pytest.raises(ValueError, match=r"sample 0 and sample 1 have the same id, and each needs its own \(100\)"):
        evaluate_captioning(model, processor, same, tmp_path)
    same = [questions[0], replace(questions[1], question_id=70, source="row 1")]
    with pytest.raises(ValueError, match=r"sample 0 and row 1 have the same id, and each needs its own \(70\)"):
        evaluate_vqa(model, processor, same, tmp_path)
    with pytest.raises(ValueError, match="sample 0 and sample 1 are about the same picture"):
        evaluate_retrieval(*retrieval, [captions[0], replace(captions[0], image_id=5)], tmp_path)
    assert generated == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("question", ["What is <image>?", "What is <IMAGE>?"])
def test_questions_with_the_mark_of_a_picture(opt, tmp_path, question, generated):
    model, processor = opt
    samples = question_samples()[:2]
    samples[1] = replace(samples[1], question=question, source="questions.json, questions[1]")
    message = r"^questions.json, questions\[1\]: the prompt is 'Question: what is <image>\?.*is a special token"
    with pytest.raises(ValueError, match=message):
        evaluate_vqa(model, processor, samples, tmp_path)
    assert generated == []
    # A prompt may say where the picture is
    preset = fast_preset("vqa", model)
    marked = replace(preset, prompt=f"<image>{preset.prompt}")
    expected = evaluate_vqa(model, processor, question_samples(), tmp_path / "plain", preset)
    assert (
        evaluate_vqa(model, processor, question_samples(), tmp_path / "marked", marked)["scores"] == expected["scores"]
    )
    assert predictions(tmp_path / "marked") == predictions(tmp_path / "plain")


def test_questions_with_another_special_token(opt, tmp_path, generated):
    """Training reads it as text, which a prompt with a question in it can not say."""
    model, processor = opt
    samples = [replace(question_samples()[0], question="What does </s> mean?")]
    with pytest.raises(ValueError, match="the prompt is .*, and '</s>' is a special token"):
        evaluate_vqa(model, processor, samples, tmp_path)
    assert generated == []


def test_questions_of_which_nothing_is_left(opt, tmp_path, generated):
    samples = [replace(question_samples()[0], question="...", source="row 3")]
    with pytest.raises(ValueError, match="^row 3: the question is '...', of which cleaning leaves nothing"):
        evaluate_vqa(*opt, samples, tmp_path)
    assert generated == []


def test_a_broken_file_is_named_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"question": "a?", "answer": "b"}\n{"question"')
    monkeypatch.setattr(evaluate, "load_captioner", None)
    save_captioner(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="^blip2-hf: .*rows.jsonl can't be read: "):
        main(["evaluate", "vqa", *options])


def test_captions_with_the_mark_of_a_picture_in_retrieval(retrieval, tmp_path):
    samples = [CaptionSample(make_image(0), 0, ["a dog", "an <image> of a dog"], source="row 0")]
    with pytest.raises(ValueError, match="row 0: a caption is 'an <image> of a dog', and '<image>' stands for a pict"):
        evaluate_retrieval(*retrieval, samples, tmp_path)


def test_a_prompt_with_half_a_character(opt, tmp_path):
    model, processor = opt
    preset = replace(fast_preset("caption", model), prompt="a \udcff of")
    with pytest.raises(ValueError, match=r"The prompt is 'a \\udcff of', with a lone surrogate"):
        evaluate_captioning(model, processor, caption_samples(1), tmp_path, preset)


def test_the_command_names_file_and_entry(tmp_path, monkeypatch):
    for part in (make_model(), make_processor()):
        part.save_pretrained(tmp_path / "model")
    entry = {"imageId": "n1", "question": "How many?", "answer": 2}
    images = make_pictures(tmp_path / "images", "n1.jpg")
    options = ["--questions", write(tmp_path / "gqa.json", {"7": entry}), "--images", images]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load_captioner", None)  # not before the data are checked
        with pytest.raises(SystemExit, match="^blip2-hf: .*gqa.json, '7': 'answer' is 2; a text was expected"):
            main(command(tmp_path, "gqa", tmp_path / "out", *options))
    entry |= {"question": "What is <image>?", "answer": "a bus"}
    options[1] = write(tmp_path / "gqa.json", {"7": entry})
    with pytest.raises(SystemExit, match="^blip2-hf: .*gqa.json, '7': the prompt is .*'<image>' is a special token"):
        main(command(tmp_path, "gqa", tmp_path / "out", *options))


def test_a_row_without_a_picture_is_named_before_generation(opt, tmp_path, generated):
    model, processor = opt
    rows = [{"image": make_image(0) if i != 2 else None, "caption": f"picture {i}"} for i in range(40)]
    samples = read_caption_rows(datasets.Dataset.from_list(rows))
    with pytest.raises(ImageLoadError, match="^row 2 "):
        evaluate_captioning(model, processor, samples, tmp_path)
    assert generated == []
