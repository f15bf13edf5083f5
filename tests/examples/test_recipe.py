"""examples/recipe: its settings, its losses, its scores against obvious ones, its tables, and its steps in order."""

import importlib
import json
import math
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from tiny import randomize
from tiny_examples import tiny_examples

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2Processor
from blip2_hf.cli import main
from blip2_hf.data import ImageTextCollator, ImageTextPairs
from blip2_hf.training import Stage1Arguments


TRAIN, TEST = 256, 12
SETTINGS = ("--set", "steps=2", "batch_size=8")
ROWS = [*range(TEST), 0, 1, 1, 2]
SETS = ["seen styles", "new compositions", "new style"]


@pytest.fixture(scope="module", autouse=True)
def examples(tmp_path_factory):
    """The scripts, which are then imported by their names, with few scenes."""
    with tiny_examples(tmp_path_factory.mktemp("cache")) as patch:
        import settings

        patch.setattr(settings, "TRAIN", TRAIN)
        patch.setattr(settings, "TEST", TEST)
        yield patch


def run_script(name: str, *options: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *options])
        importlib.import_module(name).main()


@pytest.fixture(scope="module")
def folder() -> Path:
    """The results of all steps of a seed, trained for two steps each."""
    from settings import FOLDER

    run_script("features")
    run_script("probe")
    for variant in ("start", "full"):
        output = str(FOLDER / "stage1" / f"{variant}-seed0")
        run_script("learn_stage1", "--variant", variant, *SETTINGS, "--output", output)
    run_script("learn_stage2", *SETTINGS, "--output", str(FOLDER / "stage2" / "full-seed0"))
    variant = "question into the Q-Former"
    results = FOLDER / "questions" / f"{variant}-seed0"
    run_script("learn_questions", "--variant", variant, *SETTINGS, "--output", str(results))
    return FOLDER


@pytest.fixture(scope="module")
def stage1(folder) -> tuple[Blip2ForPreTraining, Blip2Processor]:
    """The model of a stage 1, with weights so large that no two scores are nearly equal."""
    place = folder / "stage1" / "full-seed0" / "model"
    torch.manual_seed(0)
    return randomize(Blip2ForPreTraining.from_pretrained(place)).eval(), Blip2Processor.from_pretrained(place)


@pytest.fixture(scope="module")
def scenes(folder) -> datasets.Dataset:
    """Scenes with their features, of which some are there twice."""
    from features import load_scenes

    return load_scenes("seen styles").select(ROWS)


def record(folder: Path, stage: str, variant: str) -> dict:
    return json.loads((folder / stage / f"{variant}-seed0" / "results.json").read_text())


def test_an_ablation_differs_from_the_full_training_in_one_thing():
    from settings import QUESTIONS, STAGE1, STAGE2, START

    def differences(settings, full) -> list[str]:
        return [key for key, value in asdict(settings).items() if value != asdict(full)[key]]

    for name, settings in START.items():
        assert len(differences(settings, START["start"])) == (name != "start"), name
        assert settings.start is None and "itm" not in settings.losses
    for name, settings in STAGE1.items():
        # Losses that are left out, and queries, are those of the start too
        start = differences(START[settings.start], START["start"])
        found = {*differences(settings, STAGE1["full"])} - {"start"} | {*start}
        assert len(found) == (name != "full"), name
        assert {"itc"} <= set(START[settings.start].losses) <= set(settings.losses) <= {"itc", "itm", "itg"}
        assert ("itg" in settings.losses) == ("itg" in START[settings.start].losses)
    for name, settings in STAGE2.items():
        assert settings.stage1 is None or settings.stage1 in STAGE1, name
        assert differences(settings, STAGE2["full"]) in ([], ["stage1"])
    assert [settings.instruct_qformer for settings in QUESTIONS.values()] == [True, False]


