"""Small files in the formats of the benchmarks' authors, and data sets by the names of their columns."""

import json

import datasets
import pytest
from benchmark_files import (
    aokvqa_file,
    coco_files,
    karpathy_entry,
    karpathy_file,
    make_pictures,
    nocaps_file,
    pope_entries,
    pope_file,
    synonyms_file,
    vqa_files,
    write,
)
from tiny import make_image

from blip2_hf.evaluation.readers import (
    read_aokvqa,
    read_caption_rows,
    read_coco_objects,
    read_gqa,
    read_karpathy,
    read_nocaps,
    read_pope,
    read_question_rows,
    read_synonyms,
    read_vqa,
)
from blip2_hf.evaluation.samples import CaptionSample, open_sample_image


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
    lacking = nocaps_file(tmp_path / "x.json", annotations=[{"image_id": 0, "caption": "A bus."}])
    assert [sample.captions for sample in read_nocaps(lacking, images)] == [["A bus."], []]
    with pytest.raises(ValueError, match="y.json: no 'image_id' of its annotations is an 'id' of its images"):
        read_nocaps(nocaps_file(tmp_path / "y.json", annotations=[{"image_id": "0", "caption": "A bus."}]), images)


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


def test_aokvqa(tmp_path):
    images = make_pictures(tmp_path / "coco", "val2017/000000000042.jpg", "000000000007.jpg")
    path = aokvqa_file(
        tmp_path / "aokvqa_v1p0_val.json", {}, {"image_id": 7, "split": "train", "correct_choice_idx": 2}
    )
    first, second = read_aokvqa(path, images)
    assert first.image == str(images / "val2017/000000000042.jpg") and second.image == str(images / "000000000007.jpg")
    assert (first.question_id, first.question, first.answers) == ("220", "What is this?", ["bus"])
    assert second.choices == ["bus", "dog", "two people", "sky"] and second.answers == ["two people"]
    # As in the file of test
    path = aokvqa_file(tmp_path / "test.json", {"correct_choice_idx": ..., "direct_answers": ...})
    assert [sample.answers for sample in read_aokvqa(path, images)] == [[]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ...}, r"\[0\] has no 'choices'"),
        ({"choices": "bus"}, "'choices' is 'bus'; a list was expected"),
        ({"choices": ["bus"]}, "at least two texts were expected"),
        ({"correct_choice_idx": 4}, "the answer is choice 4, and there are 4, numbered from 0"),
        ({"correct_choice_idx": -1}, "the answer is choice -1"),
        ({"image_id": "x"}, "a number was expected, that of the file"),
        ({"question": ...}, r"\[0\] has no 'question'"),
    ],
)
def test_entries_of_aokvqa_that_can_not_be_right(tmp_path, change, message):
    images = make_pictures(tmp_path / "coco", "val2017/000000000042.jpg")
    with pytest.raises(ValueError, match=message):
        read_aokvqa(aokvqa_file(tmp_path / "a.json", change), images)


def test_pope_in_several_files(tmp_path):
    images = make_pictures(tmp_path / "coco", "val2014/COCO_val2014_000000000042.jpg", "n1.jpg")
    files = [pope_file(tmp_path / f"coco_pope_{name}.json", {}, {"label": "No"}) for name in ("random", "popular")]
    files += [pope_file(tmp_path / "gqa.json", {"image": "n1.jpg"})]
    samples = read_pope(files, images)
    assert [(sample.question_id, sample.group, sample.answers) for sample in samples] == [
        ("coco_pope_random/1", "coco_pope_random", ["yes"]),
        ("coco_pope_random/2", "coco_pope_random", ["no"]),
        ("coco_pope_popular/1", "coco_pope_popular", ["yes"]),
        ("coco_pope_popular/2", "coco_pope_popular", ["no"]),
        ("gqa/1", "gqa", ["yes"]),
    ]
    assert samples[1].question == "Is there a dog in the image?"
    assert [sample.image for sample in samples[3:]] == [
        str(images / "val2014" / "COCO_val2014_000000000042.jpg"),
        str(images / "n1.jpg"),
    ]
    # One file, with an empty line in it, and pictures in the folder itself
    files[0].write_text(files[0].read_text().replace("\n", "\n\n"))
    assert len(read_pope(files[0], make_pictures(tmp_path, "COCO_val2014_000000000042.jpg"))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "maybe"}, "entry 2: 'label' is 'maybe'; yes or no was expected"),
        ({"label": True}, "entry 2: 'label' is True; a text was expected"),
        ({"label": ...}, "entry 2 has no 'label', but .*'question_id', 'text'"),
        ({"text": ...}, "entry 2 has no 'text'"),
        ({"text": " "}, "entry 2: question is ' '; a question was expected"),
        ({"image": 42}, "entry 2: 'image' is 42; a text was expected"),
        ({"question_id": None}, "entry 2: 'question_id' is None"),
        ({"question_id": 1}, r"entry 1 and .*entry 2 have the same id, and each needs its own \('pope/1'\)"),
    ],
)
def test_entries_of_pope_that_can_not_be_right(tmp_path, change, message):
    images = make_pictures(tmp_path / "images", "COCO_val2014_000000000042.jpg")
    with pytest.raises(ValueError, match=f"pope.json, {message}"):
        read_pope(pope_file(tmp_path / "pope.json", {}, change), images)


