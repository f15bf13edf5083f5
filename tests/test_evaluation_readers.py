"""Small files in the formats of the benchmarks' authors, and data sets by the names of their columns."""

import json

import datasets
import pytest
from tiny import make_image

from blip2_hf.evaluation.readers import (
    read_caption_rows,
    read_gqa,
    read_karpathy,
    read_nocaps,
    read_question_rows,
    read_vqa,
)
from blip2_hf.evaluation.samples import open_sample_image


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def make_pictures(folder, *names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(seed).save(folder / name)
    return folder


def karpathy_entry(number, split, **fields):
    filename = f"COCO_val2014_{number:012d}.jpg"
    sentences = [{"tokens": ["a", "dog"], "raw": f"A dog, {number}.{i}", "imgid": 0, "sentid": i} for i in range(2)]
    entry = {"filepath": "val2014", "sentids": [0, 1], "filename": filename, "imgid": 0, "split": split}
    return {**entry, "sentences": sentences, "cocoid": number, **fields}


def test_coco_in_karpathys_split(tmp_path):
    entries = [karpathy_entry(number, split) for number, split in ((391895, "test"), (7, "train"), (9, "restval"))]
    path = write(tmp_path / "dataset_coco.json", {"images": entries, "dataset": "coco"})
    names = [f"val2014/COCO_val2014_{number:012d}.jpg" for number in (391895, 7)]
    images = make_pictures(tmp_path / "coco", *names, "COCO_val2014_000000000009.jpg")
    (sample,) = read_karpathy(path, images)
    assert (sample.image_id, sample.captions) == (391895, ["A dog, 391895.0", "A dog, 391895.1"])
    assert sample.image == str(images / names[0])
    assert open_sample_image(sample).size == (40, 30)
    # The rest of the validation set is learned from; its picture lies in the folder itself
    assert [sample.image_id for sample in read_karpathy(path, images, "train")] == [7, 9]
    with pytest.raises(ValueError, match="no split 'dev'; its splits are .*'restval': 1"):
        read_karpathy(path, images, "dev")


def test_flickr30k_in_karpathys_split(tmp_path):
    entry = karpathy_entry(0, "test", filename="1007129816.jpg")
    del entry["filepath"], entry["cocoid"]
    path = write(tmp_path / "dataset_flickr30k.json", {"images": [entry], "dataset": "flickr30k"})
    (sample,) = read_karpathy(path, make_pictures(tmp_path / "flickr30k-images", "1007129816.jpg"))
    assert sample.image_id == "1007129816" and len(sample.captions) == 2


def nocaps_file(path, **fields):
    images = [
        {"id": number, "file_name": f"00{number}.jpg", "open_images_id": f"00{number}", "domain": domain}
        for number, domain in enumerate(("in-domain", "out-domain"))
    ]
    annotations = [{"id": i, "image_id": i % 2, "caption": f"A bus {i}."} for i in range(4)]
    return write(path, {"licenses": [], "info": {}, "images": images, "annotations": annotations, **fields})


def test_nocaps(tmp_path):
    images = make_pictures(tmp_path / "val", "000.jpg", "001.jpg")
    samples = read_nocaps(nocaps_file(tmp_path / "nocaps_val_4500_captions.json"), images)
    assert [sample.group for sample in samples] == ["in-domain", "out-domain"]
    assert [sample.captions for sample in samples] == [["A bus 0.", "A bus 2."], ["A bus 1.", "A bus 3."]]
    # The captions of its test set are secret
    content = json.loads((tmp_path / "nocaps_val_4500_captions.json").read_text())
    del content["annotations"]
    secret = read_nocaps(write(tmp_path / "nocaps_test_image_info.json", content), images)
    assert [sample.captions for sample in secret] == [[], []]
    with pytest.raises(ValueError, match="image 1 has no caption"):
        read_nocaps(nocaps_file(tmp_path / "x.json", annotations=[{"image_id": 0, "caption": "A bus."}]), images)


def vqa_files(folder, subtype="val2014"):
    questions = [
        {"image_id": 42, "question": "What is this?", "question_id": 42000 + number, "extra": 0} for number in range(2)
    ]
    answers = [{"answer": "bus", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    annotations = [
        {"question_type": "what", "question_id": 42000 + number, "image_id": 42, "answer_type": kind}
        | {"multiple_choice_answer": "bus", "answers": answers}
        for number, kind in ((1, "other"), (0, "yes/no"))  # in another order
    ]
    head = {"info": {}, "data_type": "mscoco", "license": {}, "data_subtype": subtype}
    return (
        write(folder / "questions.json", {**head, "task_type": "Open-Ended", "questions": questions}),
        write(folder / "annotations.json", {**head, "annotations": annotations}),
    )


def test_vqav2_and_ok_vqa(tmp_path):
    questions, annotations = vqa_files(tmp_path)
    images = make_pictures(tmp_path / "val2014", "COCO_val2014_000000000042.jpg")
    samples = read_vqa(questions, images, annotations)
    assert [(sample.question_id, sample.group) for sample in samples] == [(42000, "yes/no"), (42001, "other")]
    assert samples[0].question == "What is this?" and samples[0].answers == ["bus"] * 10
    assert [sample.image_id for sample in samples] == [42, 42]
    del (content := json.loads(annotations.read_text()))["annotations"][1]
    with pytest.raises(ValueError, match="no answer to question 42000"):
        read_vqa(questions, images, write(annotations, content))


def test_test_dev_of_vqav2_is_about_pictures_of_test2015(tmp_path):
    questions, _ = vqa_files(tmp_path, "test-dev2015")
    images = make_pictures(tmp_path / "coco", "test2015/COCO_test2015_000000000042.jpg")
    sample = read_vqa(questions, images)[0]
    assert sample.image.endswith("COCO_test2015_000000000042.jpg") and sample.answers == []


def test_gqa(tmp_path):
    entry = {"semantic": [], "imageId": "n161313", "question": "Is it overcast?", "answer": "no", "isBalanced": True}
    path = write(tmp_path / "testdev_balanced_questions.json", {"201307251": entry})
    (sample,) = read_gqa(path, make_pictures(tmp_path / "images", "n161313.jpg"))
    assert (sample.question_id, sample.image_id, sample.answers) == ("201307251", "n161313", ["no"])


def test_files_that_are_not_what_they_should_be(tmp_path):
    questions, annotations = vqa_files(tmp_path)
    images = make_pictures(tmp_path / "images", "000.jpg")
    with pytest.raises(FileNotFoundError, match="lacks 2 pictures, the first of them val2014/COCO_val2014_0000000000"):
        read_vqa(questions, images, annotations)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        read_vqa(questions, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no file .*nothing.json"):
        read_gqa(tmp_path / "nothing.json", images)
    with pytest.raises(ValueError, match="has no 'questions'.*'annotations'.*right file"):
        read_vqa(annotations, images)
    with pytest.raises(ValueError, match="has no 'images'"):
        read_karpathy(questions, images)
    with pytest.raises(ValueError, match="has no 'imageId' in its 'info'"):
        read_gqa(questions, images)
    with pytest.raises(ValueError, match="questions by their id were expected, but 'images' has \\[\\]"):
        read_gqa(write(tmp_path / "captions.json", {"images": []}), images)
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="half.json is no JSON"):
        read_nocaps(tmp_path / "half.json", images)
    entry = karpathy_entry(0, "test", sentences=[{"tokens": ["a"]}])
    with pytest.raises(ValueError, match="has no 'raw' in its 'sentences'"):
        read_karpathy(write(tmp_path / "k.json", {"images": [entry]}), images)


def test_captions_in_a_data_set():
    rows = [{"picture": make_image(i), "text": f"number {i}", "name": "ab"[i // 2]} for i in range(3)]
    dataset = datasets.Dataset.from_list(rows)
    samples = read_caption_rows(dataset, "picture", "text")
    assert [(sample.image_id, sample.captions) for sample in samples] == [(i, [f"number {i}"]) for i in range(3)]
    assert open_sample_image(samples[2]).tobytes() == make_image(2).tobytes()
    together = read_caption_rows(dataset, "picture", "text", id_column="name")
    assert [(s.image_id, s.captions) for s in together] == [("a", ["number 0", "number 1"]), ("b", ["number 2"])]
    lists = dataset.map(lambda row: {"text": [row["text"], "another"]}, remove_columns="text")
    assert read_caption_rows(lists, "picture", "text")[1].captions == ["number 1", "another"]
    with pytest.raises(ValueError, match="no column 'image'.*'picture'"):
        read_caption_rows(dataset)
    with pytest.raises(ValueError, match="row 0, column 'caption': a text or a list of texts was expected, got None"):
        read_caption_rows([{"image": make_image(0), "caption": None}])


def test_questions_in_a_data_set():
    answers = [{"answer": "bus", "answer_id": 1}, {"answer": "a bus", "answer_id": 2}]
    rows = [{"image": make_image(i), "question": "What?", "answers": answers, "id": 10 + i} for i in range(2)]
    dataset = datasets.Dataset.from_list([{**row, "image_id": 5, "kind": "other"} for row in rows])
    names = {"id_column": "id", "image_id_column": "image_id", "group_column": "kind"}
    sample = read_question_rows(dataset, answer_column="answers", **names)[1]
    assert (sample.question_id, sample.image_id, sample.group) == (11, 5, "other")
    assert sample.answers == ["bus", "a bus"]
    plain = read_question_rows([{**rows[0], "answer": "bus"}])[0]
    assert (plain.question_id, plain.image_id, plain.answers, plain.group) == (0, 0, ["bus"], None)
    with pytest.raises(ValueError, match="row 0, column 'question': a question was expected, got ''"):
        read_question_rows([{**rows[0], "question": "", "answer": "bus"}])
    with pytest.raises(ValueError, match="no rows"):
        read_question_rows([])
