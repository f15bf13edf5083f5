"""How different queries are, what the logs of both stages tell of it, and the warning of a collapse."""

import itertools
import math

import pytest
import torch
from accelerate import Accelerator
from stage1 import Processor, make_pairs, make_stage1
from stage2 import make_trainer as make_stage2_trainer
from tiny import QFORMER, make_model

from blip2_hf.data import ImageTextCollator, ImageTextPairs
from blip2_hf.training import Blip2Trainer, Stage1Arguments, Stage2Arguments, query_diversity
from blip2_hf.training.diversity import QueryDiversityLog


LOGGER = "blip2_hf.training.diversity"


def test_as_computed_one_by_one():
    states = torch.randn(3, 5, 16) * torch.rand(3, 5, 1)
    cosines, ranks = [], []
    for image in states:
        unit = [query / query.norm() for query in image]
        cosines.append(sum(float(a @ b) for a, b in itertools.permutations(unit, 2)) / 20)
        values = torch.linalg.svd(torch.stack(unit)).S
        shares = [float(value / values.sum()) for value in values]
        ranks.append(math.exp(-sum(share * math.log(share) for share in shares)))
    cosine, rank = query_diversity(states)
    assert cosine.item() == pytest.approx(sum(cosines) / 3, abs=1e-6)
    assert rank.item() == pytest.approx(sum(ranks) / 3, rel=1e-5)


def test_equal_and_orthogonal_queries():
    cosine, rank = query_diversity(torch.randn(4, 1, 64).expand(4, 8, 64))
    assert cosine.item() == pytest.approx(1, abs=1e-5) and rank.item() == pytest.approx(1, abs=1e-3)
    lengths = torch.rand(4, 8, 1) + 0.1
    cosine, rank = query_diversity(torch.linalg.qr(torch.randn(4, 64, 8)).Q.mT * lengths)
    assert cosine.item() == pytest.approx(0, abs=1e-5) and rank.item() == pytest.approx(8, rel=1e-5)
    assert query_diversity(torch.tensor([[[1.0, 0], [-2, 0]]]))[0].item() == pytest.approx(-1)


def test_half_precision_is_computed_in_float32():
    states = torch.randn(2, 4, 16).bfloat16()
    assert query_diversity(states) == query_diversity(states.float())


@pytest.mark.parametrize("shape", [(4, 16), (2, 1, 16)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="two queries or more was expected"):
        query_diversity(torch.zeros(shape))


def train(folder, stage: int, **kwargs) -> Blip2Trainer:
    fields = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1} | kwargs
    model = fields.pop("model", None)
    if stage == 2:
        trainer = make_stage2_trainer(folder, model=model, kind=Stage2Arguments, **fields)
    else:
        fields = {
            "per_device_train_batch_size": 4,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        } | fields
        trainer = Blip2Trainer(
            make_stage1() if model is None else model,
            Stage1Arguments(str(folder), save_strategy="no", **fields),
            train_dataset=ImageTextPairs(make_pairs(12)),
            eval_dataset=ImageTextPairs(make_pairs(4), train=False),
            data_collator=ImageTextCollator(Processor()),
        )
    trainer.train()
    return trainer


