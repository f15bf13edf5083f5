"""Prompts, questions, prefixes and shared pictures become batches that a language model learns from."""

import copy

import datasets
import numpy as np
import pytest
import torch
import transformers
from tiny import NUM_QUERIES, make_image, make_image_processor, make_model, make_processor
from torch.utils.data import DataLoader

from blip2_hf import Blip2Processor
from blip2_hf.data import (
    BadRowError,
    ImageTextCollator,
    ImageTextPairs,
    ImageTextStream,
    LanguageModelCollator,
    RandomResizedCropAndFlip,
    cache_features,
    check_pairs,
    load_cached_features,
    read_cached_features,
)
from blip2_hf.models.image_loading import ImageLoadError


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "colour", "is", "the", "bus", "dog", "?", "a", "photo"]
QUESTIONS = ["What colour is the bus?", "Where is the (big) dog?", "How many people?", "Is it raining?"]
ANSWERS = [["red", "blue"], ["on the grass"], ["two", "three", "4."], ["no"]]
CAPTIONS = ["A dog on the grass.", "Two people riding a bike", "a woman holding an umbrella", "clouds"]
VQA = {"text_column": "answers", "prompt": "Question: {} Answer:", "prompt_column": "question"}


def make_rows():
    columns = zip(QUESTIONS, ANSWERS, CAPTIONS, strict=True)
    return [
        {"image": make_image(i), "question": question, "answers": answers, "caption": caption}
        for i, (question, answers, caption) in enumerate(columns)
    ]


@pytest.fixture(scope="module")
def dataset():
    return datasets.Dataset.from_list(make_rows())


@pytest.fixture(scope="module")
def shared():
    """Eight questions on three pictures, and the pictures."""
    numbers = [2, 0, 0, 1, 2, 2, 1, 0]
    rows = [{"picture": n, "question": f"number {i}?", "answers": f"answer {i}"} for i, n in enumerate(numbers)]
    pictures = datasets.Dataset.from_list([{"jpg": make_image(10 + i)} for i in range(3)])
    return datasets.Dataset.from_list(rows), pictures, numbers


@pytest.fixture(scope="module", params=["opt", "t5"])
def parts(request):
    """A model and its processor."""
    torch.manual_seed(0)
    return make_model(request.param), make_processor(request.param == "t5")


def make_batch(pairs, collator):
    return collator([pairs[i] for i in range(len(pairs))])


def labels_of(batch, processor):
    return [processor.tokenizer.decode(row[row != -100]).strip() for row in batch["labels"]]


def prompts_of(batch, processor):
    """What stands before the labels, without placeholders and padding."""
    texts = []
    for i, ids in enumerate(batch["input_ids"]):
        keep = batch["attention_mask"][i].bool() & (ids != processor.image_token_id)
        if not processor.is_encoder_decoder:
            keep &= batch["labels"][i] == -100
        texts.append(processor.tokenizer.decode(ids[keep], skip_special_tokens=True))
    return texts


def test_a_fixed_prompt(dataset):
    pairs = ImageTextPairs(dataset, prompt="a photo of")
    plain = ImageTextPairs(dataset)
    assert [pairs[i]["prompt"] for i in range(4)] == ["a photo of"] * 4
    assert [pairs[i]["text"] for i in range(4)] == [plain[i]["text"] for i in range(4)]
    assert "prompt" not in plain[0]


def test_a_question_goes_into_the_prompt(dataset):
    item = ImageTextPairs(dataset, **VQA)[1]
    assert item["prompt"] == "Question: where is the big dog? Answer:"
    assert item["text"] == "on the grass"
    as_it_is = ImageTextPairs(dataset, clean_text=False, **VQA)[1]
    assert as_it_is["prompt"] == "Question: Where is the (big) dog? Answer:"
    # Braces of a question are no place for anything
    rows = [{"image": make_image(), "question": "what is {}?", "answers": "a"}]
    assert ImageTextPairs(rows, **VQA)[0]["prompt"] == "Question: what is {}? Answer:"


