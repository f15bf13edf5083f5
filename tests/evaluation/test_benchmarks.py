"""Evaluation, from pictures to files: one picture at a time, interrupted, short of memory, in two processes."""

import io
import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import tqdm
import transformers
from accelerate import PartialState
from benchmark_files import (
    aokvqa_file,
    coco_files,
    karpathy_entry,
    make_pictures,
    nocaps_file,
    pope_file,
    synonyms_file,
    vqa_files,
    write,
)
from benchmark_runs import (
    QUESTIONS,
    caption_samples,
    command,
    fast_preset,
    make_retrieval_and_processor,
    one_by_one,
    predictions,
    question_samples,
)
from processes import run
from stage1 import make_stage1
from tiny import (
    CAPTIONS,
    make_image,
    make_image_processor,
    make_model,
    make_processor,
)

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.cli import main
from blip2_hf.cli.evaluate import _GQA_PROTOCOLS, _VQA_PROTOCOLS, _YES_NO_PROTOCOLS
from blip2_hf.data import clean_question
from blip2_hf.evaluation import TwoStageRetrieval
from blip2_hf.evaluation.answer_protocols import ANSWER_PROTOCOLS
from blip2_hf.evaluation.benchmarks import evaluate_captioning, evaluate_chair, evaluate_multiple_choice, evaluate_vqa
from blip2_hf.evaluation.metrics import caption_metrics, lemmatize_answers, vqa_accuracy
from blip2_hf.evaluation.metrics.lemmas import load_lemmatizer
from blip2_hf.evaluation.readers import read_aokvqa, read_caption_rows
from blip2_hf.evaluation.retrieval_benchmark import evaluate_retrieval
from blip2_hf.evaluation.samples import CaptionSample, QuestionSample


@pytest.mark.parametrize("prompt", ["a photo of", ""])
def test_captions_are_those_of_one_picture_at_a_time(opt, tmp_path, prompt):
    model, processor = opt
    samples, preset = caption_samples(), replace(fast_preset("caption", model), prompt=prompt)
    results = evaluate_captioning(model.train(), processor, samples, tmp_path, preset, batch_size=2)
    assert model.training
    expected = one_by_one(model.eval(), processor, samples, [prompt] * 5, preset)
    assert predictions(tmp_path) == [{"image_id": 100 + i, "caption": caption} for i, caption in enumerate(expected)]
    references = [sample.captions for sample in samples]
    assert results["scores"] == pytest.approx(caption_metrics(expected, references))
    assert results["scores_by_group"]["near-domain"] == pytest.approx(
        caption_metrics(expected[1::2], references[1::2])
    )
    assert results["num_samples"] == {"in-domain": 3, "near-domain": 2, "overall": 5}
    assert results == json.loads((tmp_path / "results.json").read_text())
    settings = results["settings"]
    assert settings["prompt"] == prompt and settings["generate_kwargs"] == preset.generate_kwargs
    assert settings["image_size"] == {"height": 28, "width": 28} and settings["dtype"] == "float32"
    assert results["run"]["versions"]["torch"] == torch.__version__
    line = (tmp_path / "table.md").read_text().splitlines()[-1]
    assert line.startswith("| overall | 5 |") and f"{100 * results['scores']['CIDEr-D']:.2f}" in line


@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_answers_are_those_of_one_question_at_a_time(tmp_path, language_model):
    model, processor = make_model(language_model), make_processor(language_model == "t5")
    samples, preset = question_samples(), fast_preset("vqa", model)
    passes = []
    model.vision_model.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    results = evaluate_vqa(model, processor, samples, tmp_path, preset, batch_size=4)
    # Both questions about a picture lie in one batch, and it is seen once
    assert passes == [2, 1]
    prompts = [preset.prompt.format(clean_question(sample.question)) for sample in samples]
    assert ("Short answer" in prompts[0]) == (language_model == "t5")
    expected = one_by_one(model, processor, samples, prompts, preset)
    assert len(set(expected)) > 2
    assert predictions(tmp_path) == [{"question_id": 70 + i, "answer": answer} for i, answer in enumerate(expected)]
    assert set(results["scores_by_group"]) == {"number", "other"}
    score = vqa_accuracy(expected, [sample.answers for sample in samples])
    assert results["scores"] == score and set(score) == {"vqa_accuracy"}


def test_questions_that_the_qformer_reads(tmp_path):
    model = Blip2ForConditionalGeneration.from_pretrained_parts(
        make_stage1(num_query_tokens=4), make_model().language_model, instruction_aware=True
    ).eval()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "question", "what", "this", "answer", "bus", "people"]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=20)
    processor = make_processor(qformer_tokenizer=tokenizer)
    model.config.image_token_index = processor.image_token_id
    preset = fast_preset("vqa", model)
    evaluate_vqa(model, processor, question_samples(), tmp_path, preset)
    prompts = [preset.prompt.format(clean_question(sample.question)) for sample in question_samples()]
    expected = one_by_one(model, processor, question_samples(), prompts, preset)
    assert [prediction["answer"] for prediction in predictions(tmp_path)] == expected


def test_gqas_submission_and_secret_answers(opt, tmp_path):
    model, processor = opt
    preset = fast_preset("vqa", model)
    samples = [replace(sample, answers=["bus"]) for sample in question_samples()[:2]]
    results = evaluate_vqa(model, processor, samples, tmp_path / "gqa", preset, "gqa", "normalized")
    assert [sorted(prediction) for prediction in predictions(tmp_path / "gqa")] == [["prediction", "questionId"]] * 2
    assert set(results["scores"]) == {"gqa_accuracy"} and results["settings"]["protocol"] == "normalized"
    secret = [replace(sample, answers=[], group=None) for sample in question_samples()[:2]]
    results = evaluate_vqa(model, processor, secret, tmp_path / "secret", preset)
    assert results["scores"] == {} and len(predictions(tmp_path / "secret")) == 2
    assert "protocol" not in results["settings"]
    assert "no references" in (tmp_path / "secret" / "table.md").read_text()