def test_settings_on_the_command_line_do_not_overwrite_results(monkeypatch, capsys, tmp_path):
    from training import parse_options

    monkeypatch.setattr(sys, "argv", ["learn.py", "--set", "steps=3"])
    with pytest.raises(SystemExit):
        parse_options("what", ["full"])
    assert "give --output or --validate" in capsys.readouterr().err
    arguments = ["--set", "steps=3", 'losses=["itc"]', "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["learn.py", *arguments])
    options = parse_options("what", ["full", "other"])
    assert options.set == {"steps": 3, "losses": ["itc"]} and options.variant == "full" and options.seed == 0


def test_the_style_of_the_test_is_in_no_set_by_which_settings_are_chosen():
    from features import SETS, STYLES, TEST_STYLE, VALIDATION_STYLE

    styles = {name: set(own) for name, (own, *_) in SETS.items()}
    assert styles["train"] == styles["seen styles"] == styles["new compositions"] == set(STYLES)
    assert styles["new style"] == {TEST_STYLE} and styles["validate new style"] == {VALIDATION_STYLE}
    for name in ("validate train", "validate seen styles"):
        assert styles[name] == set(STYLES) - {VALIDATION_STYLE}
    assert [name for name, (_, _, kind, _) in SETS.items() if kind == "held out"] == ["new compositions"]
    for number in (1, 3):  # the sets that are large, and those that are restyled
        assert [name for name, own in SETS.items() if own[number] in (TRAIN, True)] == ["train", "validate train"]


def test_features_that_are_there_need_no_tower(folder, monkeypatch):
    import features

    monkeypatch.setattr(features, "VisionTower", None)
    train, tests = features.choose_scenes(validate=False)
    assert len(train) == TRAIN and list(tests) == SETS and {*map(len, tests.values())} == {TEST}
    train, tests = features.choose_scenes(validate=True)
    assert features.VALIDATION_STYLE not in train["style"] and list(tests) == ["seen styles", "new style"]
    assert set(tests["new style"]["style"]) == {features.VALIDATION_STYLE}


def test_each_step_writes_its_results_and_its_model(folder):
    stage1, stage2 = record(folder, "stage1", "full"), record(folder, "stage2", "full")
    questions = record(folder, "questions", "question into the Q-Former")
    for found in (stage1, stage2, questions):
        assert list(found["results"]) == SETS and found["computed in"]["dtype"] == "float32"
        assert found["log"][-1]["step"] == 2 and found["seconds"] > 0
    kinds = ["what", "where", "how many", "thing", "relation", "number"]
    assert set(questions["results"]["seen styles"]) == {"right", *kinds}
    assert all(len(own) == TEST for own in stage2["captions"].values())
    model = Blip2ForConditionalGeneration.from_pretrained(folder / "stage2" / "full-seed0" / "model")
    assert model.language_model is not None and model.config.num_query_tokens == 16
    # Commands know the class of the library alone
    config = json.loads((folder / "stage1" / "full-seed0" / "model" / "config.json").read_text())
    assert config["architectures"] == [Blip2ForPreTraining.__name__]
    assert not list(folder.rglob("checkpoint*"))


def test_the_models_work_with_the_commands(folder, tmp_path, capsys, monkeypatch):
    from scenes import STYLES, make_scenes

    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "scene.png"
    make_scenes(STYLES, 1)[0]["image"].save(picture)
    captioner, retriever = (str(folder / stage / "full-seed0" / "model") for stage in ("stage2", "stage1"))
    main(["caption", str(picture), "--model", captioner])
    main(["ask", str(picture), "what is in the picture?", "--model", captioner])
    main(["look", str(picture), "a fox", "--model", retriever, "--output", str(tmp_path / "map.png")])
    main(["index", str(tmp_path), "--model", retriever])
    capsys.readouterr()
    main(["search", "a fox", "--index", str(tmp_path)])
    assert "scene.png" in capsys.readouterr().out and (tmp_path / "map.png").is_file()


@pytest.mark.parametrize(
    "script, options", [("learn_stage1", ("--variant", "full")), ("learn_stage2", ()), ("learn_questions", ())]
)
def test_a_step_whose_model_is_missing_is_named(folder, script, options):
    with pytest.raises(SystemExit, match="-seed7.* does not exist. Run .* first"):
        run_script(script, *options, "--seed", "7")


def test_queries_of_the_start_cannot_be_set_later(folder, tmp_path):
    options = ("--variant", "full", "--set", "num_query_tokens=4", "--output", str(tmp_path))
    with pytest.raises(SystemExit, match="The queries of 'full' are those of 'start'. Set them there."):
        run_script("learn_stage1", *options)


@pytest.mark.parametrize("variant", ["start", "full"])
def test_the_second_training_goes_on_from_the_first_on_twins(variant, folder, tmp_path, monkeypatch):
    import learn_stage1
    from scene_training import LearnsFromTwins

    from blip2_hf.training import Blip2Trainer

    started = []

    def learn(model, pairs, collator, settings, new_parts, seed, place, arguments_class, trainer_class):
        started.append((model.query_tokens.weight.detach().clone(), model.losses, trainer_class))
        raise InterruptedError

    monkeypatch.setattr(learn_stage1, "learn", learn)
    with pytest.raises(InterruptedError):
        run_script("learn_stage1", "--variant", variant, "--output", str(tmp_path))
    ((queries, losses, trainer_class),) = started
    first = Blip2ForPreTraining.from_pretrained(folder / "stage1" / "start-seed0" / "model").query_tokens.weight
    assert torch.equal(queries, first) == (variant == "full")
    assert losses == (("itc", "itm", "itg") if variant == "full" else ("itc", "itg"))
    assert trainer_class is (LearnsFromTwins if variant == "full" else Blip2Trainer)


@pytest.fixture(scope="module")
def batch(stage1, scenes) -> dict[str, torch.Tensor]:
    from scene_training import stack_features

    tokens = stage1[1].tokenizer(scenes["caption"][:6], padding=True, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    return {"image_embeds": stack_features(scenes)[:6], **{name: tokens[name] for name in names}}


@pytest.mark.parametrize("variant", ["full", "no ITG", "no ITM", "random negatives"])
def test_the_loss_is_the_sum_of_the_chosen_ones(variant, batch):
    from learn_stage1 import make_model
    from settings import STAGE1

    settings = STAGE1[variant]
    model = make_model(settings)
    passes = []
    model.qformer.register_forward_hook(lambda *_: passes.append(1))
    outputs = model(**batch)
    expected = sum(outputs[f"loss_{name}"] for name in settings.losses)
    torch.testing.assert_close(outputs.loss, expected)
    # The second pass is that of matching
    assert len(passes) == 1 + ("itm" in settings.losses)
    outputs.loss.backward()
    assert (model.itm_head.weight.grad is not None) == ("itm" in settings.losses)
    assert (model.lm_head.transform.dense.weight.grad is not None) == ("itg" in settings.losses)
    assert model.embeddings.word_embeddings.weight.grad is None


@pytest.mark.parametrize("variant", ["full", "random negatives"])
def test_negatives_are_hard_or_random(variant):
    from learn_stage1 import make_model
    from settings import STAGE1

    logits = torch.tensor([0.0, 2.0, 0.0, 0.0]).repeat(4000, 1)
    is_match = torch.tensor([True, False, False, False]).repeat(4000, 1)
    hardness = 2.0 if variant == "full" else 0.0
    expected = torch.tensor([-math.inf, hardness, 0.0, 0.0]).softmax(dim=0)
    compared = {"logits_per_image": logits, "logits_per_text": logits}
    for index in make_model(STAGE1[variant])._draw_negatives(compared, is_match).values():
        counts = index.bincount(minlength=4) / len(index)
        assert counts[0] == 0 and (counts - expected).abs().max() < 0.05


def test_a_stopped_training_goes_on_from_its_checkpoint(folder, tmp_path):
    from features import load_scenes
    from learn_stage1 import make_model
    from scene_training import NEW_PARTS
    from settings import Stage1
    from training import learn

    settings = Stage1(102, 4, 3e-4, 5e-4, num_query_tokens=2)
    pairs = ImageTextPairs(load_scenes("train"), text_column="captions", id_column="caption")
    collate = ImageTextCollator(Blip2Processor.from_pretrained(folder / "stage1" / "full-seed0" / "model"))
    batches = []

    def collate_until(items):
        batches.append(items)
        if len(batches) == 102:
            raise InterruptedError
        return collate(items)

    options = (settings, NEW_PARTS, 0, tmp_path, Stage1Arguments)
    with pytest.raises(InterruptedError):
        learn(make_model(settings), pairs, collate_until, *options)
    log, seconds = learn(make_model(settings), pairs, collate_until, *options)
    assert seconds is None  # because those before the stop are not known
    assert [line["step"] for line in log if "loss" in line] == [20, 40, 60, 80, 100]
    assert log[-1]["step"] == 102 and len(batches) <= 102 + 4


def one_pair(model, tokenizer, embeds: torch.Tensor, text: str) -> tuple[float, torch.Tensor]:
    """Return the cosine and the logits of matching of one image and one text."""
    ids = tokenizer([text], return_tensors="pt")["input_ids"]
    image = model.get_image_features(image_embeds=embeds[None], return_dict=True).pooler_output[0]
    feature = model.get_text_features(ids, return_dict=True).pooler_output[0]
    return (image @ feature).max().item(), model.get_matching_logits(ids, image_embeds=embeds[None])[0]


@pytest.fixture(scope="module")
def embeds() -> torch.Tensor:
    """Features of the pictures that differ more than those of a random tower."""
    torch.manual_seed(0)
    return (3 * torch.randn(TEST, 16, 1280))[ROWS]


@pytest.fixture(scope="module")
def pair_scores(stage1, scenes, embeds) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosine and the logit of "match" of each picture with each caption, one by one."""
    model, processor = stage1
    with torch.no_grad():
        rows = [
            [one_pair(model, processor.tokenizer, picture, text) for text in scenes["caption"]] for picture in embeds
        ]
    cosines = torch.tensor([[cosine for cosine, _ in row] for row in rows])
    return cosines, torch.tensor([[float(logits[1]) for _, logits in row] for row in rows])


@torch.no_grad()
def test_retrieval_counts_equal_captions_as_right(stage1, scenes, embeds, pair_scores):
    from evaluate_stage1 import CANDIDATES, retrieve

    cosines, logits = pair_scores
    results = retrieve(*stage1, scenes, embeds, has_matching=True)
    captions = list(scenes["caption"])
    for way, similarity, added in (("image_to_text", cosines, logits), ("text_to_image", cosines.T, logits.T)):
        first = {"ITC": similarity.argmax(dim=1)}
        found = similarity.topk(CANDIDATES, dim=1).indices
        first["ITM"] = found.gather(1, (similarity + added).gather(1, found).argmax(dim=1, keepdim=True))[:, 0]
        for loss, index in first.items():
            right = sum(captions[i] == own for i, own in zip(index.tolist(), captions, strict=True))
            assert results[f"{loss} {way} R@1"] == right / len(captions)
    # Whichever of three scenes with the same caption is found
    same = retrieve(*stage1, scenes.select([3, 3, 3]), embeds[:3], has_matching=True)
    assert set(same.values()) == {1.0}
    assert list(retrieve(*stage1, scenes, embeds, has_matching=False)) == [
        "ITC image_to_text R@1",
        "ITC text_to_image R@1",
    ]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["relation", "count"])
def test_swapped_captions_are_told_by_the_higher_score(kind, stage1, folder):
    from evaluate_stage1 import SWAPS, tell_swapped
    from features import load_scenes
    from scene_training import stack_features

    model, processor = stage1
    scenes = load_scenes("train").select(range(40))
    rows = [row for row, own in enumerate(scenes["kind"]) if own in SWAPS[kind]]
    assert rows and {"relation": {"left", "above"}, "count": {"two", "three"}}[kind] == set(SWAPS[kind])
    told = {"ITC": [], "ITM": []}
    embeds = 3 * torch.randn(len(scenes), 16, 1280)
    for row in rows:
        true, swapped = (
            one_pair(model, processor.tokenizer, embeds[row], scenes[name][row][0]) for name in ("captions", "swapped")
        )
        told["ITC"].append(true[0] > swapped[0])
        told["ITM"].append(bool(true[1].log_softmax(0)[1] > swapped[1].log_softmax(0)[1]))
    results = tell_swapped(model, processor, scenes, embeds, kind, SWAPS[kind], has_matching=True)
    assert results == {f"{loss} {kind} told": sum(own) / len(own) for loss, own in told.items()}
    assert all(0 < share < 1 for share in results.values())
    singles = scenes.select([row for row, own in enumerate(scenes["kind"]) if own == "one"])
    assert tell_swapped(model, processor, singles, stack_features(singles), kind, SWAPS[kind], True) == {}


def test_losses_that_were_not_trained_have_no_scores(stage1, scenes):
    from evaluate_stage1 import evaluate

    names = {name.split()[0] for name in evaluate(*stage1, scenes, ("itc", "itm", "itg"))}
    assert names == {"ITC", "ITM", "ITG", "query"}
    assert {name.split()[0] for name in evaluate(*stage1, scenes, ("itc", "itg"))} == names - {"ITM"}
    assert {name.split()[0] for name in evaluate(*stage1, scenes, ("itc", "itm"))} == names - {"ITG"}


def test_captions_are_scored_by_kind():
    from evaluate_stage1 import score_captions

    rows = [
        ("one", ["a fox"], ["fox"], "a fox"),
        ("one", ["an owl"], ["owl"], "an ant"),
        ("two", ["two foxes"], ["fox", "fox"], "three foxes"),
        ("left", ["a fox to the left of an owl", "an owl to the right of a fox"], ["fox", "owl"], None),
    ]
    columns = dict(zip(("kind", "captions", "objects"), list(zip(*rows, strict=True))[:3], strict=True))
    captions = [caption or "an owl to the right of a fox" for *_, caption in rows]
    assert score_captions(captions, datasets.Dataset.from_dict(columns)) == {
        "exact": 0.5,
        "precision": 0.8,
        "recall": 0.8,
        "exact, left": 1.0,
        "exact, one": 0.5,
        "exact, two": 0.0,
    }


def test_answers_are_scored_by_the_kind_of_question(scenes, monkeypatch):
    import learn_questions

    rows = learn_questions.question_rows(scenes)
    asked = [(i, question) for i, questions in enumerate(scenes["questions"]) for question in questions]
    assert list(rows["image"]) == [i for i, _ in asked]
    for name in ("question", "answer", "kind"):
        assert list(rows[name]) == [question[name] for _, question in asked]

    # Answers of about the same length are generated together
    asked.sort(key=lambda pair: pair[1]["kind"])
    embeds = learn_questions.stack_features(scenes)
    given = []

    def generate(image_embeds, input_ids, max_new_tokens):
        given.append(image_embeds)
        return input_ids

    def answers(tokens, input_ids):
        """Answer the yes/no questions by yes, and the others rightly, after a space."""
        truth = [asked[number][1] for number in tokens.tolist()]
        return ["yes" if own["kind"] in ("thing", "relation", "number") else f" {own['answer']}" for own in truth]

    class Inputs(dict):
        def to(self, device):
            return self

    class Reader:
        """Gives each question its number in place of its tokens."""

        read = 0
        post_process_image_text_to_text = staticmethod(answers)

        def __call__(self, text, return_tensors):
            numbers = torch.arange(self.read, self.read + len(text))
            self.read += len(text)
            assert text == [f"Question: {asked[number][1]['question']} Answer:" for number in numbers.tolist()]
            return Inputs(input_ids=numbers)

    model = SimpleNamespace(eval=lambda: None, generate=generate, device=torch.device("cpu"))
    scores = learn_questions.score_answers(model, Reader(), scenes)
    assert torch.equal(torch.cat(given), embeds[[i for i, _ in asked]])
    kinds = [question["kind"] for _, question in asked]
    halves = {"thing": 0.5, "relation": 0.5, "number": 0.5}
    assert scores == {"right": pytest.approx(sum(halves.get(kind, 1.0) for kind in kinds) / len(kinds))} | {
        kind: halves.get(kind, 1.0) for kind in sorted(set(kinds))
    }


def test_captions_are_chosen_by_the_highest_score(folder, tmp_path, monkeypatch):
    import choose_captions
    from evaluate_stage1 import score_captions
    from features import choose_scenes

    captions = [["a lion", "two lions"], ["a fox", "a fox"]]
    assert choose_captions.choose(captions, [[0.1, 0.2], [0.3, 0.3]]) == ["two lions", "a fox"]
    written = {}
    monkeypatch.setattr(choose_captions, "write", lambda *args, **kwargs: written["captions"])
    scenes = choose_scenes(False)[1]["new style"]
    right = [own[0] for own in scenes["captions"]]
    # Of a true and a wrong caption, each way chooses one of the two
    written["captions"] = [[text, "nothing"] for text in right]
    parts = [(Blip2ForPreTraining, "stage1"), (Blip2ForConditionalGeneration, "stage2")]
    models = [
        part
        for kind, stage in parts
        for part in (
            kind.from_pretrained(folder / stage / "full-seed0" / "model").eval(),
            Blip2Processor.from_pretrained(folder / stage / "full-seed0" / "model"),
        )
    ]
    results = choose_captions.evaluate(*models, scenes)
    assert results["beams, first: exact"] == score_captions(right, scenes)["exact"] == 1
    model, processor = models[2:]
    embeds = choose_captions.stack_features(scenes)
    scores = choose_captions.score(model, processor, embeds, written["captions"])
    for way in ("sum", "mean", "relative"):
        chosen = choose_captions.choose(written["captions"], scores[way])
        assert results[f"sampled, language model, {way}: exact"] == score_captions(chosen, scenes)["exact"]
    inputs = processor(text=[choose_captions.CAPTION_PROMPT], candidates=[written["captions"][0]], return_tensors="pt")
    with torch.no_grad():
        mean = model.score_texts(**inputs, image_embeds=embeds[:1], normalization="mean")[0]
    assert scores["mean"][0] == pytest.approx(mean.tolist(), abs=1e-4)
    assert {key for key in results if "told" in key} >= {"relation told, sum", "count told, relative"}


def test_a_probe_names_as_many_things_as_there_are(folder):
    from probe import named

    there = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    scores = torch.tensor([[0.5, -1.0, 0.2, -2.0], [0.1, 0.0, 0.2, 0.3]])
    assert named(scores, there) == pytest.approx(2 / 3)
    found = json.loads((folder / "probe.json").read_text())
    assert list(found) == [*SETS, "validate seen styles", "validate new style"]
    assert all(0 <= share <= 1 for share in found.values())


def test_a_probe_of_what_the_features_tell_is_always_right(monkeypatch, tmp_path):
    import probe

    objects = [[probe.THINGS[i % 63]] if i % 2 else [probe.THINGS[i % 63], probe.THINGS[i % 7]] for i in range(200)]
    scenes = datasets.Dataset.from_dict({"objects": objects})
    monkeypatch.setattr(probe, "FOLDER", tmp_path)
    monkeypatch.setattr(probe, "choose_scenes", lambda validate: (scenes, {"same": scenes}))
    monkeypatch.setattr(probe, "stack_features", lambda own: probe.things_of(own)[:, None].repeat(1, 4, 1))
    probe.main()
    assert json.loads((tmp_path / "probe.json").read_text()) == {"same": 1.0, "validate same": 1.0}


def write_results(folder: Path, stage: str, variant: str, values: list[float], keys: list[str], dtypes: list[str]):
    from training import save_json

    for seed, (value, dtype) in enumerate(zip(values, dtypes, strict=True)):
        results = {name: dict.fromkeys(keys, value) for name in SETS}
        run = {"results": results, "log": [], "seconds": 60.0 * (seed + 3), "computed in": {"dtype": dtype}}
        save_json(folder / stage / f"{variant}-seed{seed}" / "results.json", run)


def test_tables_of_what_there_is(monkeypatch, tmp_path):
    import report
    from training import save_json

    monkeypatch.setattr(report, "FOLDER", tmp_path)
    assert "full" not in "".join(report.tables())
    contrast = ["ITC image_to_text R@1", "ITC text_to_image R@1"]
    matching = ["ITM image_to_text R@1", "ITM text_to_image R@1", "ITM relation told"]
    captions = ["ITG exact", "ITG precision", "ITG recall", "query cosine", "query rank"]
    captions += [f"query cosine, layer {layer}" for layer in range(7)]
    dtypes = ["bfloat16", "float32", "bfloat16"]
    write_results(tmp_path, "stage1", "full", [0.5, 0.6, 0.7], contrast + matching + captions, dtypes)
    write_results(tmp_path, "stage1", "no ITM", [0.25], contrast, ["float32"])
    write_results(tmp_path, "stage1", "start", [0.375], contrast, ["float32"])
    continued = tmp_path / "stage1" / "start-seed0" / "results.json"
    # After a stop the time is not known
    save_json(continued, json.loads(continued.read_text()) | {"seconds": None})
    write_results(tmp_path, "stage2", "no stage 1", [0.125], ["exact", "precision", "recall"], ["float32"])
    write_results(tmp_path, "questions", "question into the Q-Former", [1.0], ["right", "what"], ["float32"])
    save_json(tmp_path / "probe.json", dict(zip(SETS, (0.995, 0.98, 0.66), strict=True)))
    monkeypatch.setattr(sys, "argv", ["report.py", "--output", str(tmp_path / "report")])
    report.main()
    text = (tmp_path / "report" / "tables.md").read_text()
    seeds, spread = "2 in bfloat16, 1 in float32", "60.0 ± 10.0"
    assert text.count(f"| full | {seeds} | {spread} | {spread} | {spread} | {spread} |\n") == len(SETS)
    assert text.count("| no ITM | 1 in float32 | 25.0 |  | 25.0 |  |\n") == len(SETS)
    assert text.count("| start | 1 in float32 | 37.5 |  | 37.5 |  |\n") == len(SETS)
    assert f"| full | {seeds} |  | {spread} |  |  |\n" in text  # relations told, by matching alone
    assert f"| full | {seeds} | {' | '.join([spread] * 9)} |\n" in text
    assert f"| no stage 1 | 1 in float32 | {' | '.join(['12.5'] * 9)} |\n" in text
    assert "| question into the Q-Former | 1 in float32 | 100.0 | 100.0 |\n" in text
    assert "| linear probe of the tower | 99.5 | 98.0 | 66.0 |\n" in text
    assert "0.60 ± 0.10" in next(line for line in report.diversity_table().splitlines() if "| full |" in line)
    assert "Training: stage 1 3 to 5 minutes, stage 2 3 to 3 minutes, questions 3 to 3 minutes." in text


def test_each_step_of_the_recipe_is_a_command_after_those_that_it_needs(capsys):
    from settings import QUESTIONS, STAGE1, STAGE2, START

    run_script("run", "--dry-run", "--seeds", "0", "4")
    commands = [shlex.split(line)[1:] for line in capsys.readouterr().out.splitlines()]
    assert all(Path(script).is_file() for script, *_ in commands)
    variants = [("stage1", START), ("stage1", STAGE1), ("stage2", STAGE2), ("questions", QUESTIONS)]
    expected = [["features.py"], ["probe.py"]]
    for stage, own in variants:
        if stage == "questions":
            expected += [["choose_captions.py", "--seed", seed] for seed in ("0", "4")]
        expected += [
            [f"learn_{stage}.py", "--variant", variant, "--seed", seed] for seed in ("0", "4") for variant in own
        ]
    assert [[Path(script).name, *rest] for script, *rest in commands] == [*expected, ["report.py"]]


def test_finished_steps_are_skipped_and_a_failed_one_ends_the_run(monkeypatch, tmp_path, capsys):
    import run

    def write(name: str, code: int = 0) -> tuple[Path, list[str]]:
        line = f"import pathlib, sys; pathlib.Path({str(tmp_path / name)!r}).write_text('new'); sys.exit({code})"
        return tmp_path / name, [sys.executable, "-c", line]

    (tmp_path / "finished").write_text("old")
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "stages", lambda seeds: [[write("finished"), write("first")], [write("failed", 3)]])
    with pytest.raises(SystemExit, match="A step failed. Run this again to continue from there."):
        run_script("run", "--seeds", "0")
    assert (tmp_path / "finished").read_text() == "old" and (tmp_path / "first").read_text() == "new"
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and printed[1].endswith(f"FAILED, see {tmp_path / 'logs' / 'failed.log'}")