def test_a_prompt_changes_nothing_that_is_drawn(dataset):
    options = {"text_column": "answers", "transform": RandomResizedCropAndFlip(16), "clean_text": False}
    plain, asked = ImageTextPairs(dataset, **options), ImageTextPairs(dataset, **(options | VQA))
    for epoch in range(5):
        for pairs in (plain, asked):
            pairs.set_epoch(epoch)
        for i in range(4):
            assert plain[i]["text"] == asked[i]["text"]
            np.testing.assert_array_equal(np.asarray(plain[i]["image"]), np.asarray(asked[i]["image"]))


def test_prompts_that_do_not_fit(dataset):
    for kind in (ImageTextPairs, ImageTextStream):
        source = dataset if kind is ImageTextPairs else dataset.to_iterable_dataset()
        with pytest.raises(ValueError, match="no prompt_column was given"):
            kind(source, prompt="Question: {} Answer:")
        for prompt in (None, "a photo of"):
            with pytest.raises(ValueError, match="has no place"):
                kind(source, prompt=prompt, prompt_column="question")
        with pytest.raises(ValueError, match="no column 'asked'.*question"):
            kind(source, prompt="{}", prompt_column="asked")
        with pytest.raises(ValueError, match="the picture stands in front"):
            kind(source, prompt="<image> a photo of")


@pytest.mark.parametrize("prompt", [None, "a photo of", "a photo of "])
def test_prefixes(prompt, dataset):
    pairs = ImageTextPairs(dataset, prefix_lm=True, prompt=prompt)
    whole = [ImageTextPairs(dataset)[i]["text"] for i in range(4)]
    splits = set()
    for epoch in range(20):
        pairs.set_epoch(epoch)
        for i in range(4):
            prefix, text = pairs[i]["prompt"], pairs[i]["text"]
            assert prefix.startswith((prompt or "").rstrip()) and text
            prefix = prefix[len((prompt or "").rstrip()) :].strip()
            assert (f"{prefix} {text}" if prefix else text) == whole[i]
            splits.add((i, prefix))
    assert len(splits) == sum(len(text.split()) for text in whole)
    pairs.set_epoch(0)
    first = [pairs[i]["prompt"] for i in range(4)]
    assert [item["prompt"] for item in DataLoader(pairs, batch_size=None, num_workers=2)] == first


def test_evaluation_splits_nothing(dataset):
    for prompt in (None, "a photo of"):
        item = ImageTextPairs(dataset, prefix_lm=True, prompt=prompt, train=False)[1]
        assert (item["prompt"], item["text"]) == (prompt or "", "two people riding a bike")


def test_a_stream_has_the_same_items(dataset):
    for options in (VQA, {"prefix_lm": True, "prompt": "a photo of"}):
        pairs, stream = ImageTextPairs(dataset, **options), ImageTextStream(dataset.to_list(), **options)
        for item, expected in zip(stream, (pairs[i] for i in range(4)), strict=True):
            assert {n: v for n, v in item.items() if n != "image"} == {
                n: v for n, v in expected.items() if n != "image"
            }


def test_rows_that_share_pictures(shared):
    rows, pictures, numbers = shared
    pairs = ImageTextPairs(rows, image_column="picture", images=pictures, images_column="jpg", **VQA)
    assert len(pairs) == 8
    for i, number in enumerate(numbers):
        item = pairs[i]
        np.testing.assert_array_equal(np.asarray(item["image"]), np.asarray(pictures[number]["jpg"]))
        assert (item["image_id"], item["text"]) == (number, f"answer {i}")
    named = ImageTextPairs(rows, image_column="picture", images=pictures, images_column="jpg", source="vqa", **VQA)
    ids = [named[i]["image_id"] for i in range(8)]
    assert all((ids[i] == ids[j]) == (numbers[i] == numbers[j]) for i in range(8) for j in range(8))
    assert not set(ids) & set(numbers)