def test_an_interrupted_evaluation_goes_on(opt, tmp_path, monkeypatch):
    model, processor = opt
    samples, preset = caption_samples(), fast_preset("caption", model)
    evaluate_captioning(model, processor, samples, tmp_path / "whole", preset, batch_size=2)
    generate, sizes = model.generate, []

    def interrupted(**kwargs):
        if len(sizes) == 2:
            raise KeyboardInterrupt
        sizes.append(len(kwargs["input_ids"]))
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_captioning(model, processor, samples, tmp_path / "parts", preset, batch_size=2)
    assert not (tmp_path / "parts" / "results.json").exists()
    # Killed within a line, and gone on with where there was another process
    (part,) = (tmp_path / "parts" / "parts").glob("part-*.jsonl")
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:2]) + lines[2][:7])
    (part.parent / "part-00001.jsonl").write_text(lines[3] + lines[2][:5])
    sizes[:] = [0]
    results = evaluate_captioning(model, processor, samples, tmp_path / "parts", preset, batch_size=2)
    assert sizes == [0, 2]
    assert predictions(tmp_path / "parts") == predictions(tmp_path / "whole")
    assert results["scores"] == json.loads((tmp_path / "whole" / "results.json").read_text())["scores"]


def test_leftovers_of_other_settings_are_refused(opt, tmp_path):
    model, processor = opt
    samples, preset = caption_samples(2), fast_preset("caption", model)
    evaluate_captioning(model, processor, samples, tmp_path, preset)
    evaluate_captioning(model, processor, samples, tmp_path, preset, batch_size=1)
    with pytest.raises(ValueError, match="made otherwise .*prompt: 'a photo of' there, 'a picture of' now"):
        evaluate_captioning(model, processor, samples, tmp_path, replace(preset, prompt="a picture of"))
    with pytest.raises(ValueError, match="made otherwise .*samples"):
        evaluate_captioning(model, processor, samples[:1], tmp_path, preset)
    with pytest.raises(ValueError, match="made otherwise .*image_size: .*28.* there, .*42"):
        evaluate_captioning(model, processor, samples, tmp_path, preset, image_size=42)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="made otherwise .*weights"):
        evaluate_captioning(make_model(), processor, samples, tmp_path, preset)


def test_leftovers_of_other_pictures_with_the_same_ids_are_refused(opt, tmp_path):
    model, processor = opt
    samples, preset = caption_samples(2), fast_preset("caption", model)
    evaluate_captioning(model, processor, samples, tmp_path, preset)
    with pytest.raises(ValueError, match="made otherwise .*samples"):
        evaluate_captioning(model, processor, [samples[0], replace(samples[1], image=make_image(7))], tmp_path, preset)


def test_settings_that_predicted_nothing_may_change(opt, tmp_path):
    model, processor = opt
    samples, preset = caption_samples(2), fast_preset("caption", model)
    typo = replace(preset, generate_kwargs={"num_beam": 2})
    with pytest.raises(ValueError, match="num_beam"):
        evaluate_captioning(model, processor, samples, tmp_path, typo)
    results = evaluate_captioning(model, processor, samples, tmp_path, preset)
    assert results["settings"]["generate_kwargs"] == preset.generate_kwargs
    with pytest.raises(ValueError, match="made otherwise .*num_beam"):
        evaluate_captioning(model, processor, samples, tmp_path, typo)


def test_batches_are_halved_when_memory_runs_out(opt, tmp_path, monkeypatch):
    model, processor = opt
    samples, preset = caption_samples(4), fast_preset("caption", model)
    generate, sizes = model.generate, []

    def out_of_memory(**kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", out_of_memory)
    results = evaluate_captioning(model, processor, samples, tmp_path, preset)
    assert sizes == [4, 2, 2] and results["run"]["batch_size"] == 2
    monkeypatch.setattr(model, "generate", generate)
    expected = one_by_one(model, processor, samples, [preset.prompt] * 4, preset)
    assert [prediction["caption"] for prediction in predictions(tmp_path)] == expected

    def other_error(**kwargs):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(model, "generate", other_error)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        evaluate_captioning(model, processor, samples, tmp_path / "other", preset)


def test_pictures_of_another_size_in_worker_processes(opt, tmp_path):
    model, processor = opt
    samples, preset = caption_samples(3), fast_preset("caption", model)
    results = evaluate_captioning(model, processor, samples, tmp_path, preset, image_size=42, num_workers=1)
    assert results["settings"]["image_size"] == {"height": 42, "width": 42}
    larger = Blip2Processor(make_image_processor(42), processor.tokenizer, num_query_tokens=4)
    expected = one_by_one(model, larger, samples, [preset.prompt] * 3, preset)
    assert [prediction["caption"] for prediction in predictions(tmp_path)] == expected


def test_arguments_that_do_not_fit(opt, tmp_path):
    model, processor = opt
    with pytest.raises(ValueError, match="no samples"):
        evaluate_captioning(model, processor, [], tmp_path)
    with pytest.raises(ValueError, match="'vqa' asks a question"):
        evaluate_captioning(model, processor, caption_samples(1), tmp_path, "vqa")
    with pytest.raises(ValueError, match="'caption' has no {} for the question"):
        evaluate_vqa(model, processor, question_samples(), tmp_path, "caption")
    with pytest.raises(ValueError, match="protocol='coco': one of official, lavis, exact, normalized, strict, pope"):
        evaluate_vqa(model, processor, question_samples(), tmp_path, protocol="coco")


def answer_with(monkeypatch, *answers):
    """Let the model answer so; without answers, let a prediction fail."""

    def predict(*args, **kwargs):
        assert answers, "something was predicted"
        return list(answers), 1

    monkeypatch.setattr("blip2_hf.evaluation.benchmarks.predict_texts", predict)


def questions_with(*references):
    return [
        QuestionSample(make_image(0), 0, 70 + number, "What is this?", answers, ("other", "number")[number % 2])
        for number, answers in enumerate(references)
    ]


@pytest.mark.parametrize(
    ("last", "protocol", "scores"),
    [
        # "bus": nine of ten; "Two": all of ten, of whom none wrote a capital
        (["two"] * 10, "official", (1, 0)),
        # One choice for the run: the group whose questions all have ten answers is scored like the other
        (["two", "2"], "exact", (1, 1)),
    ],
)
def test_the_data_choose_the_protocol_for_all_groups(opt, tmp_path, monkeypatch, last, protocol, scores):
    answer_with(monkeypatch, "the bus", "Two")
    samples = questions_with(["the bus"] * 9 + ["bus"], last)
    results = evaluate_vqa(*opt, samples, tmp_path)
    assert results["settings"]["protocol"] == protocol
    found = [results["scores_by_group"][group]["vqa_accuracy"] for group in ("other", "number")]
    assert found == pytest.approx(scores)
    assert f"| vqa (protocol {protocol}) | samples | vqa_accuracy |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("protocol", "score"), [("official", 0), ("lavis", 0.5), ("exact", 1), ("normalized", 1), ("strict", 0)]
)
def test_the_protocol_that_is_given(opt, tmp_path, monkeypatch, protocol, score):
    answer_with(monkeypatch, "the bus", "Two")
    number, name = (1, "gqa_accuracy") if protocol in ("normalized", "strict") else (10, "vqa_accuracy")
    samples = questions_with(["bus"] * number, ["two"] * number)
    results = evaluate_vqa(*opt, samples, tmp_path, protocol=protocol)
    assert results["scores"] == {name: score} and results["settings"]["protocol"] == protocol