def test_files_that_are_not_popes(tmp_path):
    images = make_pictures(tmp_path / "images", "COCO_val2014_000000000042.jpg")
    questions, _ = vqa_files(tmp_path)
    with pytest.raises(ValueError, match=r"questions.json, entry 1 has no 'question_id', but \['data_subtype'"):
        read_pope(questions, images)
    with pytest.raises(ValueError, match="list.json, line 1: an object of JSON was expected, got .*the right file"):
        read_pope(write(tmp_path / "list.json", pope_entries({})), images)
    file = pope_file(tmp_path / "pope.json", {}, {})
    file.write_text(file.read_text()[:-30])
    with pytest.raises(ValueError, match="pope.json, line 2 can't be read as JSON"):
        read_pope(file, images)
    file.write_text("")
    with pytest.raises(ValueError, match="pope.json is empty. Is it the right file"):
        read_pope(file, images)
    with pytest.raises(FileNotFoundError, match="no file .*ppoe.json"):
        read_pope(tmp_path / "ppoe.json", images)
    with pytest.raises(FileNotFoundError, match="lacks 1 pictures, .* val2014/COCO_val2014_000000000043"):
        read_pope(pope_file(tmp_path / "p.json", {"image": "COCO_val2014_000000000043.jpg"}), images)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="p.json and .*other/p.json have the same name"):
        read_pope([pope_file(tmp_path / name, {}) for name in ("p.json", "other/p.json")], images)


def test_objects_and_captions_of_coco(tmp_path):
    images = make_pictures(tmp_path / "coco", *(f"val2014/COCO_val2014_{number:012d}.jpg" for number in (7, 9)))
    captions, instances = coco_files(tmp_path)
    samples = read_coco_objects(captions, instances, images)
    assert [(sample.image_id, sample.captions, sample.objects) for sample in samples] == [
        (7, ["A bus.", "A bus."], ["bus", "person"]),
        (9, ["Two dogs play.", "Two dogs play."], []),
    ]
    with pytest.raises(ValueError, match="captions_val2014.json is COCO's own file, which has no split 'test'"):
        read_coco_objects(captions, instances, images, "test")
    # Karpathy's split, of whose pictures each file knows some
    entries = [karpathy_entry(number, split) for number, split in ((7, "test"), (9, "val"), (11, "val"))]
    karpathy = write(tmp_path / "dataset_coco.json", {"images": entries})
    assert [sample.objects for sample in read_coco_objects(karpathy, instances, images)] == [["bus", "person"]]
    make_pictures(images, "COCO_val2014_000000000011.jpg")
    with pytest.raises(ValueError, match=r"instances_val2014.json: there is no picture 11, that of .*images\[2\]"):
        read_coco_objects(karpathy, instances, images, "val")
    content = json.loads(instances.read_text()) | {"images": [{"id": 11}], "annotations": []}
    content["annotations"] = [{"image_id": 11, "category_id": 20}]
    more = write(tmp_path / "more.json", content)
    found = read_coco_objects(karpathy, [instances, more], images, "val")
    assert [sample.objects for sample in found] == [[], ["dog"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instances": {"category_id": ...}}, r"annotations\[0\] has no 'category_id'"),
        ({"instances": {"category_id": 90}}, r"annotations\[0\]: there is no image 7, or no category 90, in the file"),
        ({"instances": {"image_id": 8}}, r"annotations\[0\]: there is no image 8"),
        ({"categories": [{"id": 10, "name": None}]}, r"categories\[0\]: 'name' is None; a text was expected"),
        ({"categories": None}, "'categories' is None; a list was expected"),
        ({"images": [{"file_name": "x"}]}, r"images\[0\] has no 'id'"),
    ],
)
def test_instances_that_can_not_be_right(tmp_path, change, message):
    images = make_pictures(tmp_path / "coco", *(f"COCO_val2014_{number:012d}.jpg" for number in (7, 9)))
    captions, instances = coco_files(tmp_path, **change)
    with pytest.raises(ValueError, match=f"instances_val2014.json.*{message}"):
        read_coco_objects(captions, instances, images)
    with pytest.raises(ValueError, match="captions_val2014.json has no 'categories', but .*right file"):
        read_coco_objects(captions, captions, images)