def test_shared_pictures_are_cropped_for_each_row(shared):
    rows, pictures, _ = shared
    options = {"image_column": "picture", "images_column": "jpg", "transform": RandomResizedCropAndFlip(16)}
    pairs = ImageTextPairs(rows, images=pictures, **options, **VQA)
    assert len({np.asarray(pairs[i]["image"]).tobytes() for i in range(8)}) == 8
    # As if each row had the picture itself
    own = [row | {"picture": pictures[row["picture"]]["jpg"]} for row in rows.to_list()]
    own = ImageTextPairs(own, image_column="picture", transform=options["transform"], **VQA)
    for i in range(8):
        np.testing.assert_array_equal(np.asarray(pairs[i]["image"]), np.asarray(own[i]["image"]))


def test_rows_that_share_features(shared, tmp_path):
    rows, pictures, numbers = shared
    model, processor = make_model("opt").float(), make_processor()
    folder = cache_features(
        pictures, model, processor, tmp_path, "jpg", views=2, transform=RandomResizedCropAndFlip(28), dtype="float32"
    )
    cached = load_cached_features(folder)
    pairs = ImageTextPairs(rows, image_column="picture", images=cached, **VQA)
    alone = [read_cached_features(cached[number]) for number in range(3)]
    views = set()
    for epoch in range(6):
        pairs.set_epoch(epoch)
        for i, number in enumerate(numbers):
            item = pairs[i]
            assert item["image_id"] == number and "image" not in item
            views.add((number, torch.equal(item["image_embeds"], alone[number])))
    assert views == {(number, is_first) for number in range(3) for is_first in (False, True)}
    # Rows of one picture read one place in the file
    held_out = ImageTextPairs(rows, image_column="picture", images=cached, train=False, **VQA)
    assert held_out[1]["image_embeds"].data_ptr() == held_out[2]["image_embeds"].data_ptr()
    assert held_out[1]["image_embeds"].data_ptr() != held_out[0]["image_embeds"].data_ptr()
    loader = DataLoader(held_out, batch_size=None, num_workers=2)
    assert all(torch.equal(x["image_embeds"], alone[n]) for x, n in zip(loader, numbers, strict=True))
    with pytest.raises(ValueError, match="features in place of pictures"):
        ImageTextPairs(rows, images=cached, image_column="picture", transform=RandomResizedCropAndFlip(28), **VQA)
    with pytest.raises(ValueError, match="ImageTextStream"):
        ImageTextPairs(rows, images=cached.to_iterable_dataset(), image_column="picture", **VQA)


def test_rows_that_share_features_of_which_one_was_left_out(shared, tmp_path):
    rows, pictures, numbers = shared
    broken = [{"jpg": {"bytes": b"no picture", "path": None}}] + [{"jpg": pictures[i]["jpg"]} for i in (1, 2)]
    features = datasets.Features({"jpg": datasets.Image()})
    pictures = datasets.Dataset.from_list([broken[0]], features=features)
    pictures = datasets.concatenate_datasets([pictures, datasets.Dataset.from_list(broken[1:], features=features)])
    model = make_model("opt").float()
    cached = load_cached_features(
        cache_features(pictures, model, make_processor(), tmp_path, "jpg", dtype="float32", skip_broken=True)
    )
    assert cached["image_embeds_row"] == [1, 2]
    pairs = ImageTextPairs(rows, image_column="picture", images=cached, **VQA)
    for i, number in enumerate(numbers):
        if number == 0:
            with pytest.raises(ImageLoadError, match="has 0 in column 'picture'.*left out"):
                pairs[i]
        else:
            item = pairs[i]
            assert item["image_id"] == number
            assert torch.equal(item["image_embeds"], read_cached_features(cached[number - 1]))