def test_references_that_the_protocol_cannot_take(opt, tmp_path, monkeypatch):
    answer_with(monkeypatch)
    samples = questions_with(["bus"] * 10, ["two", "2", "three"])
    for protocol in ("official", "lavis"):
        with pytest.raises(ValueError, match=r"question 71 has too few answers \(3\).*protocol='exact'"):
            evaluate_vqa(*opt, samples, tmp_path, protocol=protocol)
    for protocol in ("normalized", "strict"):
        with pytest.raises(ValueError, match="question 70 has 10 answers.*protocol='exact'"):
            evaluate_vqa(*opt, samples, tmp_path, protocol=protocol)


def test_answers_that_are_neither_yes_nor_no(opt, tmp_path, monkeypatch):
    answer_with(monkeypatch)
    for answers, message in ((["yes", "no"], "has 2 answers"), (["bus"], "'bus': yes or no was expected")):
        with pytest.raises(ValueError, match=f"question 71 .*{message}"):
            evaluate_vqa(*opt, questions_with(["Yes"], answers), tmp_path, protocol="pope")


def test_what_captions_invent(opt, tmp_path, monkeypatch):
    model, processor = opt
    samples = [
        replace(sample, captions=captions, objects=objects, group=("x", "y")[number % 2])
        for number, (sample, captions, objects) in enumerate(
            zip(
                caption_samples(4),
                (["A puppy."], [], [], ["a bus"]),
                (["person"], [], ["bus"], None),
                strict=True,
            )
        )
    ]
    synonyms = [["person", "man"], ["dog", "puppy"], ["bus"]]
    write = "blip2_hf.evaluation.text_prediction.write_texts"
    texts = ["a man, two dogs and a bus", "a bus and a bus", "nothing", "a dog"]
    monkeypatch.setattr(write, lambda *_: texts)
    preset = fast_preset("caption", model)
    results = evaluate_chair(model, processor, samples, tmp_path, synonyms, preset)
    # The dog of the first picture is one that a caption names. The last picture has no list of objects
    assert results["num_scored"] == {"x": 2, "y": 1, "overall": 3} and results["without_references"] == [103]
    assert results["scores"] == pytest.approx({"CHAIRs": 2 / 3, "CHAIRi": 3 / 5, "object_recall": 2 / 3})
    assert results["scores_by_group"] == {
        "x": pytest.approx({"CHAIRs": 1 / 2, "CHAIRi": 1 / 3, "object_recall": 2 / 3}),
        "y": {"CHAIRs": 1, "CHAIRi": 1, "object_recall": 0},
    }
    assert predictions(tmp_path) == [
        {"image_id": 100, "caption": texts[0], "invented": ["bus"]},
        {"image_id": 101, "caption": texts[1], "invented": ["bus", "bus"]},
        {"image_id": 102, "caption": texts[2], "invented": []},
        {"image_id": 103, "caption": texts[3]},
    ]
    # Other words change the scores alone, and the settings tell of them
    monkeypatch.setattr(write, None)
    again = evaluate_chair(model, processor, samples, tmp_path, [*synonyms[:2], ["bus", "nothing"]], preset)
    assert again["scores"] == pytest.approx({"CHAIRs": 2 / 3, "CHAIRi": 3 / 6, "object_recall": 1})
    assert again["settings"]["synonyms"] != results["settings"]["synonyms"]
    with pytest.raises(ValueError, match="^sample 0 has the object 'person', which the synonyms lack"):
        evaluate_chair(model, processor, samples, tmp_path, synonyms[1:], preset)
    with pytest.raises(ValueError, match=r"image_id=5: objects\[0\] is 2; a text was expected"):
        CaptionSample(make_image(0), 5, [], objects=[2])


@pytest.fixture
def spacy(monkeypatch):
    """A pipeline of spaCy's that knows a few words."""
    words = {"dogs": ("NOUN", "dog"), "riding": ("VERB", "ride"), "bigger": ("ADJ", "big")}
    loaded = []

    class Pipeline:
        def pipe(self, texts):
            for text in texts:
                found = [(word, *words.get(word, ("X", word))) for word in text.split()]
                yield [SimpleNamespace(text=word, pos_=pos, lemma_=lemma) for word, pos, lemma in found]

    module = ModuleType("spacy")
    module.load = lambda name: loaded.append(name) or Pipeline()
    monkeypatch.setitem(sys.modules, "spacy", module)
    load_lemmatizer.cache_clear()
    yield loaded
    load_lemmatizer.cache_clear()