def test_words_of_objects(tmp_path):
    file = synonyms_file(tmp_path / "synonyms.txt", "person, man,  woman \n\nhot dog,\nteddy bear, iPhone\n")
    assert read_synonyms(file) == [["person", "man", "woman"], ["hot dog"], ["teddy bear", "iPhone"]]
    captions, _ = coco_files(tmp_path)
    with pytest.raises(ValueError, match="captions_val2014.json, line 1 has .*; the words of an object with commas"):
        read_synonyms(captions)
    file.write_bytes(b"dog, puppy\n\xff\xfe, cat\n")
    with pytest.raises(ValueError, match="synonyms.txt, line 2 has .*with commas between them were expected"):
        read_synonyms(file)
    with pytest.raises(ValueError, match="synonyms.txt is empty; the words of an object"):
        read_synonyms(synonyms_file(file, " \n"))
    with pytest.raises(FileNotFoundError, match="no file .*words.txt"):
        read_synonyms(tmp_path / "words.txt")


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
    with pytest.raises(ValueError, match="questions.json, 'info' has no 'imageId'"):
        read_gqa(questions, images)
    with pytest.raises(ValueError, match="captions.json, 'images' is .*; questions by their id were expected"):
        read_gqa(write(tmp_path / "captions.json", {"images": []}), images)
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="half.json is no JSON"):
        read_nocaps(tmp_path / "half.json", images)
    entry = karpathy_entry(0, "test", sentences=[{"tokens": ["a"]}])
    with pytest.raises(ValueError, match=r"k.json, images\[0\].sentences\[0\] has no 'raw', but \['tokens'\]"):
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
    empty = [{"image": make_image(i), "caption": text} for i, text in enumerate(["", " \n", ["", "a bus"], ["", " "]])]
    assert [sample.captions for sample in read_caption_rows(empty)] == [[], [], ["a bus"], []]
    with pytest.raises(ValueError, match="no column 'image'.*'picture'"):
        read_caption_rows(dataset)
    with pytest.raises(ValueError, match="row 0, column 'caption' is None; a text was expected"):
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
    for answer, found in ((" ", []), (["", ""], []), (["", "bus"], ["", "bus"])):
        assert read_question_rows([{**rows[0], "answer": answer}])[0].answers == found
    with pytest.raises(ValueError, match="row 0: question is ''; a question was expected"):
        read_question_rows([{**rows[0], "question": "", "answer": "bus"}])
    with pytest.raises(ValueError, match="no rows"):
        read_question_rows([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentences": [{"raw": "A dog."}, {"raw": None}]}, r"\.sentences\[1\]: 'raw' is None; a text was expected"),
        ({"sentences": [{"raw": 2}]}, r"\.sentences\[0\]: 'raw' is 2; a text was expected. Write numbers as texts"),
        ({"sentences": [{"raw": "A \ud800 dog."}]}, r"\.sentences\[0\]: 'raw' is .*a lone surrogate \('\\ud800'\)"),
        ({"sentences": ["A dog."]}, r"\.sentences\[0\] has no 'raw', but 'A dog.'"),
        ({"sentences": None}, ": 'sentences' is None; a list was expected"),
        ({"sentences": ...}, " has no 'sentences', but "),
        ({"filename": None}, ": 'filename' is None; a text was expected"),
        ({"filepath": 7}, ": 'filepath' is 7; a text was expected"),
        ({"split": None}, ": 'split' is None; a text was expected"),
        ({"cocoid": None}, ": 'cocoid' is None; an integer or a text was expected"),
        ({"cocoid": " "}, ": 'cocoid' is ' '; an integer or a text was expected"),
        ({"cocoid": 0}, r" have the same id, and each needs its own \(0\)"),
        ({"filename": "COCO_val2014_000000000000.jpg"}, " are about the same picture"),
    ],
)
def test_entries_of_karpathys_split_that_can_not_be_right(tmp_path, change, message):
    path, images = karpathy_file(tmp_path, {}, change)
    with pytest.raises(ValueError, match=rf"k\.json, images\[1\]{message}"):
        read_karpathy(path, images)