def test_a_batch_is_what_the_processor_makes(parts, dataset):
    _, processor = parts
    pairs = ImageTextPairs(dataset, train=False, **VQA)
    items = [pairs[i] for i in range(4)]
    batch = LanguageModelCollator(processor)(items)
    expected = processor(
        images=[item["image"] for item in items],
        text=[item["prompt"] for item in items],
        text_target=[item["text"] for item in items],
        return_tensors="pt",
    )
    assert set(batch) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(batch[name], values, rtol=0, atol=0)


def test_what_is_learned_and_what_is_masked(parts, dataset):
    model, processor = parts
    pairs = ImageTextPairs(dataset, train=False, **VQA)
    batch = make_batch(pairs, LanguageModelCollator(processor))
    assert labels_of(batch, processor) == ["red</s>", "on the grass</s>", "two</s>", "no</s>"]
    assert prompts_of(batch, processor) == [pairs[i]["prompt"] for i in range(4)]
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [NUM_QUERIES] * 4
    loss = model(**batch).loss
    # The loss is the mean over the labels of all rows, each row alone
    alone = [LanguageModelCollator(processor)([pairs[i]]) for i in range(4)]
    counts = torch.tensor([(one["labels"] != -100).sum() for one in alone])
    losses = torch.stack([model(**one).loss for one in alone])
    torch.testing.assert_close(loss, (losses * counts).sum() / counts.sum(), rtol=1e-4, atol=1e-5)


def test_texts_without_a_prompt_and_prefixes(parts, dataset):
    model, processor = parts
    batch = make_batch(ImageTextPairs(dataset, train=False), LanguageModelCollator(processor))
    captions = ["a dog on the grass", "two people riding a bike", *CAPTIONS[2:]]
    assert labels_of(batch, processor) == [f"{caption}</s>" for caption in captions]
    assert prompts_of(batch, processor) == [""] * 4
    batch = make_batch(ImageTextPairs(dataset, prefix_lm=True), LanguageModelCollator(processor))
    joined = zip(prompts_of(batch, processor), labels_of(batch, processor), strict=True)
    assert [f"{prefix} {suffix}".strip() for prefix, suffix in joined] == [f"{caption}</s>" for caption in captions]
    assert any(prompts_of(batch, processor)) and model(**batch).loss.isfinite()


def test_stored_features_take_the_place_of_pictures(parts, dataset):
    model, processor = parts
    pairs = ImageTextPairs(dataset, train=False, **VQA)
    items = [pairs[i] for i in range(4)]
    pictures = LanguageModelCollator(processor)(items)
    with torch.no_grad():
        features = model.get_image_embeds(pictures["pixel_values"])
    for item, image_embeds in zip(items, features, strict=True):
        del item["image"]
        item["image_embeds"] = image_embeds
    stored = LanguageModelCollator(processor)(items)
    assert set(stored) == set(pictures) - {"pixel_values"} | {"image_embeds"}
    for name in set(stored) & set(pictures):
        torch.testing.assert_close(stored[name], pictures[name], rtol=0, atol=0)
    torch.testing.assert_close(model(**stored).loss, model(**pictures).loss)
    with pytest.raises(ValueError, match="1 of the 2 rows.*features"):
        LanguageModelCollator(processor)([items[0], pairs[1]])


def test_a_processor_without_placeholders(dataset):
    processor = make_processor(num_query_tokens=None)
    model = make_model("opt", image_token_index=None)
    rows = [{"image": make_image(), "question": "is <image> a bus?", "answers": "a <image>"}]
    batch = make_batch(ImageTextPairs(rows, **VQA), LanguageModelCollator(processor))
    assert processor.image_token_id not in batch["input_ids"]
    assert model(**batch).loss.isfinite()