def test_lemmas_are_those_of_nouns_and_verbs(spacy):
    answers = ["two dogs", "", "riding  bigger dogs", "two dogs"]
    assert lemmatize_answers(answers) == ["two dog", "", "ride bigger dog", "two dog"]
    assert spacy == ["en_core_web_sm"]


def test_lemmatizing_is_a_part_of_scores_alone(opt, tmp_path, monkeypatch, spacy):
    model, processor = opt
    samples, preset = questions_with(["dog"] * 10, ["ride"] * 10), fast_preset("vqa", model)
    write = "blip2_hf.evaluation.text_prediction.write_texts"
    with monkeypatch.context() as patch:
        patch.setattr(write, lambda *_: ["dogs", "riding"])
        results = evaluate_vqa(model, processor, samples, tmp_path, preset, lemmatize=True)
    assert results["scores"] == {"vqa_accuracy": 1} and results["settings"]["lemmatize"] is True
    assert "| vqa (protocol official, lemmatized) |" in (tmp_path / "table.md").read_text()
    assert [prediction["answer"] for prediction in predictions(tmp_path)] == ["dogs", "riding"]
    # Without lemmas and by another protocol, nothing is predicted anew
    monkeypatch.setattr(write, None)
    results = evaluate_vqa(model, processor, samples, tmp_path, preset, protocol="lavis")
    assert results["scores"] == {"vqa_accuracy": 0} and results["settings"]["lemmatize"] is False


def test_a_lemmatizer_that_is_not_installed(opt, tmp_path, monkeypatch, spacy):
    answer_with(monkeypatch)

    def load(name):
        raise OSError(f"[E050] Can't find model '{name}'.")

    monkeypatch.setattr(sys.modules["spacy"], "load", load)
    samples = questions_with(["dog"] * 10)
    with pytest.raises(
        ImportError, match="^spaCy is installed, but not en_core_web_sm.*spacy download en_core_web_sm"
    ):
        evaluate_vqa(*opt, samples, tmp_path, lemmatize=True)
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match=r"^spaCy is not installed.*blip2-hf\[okvqa\].*lemmatize=False"):
        evaluate_vqa(*opt, samples, tmp_path, lemmatize=True)


