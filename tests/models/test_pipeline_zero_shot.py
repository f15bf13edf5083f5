"""pipeline("zero-shot-image-classification"), with BLIP-2 and with the models that it was made for."""

import logging

import pytest
import torch
import transformers
from stage1 import STAGE1_QFORMER, make_stage1
from tiny import make_config, make_image, make_image_processor, make_model, randomize
from transformers import AutoModelForZeroShotImageClassification, pipeline
from transformers import Blip2ForImageTextRetrieval as TransformersRetrieval
from transformers import pipelines as transformers_pipelines

from blip2_hf import Blip2ForImageTextRetrieval, Blip2Processor
from blip2_hf._registration import register_pipelines
from blip2_hf.models.image_loading import ImageLoadError
from blip2_hf.models.pipeline_zero_shot import ZeroShotImageClassificationPipeline


TASK = "zero-shot-image-classification"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "this", "is", "a", "photo", "of", "."]
WORDS += ["cat", "dog", "red", "bus", "picture", "two"]
LABELS = ["cat", "red bus", "two dog", "dog", "bus"]
TEMPLATE = "a picture of a {}"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    tasks = transformers_pipelines.PIPELINE_REGISTRY.supported_tasks
    monkeypatch.setitem(tasks, TASK, tasks[TASK])
    register_pipelines()


def make_tokenizer():
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def make_retrieval():
    config = make_config(None, qformer_config=dict(STAGE1_QFORMER), image_token_index=None)
    model = randomize(Blip2ForImageTextRetrieval(config), std=0.3)
    with torch.no_grad():
        model.temperature.weight.fill_(0.1)
    return model.eval()


@pytest.fixture(scope="module", params=[make_retrieval, make_stage1])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    request.param().save_pretrained(path)
    Blip2Processor(make_image_processor(), make_tokenizer()).save_pretrained(path)
    return path


def obvious_scores(folder, images, texts, reranked=False):
    """Each picture with each text, one at a time."""
    model = Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
    processor = Blip2Processor.from_pretrained(folder)
    logits = torch.empty(len(images), len(texts))
    for i, image in enumerate(images):
        pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
        for j, text in enumerate(texts):
            ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                cosine = model(pixel_values, ids).logits_per_image[0, 0]
                matching = model(pixel_values, ids, use_image_text_matching_head=True).logits_per_image[0, 1]
            logits[i, j] = cosine + matching if reranked else cosine / model.temperature.weight
    return logits.softmax(dim=1)


def assert_scores(results, expected, labels=LABELS):
    assert len(results) == len(expected)
    for result, scores in zip(results, expected, strict=True):
        assert [entry["score"] for entry in result] == sorted((e["score"] for e in result), reverse=True)
        found = {entry["label"]: entry["score"] for entry in result}
        torch.testing.assert_close(torch.tensor([found[label] for label in labels]), scores, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reranked", [False, True])
def test_scores_are_those_of_the_obvious_computation(folder, reranked):
    images = [make_image(seed) for seed in range(3)]
    expected = obvious_scores(folder, images, [TEMPLATE.replace("{}", label) for label in LABELS], reranked)
    assert expected.std(dim=1).min() > 0.005
    classifier = pipeline(TASK, model=str(folder), device="cpu")
    assert type(classifier) is ZeroShotImageClassificationPipeline
    options = {"candidate_labels": LABELS, "hypothesis_template": TEMPLATE, "reranked": reranked}
    for batch_size in (1, 2):
        assert_scores(classifier(images, batch_size=batch_size, **options), expected)
    assert_scores([classifier(images[1], **options)], expected[1:2])
    assert_scores(list(classifier((image for image in images), batch_size=2, **options)), expected)


def test_many_labels_are_matched_some_at_a_time(folder, monkeypatch):
    images, texts = [make_image(0), make_image(1)], [TEMPLATE.replace("{}", label) for label in LABELS]
    monkeypatch.setattr("blip2_hf.models.pipeline_zero_shot._PAIRS_AT_A_TIME", 4)
    classifier = pipeline(TASK, model=str(folder), device="cpu", hypothesis_template=TEMPLATE, reranked=True)
    results = classifier(images, candidate_labels=LABELS, batch_size=2)
    assert_scores(results, obvious_scores(folder, images, texts, reranked=True))


def test_the_template_of_transformers_is_the_default(folder):
    texts = [f"This is a photo of {label}." for label in LABELS]
    classifier = pipeline(TASK, model=str(folder), device="cpu")
    assert_scores([classifier(make_image(), candidate_labels=LABELS)], obvious_scores(folder, [make_image()], texts))
    given = classifier(make_image(), candidate_labels=texts, hypothesis_template="{}")
    assert_scores([given], obvious_scores(folder, [make_image()], texts), texts)


def test_labels_are_read_once_and_images_go_through_the_tower_once(folder, monkeypatch):
    classifier = pipeline(TASK, model=str(folder), device="cpu")
    calls = []
    for name in ("get_text_features", "get_image_embeds", "get_image_key_values"):
        method = getattr(classifier.model, name)

        def count(*args, name=name, method=method, **kwargs):
            calls.append(name)
            return method(*args, **kwargs)

        monkeypatch.setattr(classifier.model, name, count)
    classifier([make_image(seed) for seed in range(4)], candidate_labels=LABELS, batch_size=2, reranked=True)
    # Two batches; keys and values once for contrast, and once for matching
    assert sorted(calls) == ["get_image_embeds"] * 2 + ["get_image_key_values"] * 4 + ["get_text_features"]


def test_a_model_given_as_an_object(caplog):
    model, processor = make_stage1().eval(), Blip2Processor(make_image_processor(), make_tokenizer())
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        classifier = pipeline(TASK, model=model, **parts)
    finally:
        logger.removeHandler(caplog.handler)
    assert "not supported" not in caplog.text
    assert len(classifier(make_image(), candidate_labels=["cat"])) == 1


@pytest.mark.parametrize("reranked", [False, True])
def test_padding_on_the_left_and_labels_that_spell_special_tokens(folder, reranked):
    options = {"candidate_labels": [*LABELS, "[SEP] cat"], "reranked": reranked, "hypothesis_template": TEMPLATE}
    classifier = pipeline(TASK, model=str(folder), device="cpu")
    expected = classifier(make_image(), **options)
    classifier.tokenizer.padding_side = "left"
    found = classifier(make_image(), **options)
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], rel=1e-4)
    labels = classifier._encode(**options)
    assert labels.input_ids[-1].eq(classifier.tokenizer.sep_token_id).sum() == 1