def test_a_text_that_spells_a_special_token(parts):
    model, processor = parts
    rows = [{"image": make_image(), "question": "what is <image> </s>?", "answers": "a <image> <s> b</s>"}]
    pairs = ImageTextPairs(rows, **VQA)
    batch = LanguageModelCollator(processor)([pairs[0]])
    assert (batch["input_ids"] == processor.image_token_id).sum() == NUM_QUERIES
    ids = batch["labels"][batch["labels"] != -100].tolist()
    assert ids.count(processor.tokenizer.eos_token_id) == 1 and ids[-1] == processor.tokenizer.eos_token_id
    assert processor.tokenizer.decode(ids).strip() == "a <image> <s> b</s></s>"
    assert model(**batch).loss.isfinite()
    # The tokenizer is left as it was
    assert processor.tokenizer("<image>")["input_ids"].count(processor.image_token_id) == 1


def test_long_texts_are_cut_before_the_end_token(parts, dataset):
    _, processor = parts
    pairs = ImageTextPairs(dataset, prompt="a photo of", train=False)
    max_length = 6 if processor.is_encoder_decoder else 12
    whole = make_batch(pairs, LanguageModelCollator(processor))
    cut = make_batch(pairs, LanguageModelCollator(processor, max_length=max_length))
    lengths = []
    for i in range(4):
        long, short = (batch["labels"][i][batch["labels"][i] != -100].tolist() for batch in (whole, cut))
        num_others = int(cut["attention_mask"][i].sum()) - NUM_QUERIES - len(short)
        room = max_length if processor.is_encoder_decoder else max_length - num_others
        assert len(short) == min(len(long), room)
        assert short[-1] == processor.tokenizer.eos_token_id and short[:-1] == long[: len(short) - 1]
        lengths.append((len(short), len(long)))
    assert any(short < long for short, long in lengths)


def test_rows_with_nothing_left_to_learn(dataset):
    collator = LanguageModelCollator(make_processor(), max_length=6)
    with pytest.raises(BadRowError, match=r"^row 1 has nothing left to learn: max_length=6 cuts.*where is") as error:
        collator([ImageTextPairs(dataset, **VQA)[1]])
    assert (error.value.row, error.value.kind) == (1, "nothing to learn")
    with pytest.raises(BadRowError, match="^row 3 of vqa has nothing"):
        LanguageModelCollator(make_processor(True), max_length=1)([ImageTextPairs(dataset, source="vqa", **VQA)[3]])
    # Items of another maker
    with pytest.raises(BadRowError, match="^row 1 of the batch has nothing"):
        items = [{"image": make_image(), "text": "a"}, {"image": make_image(), "text": "a", "prompt": "b c d e f g"}]
        collator(items)


def test_rows_that_the_model_has_no_room_for(parts):
    _, processor = parts
    rows = [{"image": make_image(), "caption": " ".join(["dog"] * n)} for n in (3, 20)]
    pairs = ImageTextPairs(rows, prompt="a photo of")
    lengths = []
    for i in range(2):
        batch = LanguageModelCollator(processor)([pairs[i]])
        num_labels, num_inputs = int((batch["labels"] != -100).sum()), int(batch["attention_mask"].sum())
        lengths.append(max(num_labels, num_inputs) if processor.is_encoder_decoder else num_inputs)
    exact = LanguageModelCollator(processor, max_positions=lengths[1])
    assert make_batch(pairs, exact)["labels"].shape[0] == 2
    with pytest.raises(BadRowError, match=f"^row 1 takes {lengths[1]} positions, .* has {lengths[1] - 1}") as error:
        make_batch(pairs, LanguageModelCollator(processor, max_positions=lengths[1] - 1))
    assert (error.value.row, error.value.kind) == (1, "text too long")
    # Cut texts fit
    cut = LanguageModelCollator(processor, max_length=lengths[1] - 1 - NUM_QUERIES, max_positions=lengths[1] - 1)
    assert make_batch(pairs, cut)["labels"].shape[0] == 2


@pytest.fixture
def qformer_processor():
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=7)
    return make_processor(qformer_tokenizer=tokenizer)