def test_files_of_one_name_in_several_folders(tmp_path):
    images = make_pictures(tmp_path / "images", "cats/1.jpg", "dogs/1.jpg", "birds/1.jpg")
    changes = [{"filepath": name, "filename": "1.jpg", "cocoid": ...} for name in ("cats", "dogs", "birds")]
    samples = read_karpathy(karpathy_file(tmp_path, *changes)[0], images)
    assert [sample.image_id for sample in samples] == ["cats/1", "dogs/1", "birds/1"]
    assert [open_sample_image(sample).tobytes() for sample in samples] == [
        open_sample_image(CaptionSample(images / name / "1.jpg", 0, [])).tobytes()
        for name in ("cats", "dogs", "birds")
    ]
    # Of the folders one is not there: its picture is not that of the folder above
    (images / "birds" / "1.jpg").rename(images / "1.jpg")
    (images / "dogs" / "1.jpg").unlink()
    with pytest.raises(ValueError, match=r"images\[1\] and .*images\[2\] are about the same picture"):
        read_karpathy(tmp_path / "k.json", images)


def test_a_picture_without_captions(tmp_path):
    samples = read_karpathy(*karpathy_file(tmp_path, {}, {"sentences": []}))
    assert [len(sample.captions) for sample in samples] == [2, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"annotations": [{"image_id": 0, "caption": None}]}, r"annotations\[0\]: 'caption' is None"),
        ({"annotations": [{"image_id": None, "caption": "A bus."}]}, r"annotations\[0\]: 'image_id' is None"),
        ({"annotations": {}}, "'annotations' is {}; a list was expected"),
        ({"images": [{"id": 0}]}, r"images\[0\] has no 'file_name'"),
        ({"images": [{"id": None, "file_name": "000.jpg"}]}, r"images\[0\]: 'id' is None"),
        ({"images": [{"id": 0, "file_name": f"00{n}.jpg"} for n in "01"]}, r"images\[1\] have the same id"),
        ({"images": [{"id": n, "file_name": "000.jpg"} for n in "01"], "annotations": []}, "about the same picture"),
        ({"images": [{"id": 0, "file_name": "000.jpg", "domain": 5}]}, r"images\[0\]: group is 5"),
    ],
)
def test_entries_of_nocaps_that_can_not_be_right(tmp_path, fields, message):
    images = make_pictures(tmp_path / "val", "000.jpg", "001.jpg")
    with pytest.raises(ValueError, match=rf"nocaps\.json.*{message}"):
        read_nocaps(nocaps_file(tmp_path / "nocaps.json", **fields), images)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("questions", {"question": None}, r"questions\[1\]: 'question' is None; a text was expected"),
        ("questions", {"question": " "}, r"questions\[1\]: question is ' '; a question was expected"),
        ("questions", {"question": "\udcff?"}, r"questions\[1\]: 'question' is .*a lone surrogate"),
        ("questions", {"question_id": None}, r"questions\[1\]: 'question_id' is None"),
        ("questions", {"question_id": 42000}, r"questions\[1\] have the same id"),
        ("questions", {"image_id": "x"}, r"questions\[1\]: 'image_id' is 'x'; a number was expected"),
        ("annotations", {"answers": None}, r"annotations\[1\]: 'answers' is None; a list was expected"),
        ("annotations", {"answers": [{"answer": 2}]}, r"annotations\[1\].answers\[0\]: 'answer' is 2; a text was exp"),
        ("annotations", {"answers": ["bus"]}, r"annotations\[1\].answers\[0\] has no 'answer', but 'bus'"),
        ("annotations", {"question_id": 42001}, r"annotations\[1\]: another entry has the answers to question 42001"),
        ("annotations", {"answer_type": "overall"}, r"questions\[0\]: group is 'overall'"),
    ],
)
def test_entries_of_vqa_that_can_not_be_right(tmp_path, file, change, message):
    files = dict(zip(("questions", "annotations"), vqa_files(tmp_path), strict=True))
    images = make_pictures(tmp_path / "images", "COCO_val2014_000000000042.jpg")
    content = json.loads(files[file].read_text())
    content[file][1] |= change
    write(files[file], content)
    with pytest.raises(ValueError, match=message):
        read_vqa(files["questions"], images, files["annotations"])