def logged(trainer: Blip2Trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"gradient_caching_chunk_size": 3}])
@pytest.mark.parametrize("stage", [1, 2])
def test_logs_of_both_stages(stage, options, tmp_path):
    steps = logged(train(tmp_path, stage, **options))
    assert [entry["step"] for entry in steps] == [2, 4]
    assert all(-1 <= entry["query_cosine"] < 1 and 1 < entry["query_rank"] <= 4 for entry in steps)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_log_is_of_the_last_batch_without_dropout(stage, tmp_path, monkeypatch):
    seen, keep = [], QueryDiversityLog.keep

    def watch(self, inputs):
        seen.append(inputs)
        keep(self, inputs)

    monkeypatch.setattr(QueryDiversityLog, "keep", watch)
    model = make_stage1(qformer_dropout=0.1) if stage == 1 else make_model()
    trainer = train(tmp_path, stage, model=model)
    assert len(seen) == 4  # none of an evaluation
    states = model.eval().encode_image(seen[-1]["pixel_values"], None)[2].last_hidden_state
    assert states.shape == (4, 4, 32)
    cosine, rank = (value.item() for value in query_diversity(states.detach()))
    last = logged(trainer)[-1]
    assert (last["query_cosine"], last["query_rank"]) == pytest.approx((cosine, rank), rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_log_changes_nothing_that_is_learned(stage, tmp_path, monkeypatch):
    def weights(folder):
        torch.manual_seed(0)
        model = make_stage1(qformer_dropout=0.1) if stage == 1 else make_model()
        return train(tmp_path / folder, stage, model=model, logging_steps=1).model.state_dict()

    with_log = weights("with")
    monkeypatch.setattr(QueryDiversityLog, "take", lambda *_: {})
    without = weights("without")
    assert all(torch.equal(weight, without[name]) for name, weight in with_log.items())


def test_some_pictures_of_any_form_of_a_batch():
    model, log, accelerator = make_model(), QueryDiversityLog(), Accelerator(cpu=True)
    pictures = torch.randn(12, 3, 28, 28)
    with torch.no_grad():
        features = model.get_image_embeds(pictures)
    expected = query_diversity(model.eval().encode_image(pictures[:4], None)[2].last_hidden_state.detach())
    for inputs in (
        {"pixel_values": pictures},
        {"pixel_values": pictures.unflatten(0, (6, 2))},
        {"image_embeds": features, "pixel_values": None, "input_ids": torch.ones(12, 3)},
        {"image_embeds": features.unflatten(0, (3, 4))},
    ):
        log.keep(inputs)
        model.train()
        told = log.take(model, accelerator)
        assert model.qformer.training and not model.language_model.training
        assert (told["query_cosine"], told["query_rank"]) == pytest.approx([v.item() for v in expected], rel=1e-4)
        assert log.take(model, accelerator) == {}  # told once


def test_instructions_are_read_too():
    config = {"qformer_config": {**QFORMER, "use_qformer_text_input": True}}
    model, log, accelerator = make_model(**config), QueryDiversityLog(), Accelerator(cpu=True)
    inputs = {"pixel_values": torch.randn(9, 3, 28, 28), "qformer_input_ids": torch.randint(4, 60, (9, 5))}
    log.keep(inputs)
    first = {name: values[:4] for name, values in inputs.items()}
    expected = query_diversity(model.get_image_features(**first).qformer_outputs.last_hidden_state.detach())
    assert log.take(model, accelerator)["query_cosine"] == pytest.approx(expected[0].item(), rel=1e-4)


@pytest.mark.parametrize("case", ["one query", "image features were given", "nan"])
def test_nothing_is_told_of_no_queries(case):
    model, log = make_model(num_query_tokens=1 if case == "one query" else 4), QueryDiversityLog()
    pictures = torch.randn(2, 3, 28, 28)
    if case == "nan":
        model.query_tokens.weight.data.fill_(torch.nan)
    log.keep({"image_features": pictures} if case == "image features were given" else {"pixel_values": pictures})
    assert log.take(model, Accelerator(cpu=True)) == {}


@pytest.mark.parametrize("stage", [1, 2])
def test_collapsed_queries_are_warned_of_once(stage, tmp_path, caplog):
    model = make_stage1(qformer_dropout=0.1) if stage == 1 else make_model()
    with torch.no_grad():
        model.query_tokens.weight.copy_(model.query_tokens.weight[:, :1].expand_as(model.query_tokens.weight))
    options = {"learning_rate": 0.0, "logging_steps": 1}
    steps = logged(train(tmp_path / "collapsed", stage, model=model, **options))
    assert [entry["query_cosine"] for entry in steps] == pytest.approx([1] * 4, abs=1e-3)
    assert [entry["query_rank"] for entry in steps] == pytest.approx([1] * 4, abs=0.05)
    (said,) = [record.message for record in caplog.records if record.name == LOGGER]
    assert "almost one vector" in said and "--query-initialization words" in said
    caplog.clear()
    train(tmp_path / "different", stage, **options)
    assert not [record for record in caplog.records if record.name == LOGGER]