def test_the_qformer_reads_in_training_what_it_reads_in_use(qformer_processor, dataset):
    pairs = ImageTextPairs(dataset, train=False, **VQA)
    batch = make_batch(pairs, LanguageModelCollator(qformer_processor))
    used = qformer_processor(images=[make_image()] * 4, text=[item["prompt"] for item in pairs], return_tensors="pt")
    for name in ("qformer_input_ids", "qformer_attention_mask"):
        torch.testing.assert_close(batch[name], used[name])
    assert batch["qformer_input_ids"].shape == (4, batch["qformer_attention_mask"].sum(1).max())


def test_questions_that_the_qformer_has_no_room_for(qformer_processor):
    rows = [{"image": make_image(), "question": " ".join(["dog"] * n), "answers": "a"} for n in (1, 9)]
    pairs = ImageTextPairs(rows, **VQA)
    length = int(make_batch(pairs, LanguageModelCollator(qformer_processor))["qformer_attention_mask"][1].sum())
    assert make_batch(pairs, LanguageModelCollator(qformer_processor, max_qformer_positions=length))
    collator = LanguageModelCollator(qformer_processor, max_qformer_positions=length - 1)
    with pytest.raises(BadRowError, match=f"^row 1 has a prompt of {length} .* has {length - 1} positions") as error:
        make_batch(pairs, collator)
    assert (error.value.row, error.value.kind) == (1, "text too long")
    assert [row.row for row in check_pairs(pairs, collator, show_progress=False)] == [1]
    # Without text for the Q-Former there is nothing to count
    assert make_batch(pairs, LanguageModelCollator(make_processor(), max_qformer_positions=1))


def test_a_question_that_spells_a_separator(qformer_processor, dataset):
    rows = [{"image": make_image(), "question": "is [SEP] the [CLS] bus", "answers": "a"}]
    collator = LanguageModelCollator(qformer_processor)
    ids = make_batch(ImageTextPairs(rows, clean_text=False, **VQA), collator)["qformer_input_ids"][0].tolist()
    separator, start = WORDS.index("[SEP]"), WORDS.index("[CLS]")
    assert (ids.count(separator), ids.count(start), ids[0], ids[-1]) == (1, 1, start, separator)
    # Where it is given to the processor alone, it stays what it is
    ids = qformer_processor(text="is [SEP]", return_tensors="pt")["qformer_input_ids"][0].tolist()
    assert ids.count(separator) == 2


def test_batches_that_lack_something(dataset):
    collator = LanguageModelCollator(make_processor())
    for name in ("image", "text"):
        item = {k: v for k, v in ImageTextPairs(dataset)[0].items() if k != name}
        with pytest.raises(ValueError, match=f"{name}.*remove_unused_columns"):
            collator([item])


def test_stage_one_takes_no_notice(dataset):
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    collator = ImageTextCollator(Blip2Processor(make_image_processor(), tokenizer))
    plain = make_batch(ImageTextPairs(dataset, train=False, text_column="answers"), collator)
    asked = make_batch(ImageTextPairs(dataset, train=False, **VQA), collator)
    assert set(asked) == {"pixel_values", "input_ids", "attention_mask", "image_ids"}
    for name, values in plain.items():
        torch.testing.assert_close(asked[name], values, rtol=0, atol=0)


def test_trainer_learns_the_answers(parts, dataset, tmp_path):
    model, processor = copy.deepcopy(parts[0]), parts[1]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=12,
        learning_rate=5e-3,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    pairs = ImageTextPairs(dataset, train=False, **VQA)
    collator = LanguageModelCollator(processor)
    before = model(**make_batch(pairs, collator)).loss.item()
    transformers.Trainer(model, arguments, train_dataset=pairs, data_collator=collator).train()
    after = model.eval()(**make_batch(pairs, collator)).loss.item()
    assert after < before - 0.05