def test_half_precision(folder):
    classifier = pipeline(TASK, model=str(folder), device="cpu", dtype=torch.bfloat16)
    exact = pipeline(TASK, model=str(folder), device="cpu", dtype=torch.float32)
    images = [make_image(seed) for seed in range(3)]
    options = {"candidate_labels": LABELS, "hypothesis_template": TEMPLATE}
    for found, expected in zip(classifier(images, **options), exact(images, **options), strict=True):
        expected = {entry["label"]: entry["score"] for entry in expected}
        assert all(abs(entry["score"] - expected[entry["label"]]) < 0.1 for entry in found)


def test_what_does_not_fit(folder):
    classifier = pipeline(TASK, model=str(folder), device="cpu")
    for labels in ([], None, "cat"):
        with pytest.raises(ValueError, match="a list of one or more labels was expected"):
            classifier(make_image(), candidate_labels=labels)
    with pytest.raises(ValueError, match="'a picture'.*where the label goes"):
        classifier(make_image(), candidate_labels=LABELS, hypothesis_template="a picture")
    with pytest.raises(ImageLoadError, match="missing.png"):
        classifier("missing.png", candidate_labels=LABELS)
    with pytest.raises(ValueError, match="does not compare images with texts"):
        pipeline(TASK, model=make_model(), tokenizer=make_tokenizer(), image_processor=make_image_processor())


@pytest.mark.parametrize("reranked", [False, True])
def test_checkpoints_of_transformers(tmp_path, reranked):
    torch.manual_seed(0)
    make_retrieval().save_pretrained(tmp_path, transformers_compatible=True)
    Blip2Processor(make_image_processor(), make_tokenizer()).save_pretrained(tmp_path)
    assert type(AutoModelForZeroShotImageClassification.from_pretrained(tmp_path)) is TransformersRetrieval
    classifier = pipeline(TASK, model=str(tmp_path), device="cpu", hypothesis_template=TEMPLATE, reranked=reranked)
    assert isinstance(classifier.model, Blip2ForImageTextRetrieval)
    assert classifier.model.temperature.weight.item() == pytest.approx(0.07)
    images, texts = [make_image(0), make_image(1)], [TEMPLATE.replace("{}", label) for label in LABELS]
    expected = obvious_scores(tmp_path, images, texts, reranked)
    assert expected.std(dim=1).min() > 0.005
    assert_scores(classifier(images, candidate_labels=LABELS), expected)
    half = pipeline(TASK, model=str(tmp_path), device="cpu", dtype=torch.float16).model
    assert half.dtype == torch.float16
    assert half.qformer.dtype == half.query_tokens.weight.dtype == torch.float32


