"""The parts of examples/recipe that can be wrong without a training, and its tower, EfficientNet-lite."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import EXAMPLES
from stage1 import make_inputs, make_stage1
from tiny import make_model, make_pixel_values
from transformers import AutoConfig, AutoModel


RECIPE = EXAMPLES / "recipe"
TITLED = """<svg xmlns="http://www.w3.org/2000/svg"><metadata>
<rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work><dc:title>{title}</dc:title>
<dc:subject><rdf:Bag><rdf:li>Fruit</rdf:li><rdf:li>  </rdf:li><rdf:li>früchte</rdf:li></rdf:Bag></dc:subject>
</cc:Work></rdf:RDF></metadata></svg>"""


@pytest.fixture(scope="module", autouse=True)
def recipe_on_path():
    before = list(sys.path)
    sys.path[:0] = [str(RECIPE), str(RECIPE.parent)]
    yield
    sys.path[:] = before


@pytest.mark.parametrize(
    ("title", "expected"),
    [("Red_Apple 02", "red apple"), ("ab", None), ("one two three four five", None), ("Äpfel", None), ("", None)],
)
def test_titles_of_clip_art(tmp_path, title, expected):
    from pictures import title_and_keywords

    file = tmp_path / "picture.svg"
    file.write_text(TITLED.format(title=title), encoding="utf-8")
    assert title_and_keywords(file) == (expected, ["fruit"])


def test_a_broken_file_of_clip_art_has_no_title(tmp_path):
    from pictures import title_and_keywords

    (tmp_path / "picture.svg").write_text("<svg><metadata>")
    assert title_and_keywords(tmp_path / "picture.svg") == (None, [])


def test_where_clip_art_cannot_be_had_there_is_none(monkeypatch, capsys):
    import pictures

    def fail(command, **kwargs):
        raise subprocess.CalledProcessError(100, command, stderr="E: no such package")

    monkeypatch.setattr(pictures.shutil, "which", lambda name: "/usr/bin/apt-get")
    monkeypatch.setattr(pictures.subprocess, "run", fail)
    assert pictures.clip_art_if_any(set()) == []
    assert "apt-get download -q openclipart-png failed.\nE: no such package" in capsys.readouterr().out


def test_pictures_without_clip_art(monkeypatch, tmp_path):
    import pictures

    def drawings_of_style(style, concepts):
        for row in concepts.select(range(20)):
            yield {**row, "style": style, "image": {"bytes": b"", "path": None}}

    monkeypatch.setattr(pictures, "drawings_of_style", drawings_of_style)
    monkeypatch.setattr(pictures.shutil, "which", lambda name: None)
    pictures.make_pictures(tmp_path / "pictures")
    splits = pictures.load_pictures(tmp_path / "pictures")
    assert len(splits["clip_art"]) == 0
    unseen, seen = set(splits["test_unseen"]["name"]), set(splits["test_seen"]["name"])
    assert (len(seen), len(unseen)) == (723, 80) and set(splits["train"]["name"]) == seen
    assert not seen & unseen and set(splits["train"]["style"]) == {"noto", "twemoji", *pictures.MORE_STYLES}


def test_features_that_are_there_need_no_tower(monkeypatch, tmp_path):
    import datasets
    import features

    pictures = {"train": datasets.Dataset.from_dict({"name": ["a", "b"]}), "clip_art": datasets.Dataset.from_dict({})}
    made = []
    monkeypatch.setattr(features, "load_pictures", lambda: pictures)
    monkeypatch.setattr(features, "FOLDER", tmp_path)
    monkeypatch.setattr(features, "remove_styles", lambda rows: rows)

    def load(folder):
        if folder.name not in made:
            raise FileNotFoundError
        return pictures[folder.name]

    monkeypatch.setattr(features, "load_cached_features", load)
    monkeypatch.setattr(features, "make_features", lambda rows, folder, views: made.append(folder.name))
    for _ in range(2):
        assert list(features.load_features(("train", "clip_art"))) == ["train"]
    assert made == ["train"]


def test_nearest_neighbours_against_one_by_one():
    from baselines import directions, nearest_neighbours

    torch.manual_seed(0)
    train, test = torch.randn(6, 2, 5), torch.randn(3, 5)
    names, train_names = ["a", "b", "unseen"], ["a", "b", "a", "b", "b", "a"]
    scores = nearest_neighbours(train, train_names, test, names)
    left, right = directions(test), directions(train[:, 0])
    for i in range(3):
        for j, name in enumerate(names):
            own = [float(left[i] @ right[n]) for n in range(6) if train_names[n] == name]
            assert scores[i, j] == pytest.approx(max(own, default=-2.0), abs=1e-6)


def test_baselines_count_a_picture_among_all_names_and_a_name_among_all_pictures():
    from baselines import score

    # Picture 0 finds its name first, picture 1 second; name 0 finds its picture first, name 1 too
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.4, 0.0], [0.1, 0.2, 0.3]])
    results = score(scores, torch.tensor([0, 1]), torch.tensor([0, 1, 2]), ["cat", "dog", "cow"])
    assert results["image_to_text R@1"] == 0.5 and results["image_to_text R@5"] == 1.0
    assert results["text_to_image R@1"] == 1.0


def test_negatives_get_harder():
    from learn_stage1 import NegativeCurriculum

    torch.manual_seed(0)
    logits = torch.zeros(1, 4)
    logits[0, 1] = 2.0
    compared = {"logits_per_image": logits.repeat(4000, 1), "logits_per_text": logits.repeat(4000, 1)}
    is_match = torch.zeros(4000, 4, dtype=torch.bool)
    is_match[:, 0] = True
    model = NegativeCurriculum.__new__(NegativeCurriculum)
    torch.nn.Module.__init__(model)
    for hardness in (0.0, 0.5, 1.0):
        model.hardness = hardness
        expected = torch.tensor([2.0 * hardness, 0.0, 0.0]).softmax(dim=0)
        for index in model._draw_negatives(compared, is_match).values():
            counts = index.bincount(minlength=4) / len(index)
            assert counts[0] == 0 and (counts[1:] - expected).abs().max() < 0.05


@pytest.mark.parametrize(("part", "losses"), [(3, ("itm", "itg")), (3, ("itg",)), (6, ("itg",)), (3, ())])
def test_contrast_is_of_the_whole_batch_and_the_others_of_a_part(tmp_path, part, losses):
    from learn_stage1 import ContrastAndMore
    from settings import Stage1

    from blip2_hf.training import Stage1Arguments

    model = make_stage1()
    arguments = Stage1Arguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=10)
    settings = Stage1(part=part, losses=losses, hardness=(0.0, 1.0))
    trainer = ContrastAndMore(model, arguments, train_dataset=[{}], settings=settings)
    trainer.state.max_steps, trainer.state.global_step = 10, 5
    batch = make_inputs(6) | {"image_ids": torch.tensor([0, 1, 2, 3, 4, 0])}
    loss, outputs = trainer.compute_loss(model.eval(), batch, return_outputs=True)
    assert model.hardness == 0.5
    images = model.get_image_features(image_embeds=batch["image_embeds"], return_dict=True).pooler_output
    texts = model.get_text_features(batch["input_ids"], batch["attention_mask"], return_dict=True).pooler_output
    similarity = torch.stack([torch.stack([(q @ t).max() for t in texts]) for q in images])
    logits = similarity / model.temperature.weight
    targets = (batch["image_ids"][:, None] == batch["image_ids"]).float()
    targets = 0.9 * targets / targets.sum(dim=1, keepdim=True) + 0.1 / 6
    expected = -sum((targets * x.log_softmax(dim=1)).sum(dim=1).mean() for x in (logits, logits.T)) / 2
    if losses:
        assert len(outputs.itm_logits) == 3 * part
        expected = expected + sum(outputs[f"loss_{name}"] for name in losses)
    torch.testing.assert_close(loss, expected)


def test_what_runs_share_is_made_again_where_it_was_made_otherwise(tmp_path, capsys):
    import datasets
    from learn_stage1 import contrast_once
    from settings import Stage1, Training

    class Lesson:
        learned = 0

        def __init__(self, steps=3, names=("a", "b")):
            self.settings = Stage1(contrast=Training(steps, 2, 0.1, 0.1))
            self.rows = datasets.Dataset.from_dict({"name": names})

        def contrast(self, model):
            Lesson.learned += 1
            torch.nn.init.constant_(model.weight, Lesson.learned)
            return [{"loss": Lesson.learned}]

    model = torch.nn.Linear(1, 1, bias=False)
    file = tmp_path / "contrast.pt"
    given = [(Lesson(), 1), (Lesson(), 1), (Lesson(steps=4), 2), (Lesson(steps=4), 2), (Lesson(4, ("a", "c")), 3)]
    for lesson, expected in given:
        torch.nn.init.zeros_(model.weight)
        assert contrast_once(model, lesson, file) == [{"loss": expected}] and model.weight.item() == expected
    assert capsys.readouterr().out.count("is made again") == 2


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_what_is_to_be_gone_on_from_and_is_not_there_is_named(monkeypatch, tmp_path, stage):
    import learn_stage1
    import learn_stage2
    from settings import STAGE2

    monkeypatch.setattr(learn_stage2, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match="which does not exist"):
        if stage == "stage1":
            learn_stage1.go_on(None, tmp_path / "full-seed0")
        else:
            learn_stage2.make_model(STAGE2["full"], 0, None, None)


def test_a_variant_goes_on_from_another(tmp_path):
    from learn_stage1 import WithoutMatching, go_on
    from training import save_json

    earlier = make_stage1()
    earlier.save_pretrained(tmp_path / "model")
    save_json(tmp_path / "results.json", {"log": [{"step": 3, "loss": 1.0}]})
    torch.manual_seed(1)
    model = WithoutMatching(earlier.config)
    assert go_on(model, tmp_path) == [{"step": 3, "loss": 1.0}]
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, earlier.state_dict()[name])


def test_stage_2_takes_the_first_queries(tmp_path):
    from learn_stage2 import with_first_queries

    earlier = make_stage1()
    earlier.save_pretrained(tmp_path)
    queries = earlier.query_tokens.weight
    model = with_first_queries(tmp_path, 1)
    assert model.config.num_query_tokens == 1 and queries.shape[1] > 1
    torch.testing.assert_close(model.query_tokens.weight, queries[:, :1])
    batch = make_inputs(2)
    assert model.get_image_features(image_embeds=batch["image_embeds"], return_dict=True).pooler_output.shape[1] == 1


def test_stage_2_runs_its_prompt_once_to_the_same_loss(tmp_path):
    from learn_stage2 import SharesPrompt

    from blip2_hf.training import Stage2Arguments

    # In eval mode, because dropout would differ
    model = make_model().eval()
    image = [model.config.image_token_index] * model.config.num_query_tokens
    rows = [[5, 9, 7, *image, *name] for name in ([11, 12, 2], [13, 2, 1], [14, 2, 1])]
    input_ids = torch.tensor(rows)
    behind = torch.arange(input_ids.shape[1]) >= 3 + len(image)
    batch = {
        "input_ids": input_ids,
        "image_embeds": model.get_image_embeds(make_pixel_values(3)),
        "attention_mask": (input_ids != 1).long(),
        "labels": input_ids.masked_fill(~behind | (input_ids == 1), -100),
    }
    arguments = Stage2Arguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=10)
    trainer = SharesPrompt(model, arguments, train_dataset=[{}])
    lengths = []
    model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1] if not args else args[0].shape),
        with_kwargs=True,
    )
    loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(7))
    assert lengths == [(1, 3), input_ids.shape[1] - 3]
    torch.testing.assert_close(loss, model(**batch, num_items_in_batch=7).loss)


def test_stage_2_is_not_validated_after_a_stage_1_of_all_styles(monkeypatch):
    import learn_stage2

    monkeypatch.setattr(sys, "argv", ["learn_stage2.py", "--validate"])
    with pytest.raises(SystemExit, match="leave out --validate"):
        learn_stage2.main()


def test_what_a_language_model_repeats_counts_by_name():
    from prompts import repeats
    from transformers import LlamaConfig, LlamaForCausalLM

    class Tokenizer:
        eos_token_id = 0
        words = ["", "a", "b", " a", " b", "\n"]

        def __call__(self, text):
            return {"input_ids": [1, 2] if text in ("before", "after") else [self.words.index(text)]}

        def batch_decode(self, tokens, skip_special_tokens):
            return ["".join(self.words[token] for token in row) for row in tokens.tolist()]

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=4
    )
    model = LlamaForCausalLM(config).eval()
    lengths = []
    generate = model.generate

    def repeat(inputs_embeds, **kwargs):
        lengths.append(inputs_embeds.shape[1])
        assert generate(inputs_embeds=inputs_embeds, **kwargs).shape[0] == 2
        word = (inputs_embeds[:, 2, None] - model.get_input_embeddings().weight).norm(dim=-1).argmin(dim=1)
        # The second name is never said
        return torch.stack([torch.stack([word[0], torch.tensor(5)]), torch.tensor([3, 3])])

    model.generate = repeat
    assert repeats(model, Tokenizer(), "before{}after", ["a", "b"], times=3) == [True, False]
    assert lengths == [2 + 3 + 2]


def test_spread_is_the_mean_and_the_standard_deviation():
    pytest.importorskip("matplotlib")
    from report import spread, table

    assert spread([0.5, 0.6, 0.7]) == "60.0 ± 10.0"
    assert spread([1.25], percent=False) == "1.25"
    assert table("what", ["a"], {"row": ["1"]}) == "| what | a |\n| --- | --- |\n| row | 1 |\n"


def test_a_report_of_what_there_is(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    import report
    from training import save_json

    monkeypatch.setattr(report, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "--output", str(tmp_path / "report")])
    report.main()
    assert "CapFilt has not been run." in (tmp_path / "report" / "tables.md").read_text()

    def recalls(value):
        ways = ("image_to_text", "text_to_image")
        return {"seen": {f"ITC {way} R@{k}": value for way in ways for k in (1, 5, 10)}}

    computed_in = {"computed in": {"dtype": "float32"}}
    for seed, value in enumerate((0.5, 0.7)):
        log = [{"step": step, "loss_itc": step + seed, "loss_itm": 0.5, "loss_itg": 9.0} for step in (2, 1)]
        run = {"results": recalls(value) | {"contrast": recalls(value)}, "log": [*log, {"train_loss": 1.0}]}
        save_json(tmp_path / "stage1" / f"full-seed{seed}" / "results.json", run)
        # One of them has no dtype
        run = run | (computed_in if seed else {})
        save_json(tmp_path / "stage1" / f"ITC for longer-seed{seed}" / "results.json", run)
    assert "| ITC for longer | 1 in an unknown dtype, 1 in float32 | 1.50 ± 0.71 |  |  |" in report.loss_table()
    cleaned = {"drawings": 9, "right": 0.5} | recalls(0.4)
    kinds = dict.fromkeys(("shuffled", "kept", "cleaned"), cleaned)
    detection = {"precision": 0.6, "recall": 0.9}
    by_style = {"detection by style": {"openmoji": {"precision": 0.2, "recall": 0.1}}}
    result = kinds | computed_in | by_style | {"detection": detection, "alone": recalls(0.3)}
    save_json(tmp_path / "capfilt" / "seed1.json", result)
    found = report.capfilt_table()
    assert "| all (seeds: 1) | 60.0 | 90.0 |\n| openmoji (seeds: 1) | 20.0 | 10.0 |" in found
    assert "| the two styles alone (seeds: 1) | 0 |  | 30.0 | 30.0 |" in found
    assert "| all, as they were (seeds: 1 in an unknown dtype) | 9 | 100 | 70.0 | 70.0 |" in found


def test_without_clip_art_nothing_is_learned_from_it(monkeypatch, tmp_path):
    import datasets
    import run

    monkeypatch.setattr(run, "FOLDER", tmp_path)
    file = tmp_path / "pictures" / "clip_art.parquet"
    file.parent.mkdir()
    for number in (1, 0):
        datasets.Dataset.from_dict({"name": ["cat"] * number}).to_parquet(file)
        commands = [" ".join(command) for jobs in run.stages([0]) for _, command in jobs]
        assert any("with Open Clip Art" in command for command in commands) == bool(number)


def test_every_step_of_the_recipe_is_a_command():
    run = subprocess.run(
        [sys.executable, str(RECIPE / "run.py"), "--dry-run", "--seeds", "0"],
        capture_output=True,
        text=True,
        check=True,
    )
    commands = run.stdout.splitlines()
    assert any("learn_stage1.py --variant full --seed 0" in command for command in commands)
    assert any("learn_stage2.py --variant 'no stage 1' --seed 0" in command for command in commands)
    for command in commands:
        assert Path(command.split()[1]).exists()


def test_efficientnet_lite_is_a_tower_like_any_other(tmp_path):
    import efficientnet_lite

    from blip2_hf.data import VisionTower

    torch.manual_seed(0)
    config = efficientnet_lite.EfficientNetLiteConfig(width=0.25, depth=1.0, hidden_size=24, image_size=64)
    model = AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).width == 0.25
    pixel_values = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        feature_map = model(pixel_values).last_hidden_state
        embeds = VisionTower(tmp_path).eval().get_image_embeds(pixel_values)
    assert feature_map.shape == (2, 24, 2, 3)
    torch.testing.assert_close(embeds, feature_map.flatten(2).transpose(1, 2))


def test_two_towers_are_one_tower_with_the_layers_of_both(tmp_path):
    from two_towers import TwoTowersConfig

    from blip2_hf.data import VisionTower

    torch.manual_seed(0)
    config = TwoTowersConfig(
        efficientnet_config={"width": 0.25, "depth": 1.0, "hidden_size": 24},
        dinov2_config={"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56},
        efficientnet_layers=(-3, -1),
        dinov2_layers=(1, 3),
        image_size=64,
        dinov2_size=56,
        grid=2,
        hidden_size=48 + 80 + 2 * 8,
    )
    model = AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = model.efficientnet(pixel_values, output_hidden_states=True).hidden_states
        smaller = torch.nn.functional.interpolate(pixel_values, (56, 56), mode="bilinear", antialias=True)
        layers = model.dinov2(smaller, output_hidden_states=True).hidden_states
        embeds = VisionTower(tmp_path).eval().get_image_embeds(pixel_values)

    def normed(values):
        return (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()

    expected = []
    for image in range(2):
        for row in range(2):
            for column in range(2):
                place = [normed(maps[layer][image, :, row, column]) for layer in (-3, -1)]
                for layer in (1, 3):
                    patches = torch.stack([normed(patch) for patch in layers[layer][image, 1:]]).view(4, 4, 8)
                    place.append(patches[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(dim=(0, 1)))
                expected.append(torch.cat(place))
    torch.testing.assert_close(embeds, torch.stack(expected).view(2, 4, -1), atol=1e-4, rtol=1e-4)


def test_efficientnet_lite2_has_the_sizes_of_the_published_weights():
    from efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

    with torch.device("meta"):
        model = EfficientNetLiteModel(EfficientNetLiteConfig())
    # 6,092,072 in all, of which the classifier of 1,000 classes is left out
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_092_072 - 1280 * 1000 - 1000
    assert len(model.blocks) == 21


def test_styles_are_removed_from_the_features():
    import datasets
    from styles import remove_styles

    from blip2_hf.data import read_cached_features

    torch.manual_seed(0)
    values = {"train": torch.randn(6, 2, 3, 4) * 5 + 7, "test": torch.randn(3, 1, 3, 4) - 4}
    styles = {"train": ["a", "b", "a", "b", "b", "c"], "test": ["d", "d", "c"]}
    features = {
        split: datasets.Dataset.from_list(
            [
                {
                    "style": style,
                    "image_embeds": row.numpy().tobytes(),
                    "image_embeds_shape": list(row.shape),
                    "image_embeds_dtype": "float32",
                }
                for style, row in zip(styles[split], part, strict=True)
            ]
        )
        for split, part in values.items()
    }
    results = remove_styles(features)
    places = torch.cat([values["train"][:, 0], values["test"][:, 0]]).mean(dim=1)
    own = [*styles["train"], *styles["test"]]
    means = torch.stack([places[[other == style for other in own]].mean(dim=0) for style in own])
    spread = (places - means)[:6].std(dim=0)
    for split, first in (("train", 0), ("test", 6)):
        for i, row in enumerate(results[split]):
            for view in range(len(values[split][i])):
                expected = (values[split][i, view] - means[first + i]) / spread
                torch.testing.assert_close(read_cached_features(row, view), expected)


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_what_a_cpu_multiplies_fastest_in(monkeypatch, faster):
    import precision

    monkeypatch.setattr(precision, "device_type", lambda: "cpu")
    monkeypatch.setattr(precision, "_seconds_of_product", lambda dtype: 1.0 if dtype == faster else 2.0)
    precision.fast_dtype.cache_clear()
    assert precision.fast_dtype() == faster
    with precision.fast_autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    precision.fast_dtype.cache_clear()
    assert product.dtype == faster


def test_a_third_of_the_names_are_shuffled():
    import random

    from capfilt import detection, detection_by_style, margin, shuffle_some

    names = [f"thing {i % 20}" for i in range(90)]
    captions = shuffle_some(names, random.Random(0))
    assert sorted(captions) == sorted(names)
    assert sum(a != b for a, b in zip(names, captions, strict=True)) == 30
    found = detection([True, True, False, False], [True, False, True, False])
    assert found == {"precision": 0.5, "recall": 0.5}
    by_style = detection_by_style([True, True, False, True], [True, False, True, True], ["x", "x", "x", "y"])
    assert by_style == {"x": {"precision": 0.5, "recall": 0.5}, "y": {"precision": 1.0, "recall": 1.0}}
    ranked = [("a", 0.5, False), ("b", 0.3, True), ("c", 0.1, False)]
    candidates = [dict(zip(("text", "score", "is_original"), candidate, strict=True)) for candidate in ranked]
    assert margin(candidates) == pytest.approx(0.2) and margin(candidates[1:]) == pytest.approx(-0.2)
    assert margin(candidates[1:2]) < -1 < 1 < margin(candidates[:1])


def test_contrast_and_matching_together_against_one_by_one():
    from evaluate_stage1 import both

    from blip2_hf.evaluation import Ranking, TwoStageRankings

    torch.manual_seed(0)
    cosines, logits, temperature = torch.rand(6, 6), 3 * torch.randn(6, 6), 0.1
    by_contrast, reranked = [], []
    for similarity, added in ((cosines, logits), (cosines.T, logits.T)):
        best = similarity.topk(3, dim=1)
        by_contrast.append(Ranking(best.indices, best.values))
        sums, order = (best.values + added.gather(1, best.indices)).sort(dim=1, descending=True)
        reranked.append(Ranking(best.indices.gather(1, order), sums))
    together = both(TwoStageRankings(*by_contrast), TwoStageRankings(*reranked), temperature)
    for row in range(6):
        candidates = cosines[row].topk(3).indices.tolist()
        score = {c: float(cosines[row, c] / temperature + logits[row, c].sigmoid().log()) for c in candidates}
        found = together.image_to_text
        assert found.index[row].tolist() == sorted(candidates, key=score.__getitem__, reverse=True)
        assert found.scores[row].tolist() == pytest.approx(sorted(score.values(), reverse=True), abs=1e-4)


def test_captions_by_the_length_of_the_name():
    from learned import by_length

    def tokenizer(text):
        return {"input_ids": text.split()}

    names = ["cat", "dog", "red apple", "a b c d", "a b c d e"]
    found = by_length(["cat", "cow", "red apple", "x", "a b c d e"], names, tokenizer)
    assert found == {
        "exact, 2 names of 1 token": 0.5,
        "exact, 1 names of 2 tokens": 1.0,
        "exact, 2 names of 4 tokens or more": 0.5,
    }
