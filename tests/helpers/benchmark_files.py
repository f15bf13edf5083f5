"""Small files in the formats of the benchmarks' authors."""

import json

from tiny import make_image


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


def karpathy_file(folder, *changes):
    """Entries of one picture each, with changes to their fields; a field that is `...` is taken out."""
    entries = [karpathy_entry(number, "test") | change for number, change in enumerate(changes)]
    entries = [{name: value for name, value in entry.items() if value is not ...} for entry in entries]
    names = [f"val2014/COCO_val2014_{number:012d}.jpg" for number in range(len(changes))]
    return write(folder / "k.json", {"images": entries}), make_pictures(folder / "images", *names)


def nocaps_file(path, **fields):
    images = [
        {"id": number, "file_name": f"00{number}.jpg", "open_images_id": f"00{number}", "domain": domain}
        for number, domain in enumerate(("in-domain", "out-domain"))
    ]
    annotations = [{"id": i, "image_id": i % 2, "caption": f"A bus {i}."} for i in range(4)]
    return write(path, {"licenses": [], "info": {}, "images": images, "annotations": annotations, **fields})


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


def aokvqa_file(path, *changes):
    """Questions with four choices, with changes to their fields; a field that is `...` is taken out."""
    entries = []
    for number, change in enumerate(changes):
        entry = {"split": "val", "image_id": 42, "question_id": f"22{number}", "question": "What is this?"}
        entry |= {"choices": ["bus", "dog", "two people", "sky"], "correct_choice_idx": number % 4}
        entry |= {"direct_answers": ["bus"] * 10, "difficult_direct_answer": False, "rationales": ["It is long."]}
        entries.append({name: value for name, value in (entry | change).items() if value is not ...})
    return write(path, entries)


def pope_entries(*changes):
    """Questions about two objects in turn, with changes to their fields; a field that is `...` is taken out."""
    entries = []
    for number, change in enumerate(changes):
        text, label = f"Is there a {('bus', 'dog')[number % 2]} in the image?", ("yes", "no")[number % 2]
        entry = {"question_id": number + 1, "image": "COCO_val2014_000000000042.jpg", "text": text, "label": label}
        entries.append({name: value for name, value in (entry | change).items() if value is not ...})
    return entries


def pope_file(path, *changes):
    """Such questions, one on each line."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in pope_entries(*changes)))
    return path


def coco_files(folder, captions=(), instances=(), **fields):
    """
    COCO's captions and instances of two pictures, of which the first has a bus and two people, and the second nothing;
    with other `fields` of instances, and changes to the first entry of its annotations.
    """
    pictures = [{"id": number, "file_name": f"COCO_val2014_{number:012d}.jpg"} for number in (7, 9)]
    texts = [{"id": i, "image_id": 7 + 2 * (i % 2), "caption": ("A bus.", "Two dogs play.")[i % 2]} for i in range(4)]
    categories = [
        {"supercategory": "x", "id": 10 * i, "name": name} for i, name in enumerate(("person", "bus", "dog"))
    ]
    boxes = [{"id": i, "image_id": 7, "category_id": category, "iscrowd": 0} for i, category in enumerate((10, 0, 0))]
    boxes[0] = {name: value for name, value in (boxes[0] | dict(instances)).items() if value is not ...}
    content = {"info": {}, "images": pictures, "annotations": boxes, "categories": categories, **fields}
    return (
        write(folder / "captions_val2014.json", {"images": pictures, "annotations": texts, **dict(captions)}),
        write(folder / "instances_val2014.json", content),
    )


def synonyms_file(path, text="person, man,  woman, people\nbus, minibus\ndog, puppy\nhot dog\n"):
    path.write_text(text)
    return path