def test_a_question_without_answers(tmp_path):
    questions, annotations = vqa_files(tmp_path)
    images = make_pictures(tmp_path / "images", "COCO_val2014_000000000042.jpg")
    content = json.loads(annotations.read_text())
    content["annotations"][1]["answers"] = []
    samples = read_vqa(questions, images, write(annotations, content))
    assert [len(sample.answers) for sample in samples] == [0, 10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, "g.json, '7': 'answer' is 2; a text was expected"),
        ({"answer": None}, "g.json, '7': 'answer' is None; a text was expected"),
        ({"question": 5}, "g.json, '7': 'question' is 5; a text was expected"),
        ({"imageId": None}, "g.json, '7': 'imageId' is None"),
    ],
)
def test_entries_of_gqa_that_can_not_be_right(tmp_path, change, message):
    images = make_pictures(tmp_path / "images", "n1.jpg")
    entry = {"imageId": "n1", "question": "Is it overcast?", "answer": "no"}
    with pytest.raises(ValueError, match=message):
        read_gqa(write(tmp_path / "g.json", {"6": entry, "7": entry | change}), images)


def test_an_id_of_gqa_that_stands_twice(tmp_path):
    entry = json.dumps({"imageId": "n1", "question": "Is it overcast?", "answer": "no"})
    (tmp_path / "g.json").write_text(f'{{"7": {entry}, "7": {entry}}}')
    with pytest.raises(ValueError, match="g.json is no JSON .'7' stands twice in one object"):
        read_gqa(tmp_path / "g.json", make_pictures(tmp_path / "images", "n1.jpg"))


@pytest.mark.parametrize("as_data_set", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": None}, "row 1, column 'caption' is None; a text was expected"),
        ({"captions": ["a dog", None]}, "row 1, column 'captions', entry 1 is None; a text was expected"),
        ({"caption": "\ud800"}, "row 1, column 'caption' is .*a lone surrogate"),
        ({"id": None}, "row 1, column 'id' is None; an integer or a text was expected"),
        ({"id": float("nan")}, "column 'id' is (nan|7.0); an integer or a text was expected"),
    ],
)
def test_rows_of_captions_that_can_not_be_right(change, message, as_data_set):
    row = {"image": make_image(0), "caption": "a dog", "captions": ["a dog"], "id": 7}
    rows = [row, row | change]
    column = "captions" if "captions" in change else "caption"
    if as_data_set and change.get("caption") != "\ud800":  # Arrow refuses it
        rows = datasets.Dataset.from_list(rows)
    with pytest.raises(ValueError, match=message):
        read_caption_rows(rows, caption_column=column, id_column="id")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "row 1, column 'question' is None; a text was expected"),
        ({"answer": 2}, "row 1, column 'answer' is 2; a text was expected. Write numbers as texts"),
        ({"answer": True}, "row 1, column 'answer' is True; a text was expected"),
        ({"answer": [{"text": "bus"}]}, "row 1, column 'answer', entry 0 is {'text': 'bus'}; a text was expected"),
        ({"id": 0}, "row 0 and row 1 have the same id in column 'id'"),
        ({"id": None}, "row 1, column 'id' is None; an integer or a text was expected"),
        ({"image_id": None}, "row 1, column 'image_id' is None; an integer or a text was expected"),
        ({"image": None}, "row 1, column 'image': there is no picture"),
        ({"kind": "overall"}, "row 1: group is 'overall', as all samples together are called"),
    ],
)
def test_rows_of_questions_that_can_not_be_right(change, message):
    row = {"image": make_image(0), "question": "What?", "answer": "bus", "id": 0, "image_id": 5, "kind": "x"}
    with pytest.raises(ValueError, match=message):
        read_question_rows(
            [row, row | {"id": 1} | change], id_column="id", image_id_column="image_id", group_column="kind"
        )
    with pytest.raises(ValueError, match="row 1: The rows have no column 'question'"):
        read_question_rows([row, {"image": row["image"], "answer": "bus"}])


def test_rows_of_one_picture_are_about_the_first():
    """Each row has a picture of its own, which the ids say are the same."""
    rows = [{"image": make_image(i), "question": "What?", "answer": [], "image_id": "abb"[i]} for i in range(3)]
    samples = read_question_rows(datasets.Dataset.from_list(rows), image_id_column="image_id")
    assert [sample.image.row for sample in samples] == [0, 1, 1] and samples[0].answers == []
    # Tensors would be no ids
    rows = [{"image": make_image(i), "caption": "a dog", "image_id": i // 2} for i in range(4)]
    samples = read_caption_rows(datasets.Dataset.from_list(rows).with_format("torch"), id_column="image_id")
    assert [(sample.image_id, len(sample.captions)) for sample in samples] == [(0, 2), (1, 2)]