@pytest.fixture(scope="module")
def retrieval():
    """Model, processor, samples of more pictures than a block has, their texts, and the tower's output."""
    model, processor = make_retrieval_and_processor()
    rows = [{"image": make_image(i), "caption": [f"{CAPTIONS[i % 6]}, {i}!", f"picture {i}"]} for i in range(23)]
    samples = read_caption_rows(datasets.Dataset.from_list(rows))
    texts = [text.lower().replace("!", "") for sample in samples for text in sample.captions]
    pixel_values = processor(images=[make_image(i) for i in range(23)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model, processor, samples, texts, model.get_image_embeds(pixel_values)


def recall(rankings, counts):
    """Texts 2i and 2i + 1 are those of image i."""
    scores = {}
    for count in counts:
        hits = [any(text // 2 == image for text in row[:count]) for image, row in enumerate(rankings[0].tolist())]
        scores[f"image_to_text_r{count}"] = sum(hits) / len(hits)
        hits = [any(image == text // 2 for image in row[:count]) for text, row in enumerate(rankings[1].tolist())]
        scores[f"text_to_image_r{count}"] = sum(hits) / len(hits)
    return pytest.approx(scores)


def test_retrieval(retrieval, tmp_path, monkeypatch):
    model, processor, samples, texts, embeds = retrieval
    results = evaluate_retrieval(model, processor, samples, tmp_path, k=6, show_progress=False)
    expected = TwoStageRetrieval(model, processor.tokenizer, k=6)(embeds, texts)
    # Six were ranked: there is no recall at 10
    assert results["scores"] == recall((expected.image_to_text.index, expected.text_to_image.index), (1, 5))
    found = predictions(tmp_path)
    assert found["image_to_text"][3]["captions"] == [texts[text] for text in expected.image_to_text.index[3]]
    assert found["text_to_image"][7]["image_ids"] == expected.text_to_image.index[7].tolist()

    # Going on computes the block that is missing, and nothing else
    blocks = sorted((tmp_path / "parts").glob("pairs-*.npy"))
    assert len(blocks) == 2
    blocks[1].unlink()
    match, counts = TwoStageRetrieval.match, []

    def counted(self, images, input_ids, pairs):
        counts.append(pairs)
        return match(self, images, input_ids, pairs)

    monkeypatch.setattr(TwoStageRetrieval, "match", counted)
    again = evaluate_retrieval(model, processor, samples, tmp_path, k=6, batch_size=3, show_progress=False)
    assert len(counts) == 1 and counts[0][:, 0].unique().tolist() == [20, 21, 22]
    assert again["scores"] == results["scores"]
    with pytest.raises(ValueError, match="made otherwise .*image_size"):
        evaluate_retrieval(model, processor, samples, tmp_path, k=6, image_size=42, show_progress=False)
    with pytest.raises(ValueError, match="None of 1 images has a caption"):
        evaluate_retrieval(model, processor, [CaptionSample(make_image(0), "x", [])], tmp_path / "none")


def test_features_serve_any_k(retrieval, tmp_path, monkeypatch):
    model, processor, samples, texts, embeds = retrieval
    evaluate_retrieval(model, processor, samples, tmp_path, k=1, show_progress=False)
    written = [*(tmp_path / "parts" / "features").glob("*.arrow"), tmp_path / "parts" / "contrast.pt"]
    times = [path.stat().st_mtime_ns for path in written]
    results = evaluate_retrieval(model, processor, samples, tmp_path, k=12, show_progress=False)
    expected = TwoStageRetrieval(model, processor.tokenizer, k=12)(embeds, texts)
    assert results["scores"] == recall((expected.image_to_text.index, expected.text_to_image.index), (1, 5, 10))
    assert results["settings"]["k"] == 12

    compare, sizes = TwoStageRetrieval.compare, []

    def measured(self, *args, **kwargs):
        found = compare(self, *args, **kwargs)
        sizes.append([len(found.image_to_text.index[0]), len(found.text_to_image.index[0])])
        return found

    monkeypatch.setattr(TwoStageRetrieval, "compare", measured)
    results = evaluate_retrieval(model, processor, samples, tmp_path, k=0, show_progress=False)
    whole = TwoStageRetrieval(model, processor.tokenizer, k=0)(embeds, texts)
    assert results["scores"] == recall((whole.image_to_text.index, whole.text_to_image.index), (1, 5, 10))
    # No more than are told of
    assert sizes == [[10, 10], [46, 23]]
    assert [path.stat().st_mtime_ns for path in written] == times


def test_batches_of_retrieval_become_smaller_when_memory_runs_out(retrieval, tmp_path, monkeypatch):
    model, processor, samples, *_ = retrieval
    samples = samples[:6]
    sizes = {"get_image_features": [], "get_text_features": [], "get_matching_logits": []}
    limits = {"get_image_features": 3, "get_text_features": 4, "get_matching_logits": 2}

    def limited(name):
        method = getattr(model, name)

        def run(*args, **kwargs):
            sizes[name].append(len(kwargs["image_embeds"] if name == "get_image_features" else args[0]))
            if sizes[name][-1] > limits[name]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
            return method(*args, **kwargs)

        return run

    for name in sizes:
        monkeypatch.setattr(model, name, limited(name))
    results = evaluate_retrieval(model, processor, samples, tmp_path, k=3, batch_size=6, show_progress=False)
    assert sizes["get_text_features"] == [6, 3, 3, 3, 3] and sizes["get_image_features"] == [3, 3]
    assert sizes["get_matching_logits"][0] == 3 and set(sizes["get_matching_logits"][1:]) == {1}
    assert results["run"]["batch_size"] == 1
    monkeypatch.undo()
    expected = evaluate_retrieval(model, processor, samples, tmp_path / "whole", k=3, show_progress=False)
    assert results["scores"] == expected["scores"]


def test_one_bar_tells_of_all_pairs(retrieval, tmp_path, monkeypatch):
    model, processor, samples, *_ = retrieval
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, file=io.StringIO())
            if not self.disable and self.unit == "pair":
                bars.append(self)

    monkeypatch.setattr(transformers.utils.logging, "tqdm", Bar)
    evaluate_retrieval(model, processor, samples, tmp_path, k=1)
    (bar,) = bars
    first, second = (len(np.load(path)) for path in sorted((tmp_path / "parts").glob("pairs-*.npy")))
    assert (bar.initial, bar.n, bar.total) == (0, first + second, first + second)
    sorted((tmp_path / "parts").glob("pairs-*.npy"))[1].unlink()
    evaluate_retrieval(model, processor, samples, tmp_path, k=1)
    assert (bars[1].initial, bars[1].n, bars[1].total) == (first, first + second, first + second)
    assert len(bars) == 2


def test_features_that_were_not_written_may_be_of_another_size(retrieval, tmp_path, monkeypatch):
    model, processor, samples, *_ = retrieval
    open_shard = "blip2_hf.data.feature_cache.atomic_file"
    with monkeypatch.context() as patch:
        patch.setattr(open_shard, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate_retrieval(model, processor, samples[:2], tmp_path, k=0, image_size=42, show_progress=False)
    results = evaluate_retrieval(model, processor, samples[:2], tmp_path, k=0, show_progress=False)
    assert results["settings"]["image_size"] == {"height": 28, "width": 28}


@pytest.fixture(scope="module")
def folder(opt, tmp_path_factory):
    """A checkpoint, pictures, and files in the formats of the benchmarks' authors."""
    folder = tmp_path_factory.mktemp("evaluation")
    for part in opt:
        part.save_pretrained(folder / "model")
    model, processor = make_retrieval_and_processor()
    for part in (model, processor):
        part.save_pretrained(folder / "retrieval")
    # As after stage 2: the heads of retrieval are not there
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("itm_head")}
    model.save_pretrained(folder / "headless", state_dict=weights)
    processor.save_pretrained(folder / "headless")
    opt[0].config.save_pretrained(folder / "config")
    names = [f"COCO_val2014_{number:012d}.jpg" for number in range(4)]
    make_pictures(folder / "images", *names, "000.jpg", "001.jpg", "n1.jpg")
    entries = [karpathy_entry(number, "test") for number in range(4)]
    write(folder / "dataset_coco.json", {"images": entries, "dataset": "coco"})
    nocaps_file(folder / "nocaps.json")
    vqa_files(folder)
    make_pictures(folder / "images", "COCO_val2014_000000000042.jpg")
    write(folder / "gqa.json", {"201": {"imageId": "n1", "question": "Is it overcast?", "answer": "no"}})
    aokvqa_file(folder / "aokvqa.json", {}, {}, {}, {})
    make_pictures(folder / "images", f"val2017/{42:012d}.jpg")
    pope_file(folder / "coco_pope_random.json", {}, {})
    pope_file(folder / "coco_pope_popular.json", {}, {}, {})
    coco_files(folder)
    synonyms_file(folder / "synonyms.txt")
    make_pictures(folder / "images", *(f"COCO_val2014_{number:012d}.jpg" for number in (7, 9)))
    rows = [{"image": make_image(i), "caption": CAPTIONS[i], "question": QUESTIONS[0]} for i in range(3)]
    rows = datasets.Dataset.from_list([{**row, "answer": "bus"} for row in rows])
    rows.to_parquet(folder / "rows.parquet")
    rows.save_to_disk(folder / "rows")
    return folder


FAST = ("--generate", "num_beams=2", "max_new_tokens=5", "min_new_tokens=0")


@pytest.mark.parametrize(
    ("task", "files", "keys"),
    [
        ("coco-caption", {"annotations": "dataset_coco.json", "images": "images"}, {"image_id", "caption"}),
        ("nocaps", {"annotations": "nocaps.json", "images": "images"}, {"image_id", "caption"}),
        (
            "vqav2",
            {"questions": "questions.json", "annotations": "annotations.json", "images": "images"},
            {"question_id", "answer"},
        ),
        ("okvqa", {"questions": "questions.json", "images": "images"}, {"question_id", "answer"}),
        ("gqa", {"questions": "gqa.json", "images": "images"}, {"questionId", "prediction"}),
        ("pope", {"questions": "coco_pope_random.json", "images": "images"}, {"question_id", "answer"}),
        (
            "chair",
            {
                "annotations": "captions_val2014.json",
                "instances": "instances_val2014.json",
                "synonyms": "synonyms.txt",
                "images": "images",
            },
            {"image_id", "caption", "invented"},
        ),
        ("caption", {"data": "rows.parquet"}, {"image_id", "caption"}),
        ("vqa", {"data": "rows.parquet"}, {"question_id", "answer"}),
        ("vqa", {"data": "rows"}, {"question_id", "answer"}),
    ],
)
def test_the_command(folder, tmp_path, capsys, task, files, keys):
    options = [text for name, value in files.items() for text in (f"--{name}", folder / value)]
    main(command(folder, task, tmp_path, *options, *FAST, "--limit", 2))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["task"] == task and results["settings"]["model"] == str(folder / "model")
    assert results["settings"]["generate_kwargs"]["num_beams"] == 2
    assert {*predictions(tmp_path)[0]} == keys
    assert len(predictions(tmp_path)) == (1 if task == "gqa" else 2)
    output = capsys.readouterr()
    assert output.out == (tmp_path / "table.md").read_text() and task in output.out
    protocol = {"vqav2": "official", "gqa": "normalized", "pope": "pope", "vqa": "exact"}.get(task)
    assert results["settings"].get("protocol") == protocol
    assert (f"{task} (protocol {protocol})" in output.out) == (protocol is not None)
    assert "The paper's have" in output.err
    assert set(results["scores_by_group"]) == {
        "nocaps": {"in-domain", "out-domain"},
        "vqav2": {"yes/no", "other"},
        "pope": {"coco_pope_random"},
    }.get(task, set())


@pytest.mark.parametrize("normalization", [None, "mean", "relative"])
def test_multiple_choice_by_the_command(folder, tmp_path, capsys, monkeypatch, normalization):
    """The prediction is the choice with the highest score by the model, and a second run predicts nothing."""
    options = [] if normalization is None else ["--normalization", normalization]
    files = ["--questions", folder / "aokvqa.json", "--images", folder / "images"]
    main(command(folder, "aokvqa", tmp_path, *files, *options))
    model, processor = (
        part.from_pretrained(folder / "model") for part in (Blip2ForConditionalGeneration, Blip2Processor)
    )
    samples = read_aokvqa(folder / "aokvqa.json", folder / "images")
    expected = []
    for sample in samples:
        prompt = "Question: what is this? Answer:"
        inputs = processor(images=sample.image, text=prompt, candidates=sample.choices, return_tensors="pt")
        scores = model.eval().score_texts(**inputs, normalization=normalization or "sum")
        expected.append(sample.choices[scores.argmax()])
    found = predictions(tmp_path)
    assert found == [{"question_id": f"22{number}", "multiple_choice": text} for number, text in enumerate(expected)]
    right = 100 * sum(text in sample.answers for text, sample in zip(expected, samples, strict=True)) / 4
    assert capsys.readouterr().out.splitlines()[2] == f"| overall | 4 | {right:.2f} |"
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert settings["normalization"] == (normalization or "sum") and settings["generate_kwargs"] == {}
    monkeypatch.setattr("blip2_hf.evaluation.text_prediction.choose_texts", lambda *_: pytest.fail("chosen again"))
    main(command(folder, "aokvqa", tmp_path, *files, *options))
    assert predictions(tmp_path) == found
    other = "mean" if normalization != "mean" else "sum"
    with pytest.raises(SystemExit, match="normalization"):
        main(command(folder, "aokvqa", tmp_path, *files, "--normalization", other))


def test_choices_in_data_of_ones_own(folder, tmp_path, capsys):
    """The answer is a choice or its number; the number of choices may differ."""
    rows = [
        {"image": make_image(0), "question": "A bus?", "answer": "yes", "options": ["yes", "no"]},
        {"image": make_image(1), "question": "Which?", "answer": "a dog", "options": ["a bus", "a dog", "the sky"]},
    ]
    for name, answers in (("texts", ["yes", "a dog"]), ("numbers", [0, 1])):
        own = [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]
        datasets.Dataset.from_list(own).to_parquet(tmp_path / f"{name}.parquet")
        data = ["--data", tmp_path / f"{name}.parquet", "--choices-column", "options"]
        main(command(folder, "multiple-choice", tmp_path / name, *data))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == lines[5] and lines[2].startswith("| overall | 2 |")
    chosen = predictions(tmp_path / "numbers")
    assert all(prediction["multiple_choice"] in row["options"] for prediction, row in zip(chosen, rows, strict=True))


def test_choices_that_do_not_fit(opt, tmp_path):
    def sample(**fields):
        return QuestionSample(
            **{"image": make_image(0), "image_id": 0, "question_id": 1, "question": "What?"} | fields
        )

    with pytest.raises(ValueError, match="has no choices, one of which"):
        evaluate_multiple_choice(*opt, [sample(answers=[])], tmp_path)
    with pytest.raises(ValueError, match="choice 'a <image>' has '<image>', a special token"):
        evaluate_multiple_choice(*opt, [sample(answers=[], choices=["a <image>", "b"])], tmp_path)
    for choices, message in (
        (["a"], "at least two texts"),
        (["a", " "], "at least two texts"),
        (["a", 2], "a text was"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(answers=[], choices=choices)
    with pytest.raises(ValueError, match="the answer 'c' is none of the choices"):
        sample(answers=["c"], choices=["a", "b"])


def test_pope_by_the_command(folder, tmp_path, capsys, monkeypatch):
    """Two files in one table. The model says yes to all but the second question, and once neither yes nor no."""
    answer_with(monkeypatch, "yes", "no", "Yes.", "a dog", "yes")
    files = ["--questions", *(folder / f"coco_pope_{name}.json" for name in ("random", "popular"))]
    main(command(folder, "pope", tmp_path, *files, "--images", folder / "images"))
    assert capsys.readouterr().out.splitlines() == [
        "| pope (protocol pope) | samples | accuracy | precision | recall | f1 | yes_ratio | unclear_ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        "| coco_pope_popular | 3 | 66.67 | 66.67 | 100.00 | 80.00 | 100.00 | 33.33 |",
        "| coco_pope_random | 2 | 100.00 | 100.00 | 100.00 | 100.00 | 50.00 | 0.00 |",
        "| overall | 5 | 80.00 | 75.00 | 100.00 | 85.71 | 80.00 | 20.00 |",
    ]
    assert predictions(tmp_path)[2] == {"question_id": "coco_pope_popular/1", "answer": "Yes."}


def test_yes_and_no_in_data_of_ones_own(folder, tmp_path, capsys, monkeypatch):
    answer_with(monkeypatch, "no", "yes")
    rows = [
        {"image": make_image(i), "question": "A bus?", "answer": ("yes", "no")[i], "kind": "ab"[i]} for i in (0, 1)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    data = ["--data", tmp_path / "rows.parquet", "--group-column", "kind", "--protocol", "pope"]
    main(command(folder, "vqa", tmp_path / "out", *data))
    assert "| overall | 2 | 0.00 | 0.00 | 0.00 | 0.00 | 50.00 | 0.00 |" in capsys.readouterr().out


def test_chair_by_the_command(folder, tmp_path, capsys, monkeypatch):
    """The second picture has no objects; that it has dogs is told by its captions."""
    files = ["--annotations", folder / "captions_val2014.json", "--instances", folder / "instances_val2014.json"]
    files += ["--images", folder / "images"]
    answer_with(monkeypatch, "a man and a dog on a bus", "two puppies")
    main(command(folder, "chair", tmp_path, *files, "--synonyms", folder / "synonyms.txt"))
    assert capsys.readouterr().out.splitlines() == [
        "| chair | samples | CHAIRs | CHAIRi | object_recall |",
        "|---|---:|---:|---:|---:|",
        "| overall | 2 | 50.00 | 25.00 | 100.00 |",
    ]
    assert [prediction["invented"] for prediction in predictions(tmp_path)] == [["dog"], []]
    words = synonyms_file(tmp_path / "words.txt", "person\ndog\n")
    # The folder has no weights: they are not asked for
    with pytest.raises(
        SystemExit, match=r"^blip2-hf: .*captions_val2014.json, images\[0\] has the object 'bus', which"
    ):
        main(command(folder, "chair", tmp_path, *files, "--synonyms", words, "--model", folder / "config"))


def test_the_commands_protocols(folder, tmp_path, capsys, monkeypatch):
    assert {*ANSWER_PROTOCOLS} == {*_VQA_PROTOCOLS, *_GQA_PROTOCOLS, *_YES_NO_PROTOCOLS}
    files = ["--images", folder / "images", "--limit", 1]
    gqa = ["--questions", folder / "gqa.json", *files]
    vqa = ["--questions", folder / "questions.json", "--annotations", folder / "annotations.json", *files]
    scores = {}
    for task, options in (("gqa", gqa), ("vqav2", vqa), ("vqa", ["--data", folder / "rows.parquet", "--limit", 1])):
        answer_with(monkeypatch, "No." if task == "gqa" else "A bus.")
        for protocol in _GQA_PROTOCOLS if task == "gqa" else _VQA_PROTOCOLS:
            if task != "vqa" or protocol == "exact":
                main(command(folder, task, tmp_path / task, *options, "--protocol", protocol))
                results = json.loads((tmp_path / task / "results.json").read_text())
                assert results["settings"]["protocol"] == protocol
                assert f"{task} (protocol {protocol})" in capsys.readouterr().out
                ((scores[task, protocol]),) = results["scores"].values()
    assert scores == {
        ("gqa", "normalized"): 1,
        ("gqa", "strict"): 0,
        ("vqav2", "official"): 0,
        ("vqav2", "lavis"): 1,
        ("vqav2", "exact"): 1,
        ("vqa", "exact"): 1,
    }


def test_the_commands_lemmas(folder, tmp_path, capsys, monkeypatch, spacy):
    answer_with(monkeypatch, "dogs", "bus")
    annotations = json.loads((folder / "annotations.json").read_text())
    for annotation in annotations["annotations"]:
        annotation["answers"] = [{"answer": "dog"}] * 10
    files = ["--questions", folder / "questions.json", "--annotations", write(tmp_path / "a.json", annotations)]
    files += ["--images", folder / "images"]
    for task, options, score in (
        ("okvqa", [], 0.5),
        ("okvqa", ["--no-lemmatize"], 0),
        ("vqav2", ["--lemmatize"], 0.5),
    ):
        main(command(folder, task, tmp_path / task, *files, *options))
        assert json.loads((tmp_path / task / "results.json").read_text())["scores"] == {"vqa_accuracy": score}
        assert ("lemmatized" in capsys.readouterr().out) == (score > 0)
    monkeypatch.setitem(sys.modules, "spacy", None)
    load_lemmatizer.cache_clear()
    # The folder has no weights: they are not asked for
    with pytest.raises(SystemExit, match="^blip2-hf: spaCy is not installed.*blip2-hf.okvqa.*--no-lemmatize"):
        main(command(folder, "okvqa", tmp_path / "x", *files, "--model", folder / "config"))


def test_the_commands_presets(folder, tmp_path):
    files = ["--annotations", folder / "nocaps.json", "--images", folder / "images"]
    options = [
        *files,
        "--preset",
        "caption",
        "--generate",
        "num_beams=1",
        "--prompt",
        "",
        "--dtype",
        "bfloat16",
        "--image-size",
        42,
    ]
    main(command(folder, "nocaps", tmp_path, *options))
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert (settings["preset"], settings["prompt"], settings["dtype"]) == ("caption", "", "bfloat16")
    assert settings["generate_kwargs"]["min_new_tokens"] == 7
    assert settings["image_size"] == {"height": 42, "width": 42}


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("nocaps", [], "nocaps needs --annotations and --images"),
        ("caption", ["--data", "x", "--questions", "y"], "caption has no use for --questions"),
        ("retrieval", ["--data", "x", "--preset", "vqa"], "retrieval has no use for --preset"),
        ("nocaps", ["--annotations", "x", "--images", ".", "--split", "val"], "nocaps has no use for --split"),
        ("gqa", ["--questions", "x", "--images", ".", "--group-column", "y"], "gqa has no use for --group-column"),
        ("caption", ["--data", "x", "--image-id-column", "y"], "caption has no use for --image-id-column"),
        ("gqa", ["--questions", "nothing.json", "--images", "."], "There is no file nothing.json"),
        ("gqa", ["--questions", "x", "y", "--images", "."], "gqa takes one file of --questions, and 2 were given"),
        ("pope", ["--questions", "x", "--images", ".", "--split", "val"], "pope has no use for --split"),
        (
            "pope",
            ["--questions", "x", "--images", ".", "--protocol", "exact"],
            "exact: pope is scored by one of pope.",
        ),
        ("chair", ["--annotations", "x"], "chair needs --instances and --synonyms and --images"),
        ("coco-caption", ["--annotations", "x", "--images", ".", "--synonyms", "y"], "has no use for --synonyms"),
        (
            "retrieval",
            ["--data", "x", "--k", "-1"],
            "argument --k: '-1' was given, a whole number of at least 0 was expected",
        ),
        (
            "vqa",
            ["--data", "x", "--batch-size", "0"],
            "argument --batch-size: '0' was given, a whole number of at least 1",
        ),
        ("caption", ["--data", "x", "--protocol", "exact"], "caption has no use for --protocol"),
        ("retrieval", ["--data", "x", "--no-lemmatize"], "retrieval has no use for --lemmatize"),
        ("vqa", ["--data", "x", "--protocol", "strict"], "strict: vqa is scored by one of official, lavis, exact"),
    ],
)
def test_options_that_do_not_fit(folder, tmp_path, task, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command(folder, task, tmp_path, *options))
    assert message in f"{stopped.value}{capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("task", "model", "options", "message"),
    [
        ("retrieval", "headless", [], "headless lacks 2 weights .*A model for retrieval"),
        ("retrieval", "model", [], "has not learned to match images with texts"),
        ("caption", "retrieval", [], "retrieval is a model for retrieval .*, which has no language model"),
        ("caption", "nosuch", [], "nosuch"),
        ("caption", "model", ["--generate", "num_beam=2"], r"no argument 'num_beam' of generate .*num_beams\?"),
        # The folder has no weights: they are not asked for
        ("vqa", "config", ["--preset", "caption"], "'caption' has no {} for the question"),
        ("caption", "config", ["--prompt", "{}?"], "'caption' asks a question"),
        ("vqa", "config", ["--protocol", "official"], r"question 0 has too few answers \(1\): .*protocol='exact'"),
    ],
)
def test_models_that_do_not_fit(folder, tmp_path, task, model, options, message):
    data = ["--data", folder / "rows.parquet", "--model", folder / model]
    with pytest.raises(SystemExit, match=f"^blip2-hf: .*{message}"):
        main(command(folder, task, tmp_path, *data, *options))


def test_a_setting_of_generation_that_is_none(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(command(folder, "caption", tmp_path, "--data", "x", "--generate", "num_beams"))
    assert "'num_beams': NAME=VALUE was expected" in capsys.readouterr().err


def run_commands(commands: list[list[str]]):
    """Run commands one after another, each of which would end the process group."""
    PartialState.destroy_process_group = lambda self: None
    for arguments in commands:
        main(arguments)
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(folder, tmp_path):
    files = ["--annotations", folder / "dataset_coco.json", "--images", folder / "images"]
    tasks = {"coco-caption": [*files, *FAST], "coco-retrieval": [*files, "--k", 3]}
    for task, options in tasks.items():
        main(command(folder, task, tmp_path / task / "one", *options))
    arguments = [command(folder, task, tmp_path / task / "two", *options) for task, options in tasks.items()]
    first, _ = run(run_commands, arguments, folder=tmp_path, processes=2)
    tables = ""
    for task in tasks:
        one, two = (json.loads((tmp_path / task / name / "results.json").read_text()) for name in ("one", "two"))
        assert (one["run"]["num_processes"], two["run"]["num_processes"]) == (1, 2)
        assert one["scores"] == two["scores"] and one["settings"] == two["settings"]
        assert predictions(tmp_path / task / "one") == predictions(tmp_path / task / "two")
        tables += (tmp_path / task / "two" / "table.md").read_text()
    assert first.stdout == tables
    assert len(list((tmp_path / "coco-caption" / "two" / "parts").glob("part-*.jsonl"))) == 2