def test_models_that_have_not_learned_to_compare(tmp_path):
    parts = {"tokenizer": make_tokenizer(), "image_processor": make_image_processor()}
    stage2 = make_model(qformer_config=dict(STAGE1_QFORMER))
    for name, compatible in {"ours": False, "theirs": True}.items():
        stage2.save_pretrained(tmp_path / name, transformers_compatible=compatible)
        with pytest.raises(ValueError, match=f"{name} has not learned .* its vision_projection"):
            pipeline(TASK, model=str(tmp_path / name), **parts)
    lacks_matching = make_retrieval()
    torch.nn.init.zeros_(lacks_matching.itm_head.bias)
    with pytest.raises(ValueError, match="This model has not learned .* its itm_head"):
        pipeline(TASK, model=lacks_matching, **parts)
    with torch.device("meta"):
        on_disk = TransformersRetrieval(make_retrieval().config.to_transformers())
    with pytest.raises(ValueError, match="not in memory: give the pipeline what"):
        pipeline(TASK, model=on_disk, **parts)


def test_long_labels_are_cut_to_the_positions_of_the_q_former(folder):
    positions = STAGE1_QFORMER["max_position_embeddings"]
    long, cut = " ".join(["cat"] * 60), " ".join(["cat"] * (positions - 2))
    classifier = pipeline(TASK, model=str(folder), device="cpu", hypothesis_template="{}")
    for reranked in (False, True):
        found = {
            entry["label"]: entry["score"]
            for entry in classifier(make_image(), candidate_labels=[long, cut, "cat cat"], reranked=reranked)
        }
        assert found[long] == pytest.approx(found[cut], rel=1e-4)
        assert found[long] != pytest.approx(found["cat cat"], rel=1e-2)
    short = classifier(make_image(), candidate_labels=[long, "cat"], tokenizer_kwargs={"max_length": 3})
    assert short[0]["score"] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["blip2", "clip"])
def test_images_and_labels_given_in_other_ways(name):
    model = make_retrieval() if name == "blip2" else make_other(name)
    parts = {"model": model, "tokenizer": make_tokenizer(), "image_processor": make_image_processor()}
    parts["tokenizer"].model_input_names = ["input_ids", "attention_mask"]
    plain, with_labels = pipeline(TASK, **parts), pipeline(TASK, candidate_labels=LABELS, **parts)
    image = make_image()
    expected = plain(image, LABELS)
    assert len(expected) == len(LABELS)
    assert plain(images=image, candidate_labels=LABELS) == expected
    assert plain(images=[image], candidate_labels=LABELS) == [expected]
    assert with_labels(image) == with_labels(images=image) == expected
    assert with_labels(image, candidate_labels=LABELS[:2]) == plain(image, LABELS[:2])
    assert with_labels(image) == expected
    with pytest.raises(ValueError, match="a list of one or more labels was expected"):
        plain(image)
    with pytest.raises(ValueError, match="without an images argument"):
        with_labels()


def make_other(name):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 64}
    ids = {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    if name == "clip":
        config = transformers.CLIPConfig(text_config={**text, **ids}, vision_config=vision, projection_dim=8)
        return transformers.CLIPModel(config).eval()
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)).eval()


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_other_models_are_served_as_before(name):
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"] if name == "clip" else ["input_ids"]
    parts = {"model": make_other(name), "tokenizer": tokenizer, "image_processor": make_image_processor()}
    ours = pipeline(TASK, **parts)
    own = pipeline(TASK, pipeline_class=transformers_pipelines.ZeroShotImageClassificationPipeline, **parts)
    assert type(own) is not type(ours) is ZeroShotImageClassificationPipeline
    images = [make_image(seed) for seed in range(3)]
    for options in ({}, {"batch_size": 2}, {"hypothesis_template": TEMPLATE}):
        assert ours(images, candidate_labels=LABELS, **options) == own(images, candidate_labels=LABELS, **options)
    assert ours(images[0], candidate_labels=LABELS) == own(images[0], candidate_labels=LABELS)
    with pytest.raises(ValueError, match="reranked is for BLIP-2"):
        ours(images, candidate_labels=LABELS, reranked=True)


def test_nothing_else_of_the_task_changes():
    entry = transformers_pipelines.PIPELINE_REGISTRY.supported_tasks[TASK]
    register_pipelines()
    assert transformers_pipelines.PIPELINE_REGISTRY.supported_tasks[TASK] == entry
    assert entry["pt"] == (AutoModelForZeroShotImageClassification,)
    assert entry["default"]["model"][0] == "openai/clip-vit-base-patch32"
    assert entry["type"] == "multimodal"
