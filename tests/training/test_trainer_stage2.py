"""Stage 2 and fine-tuning in the Trainer: settings, metrics of generated text, checkpoints, accumulation."""

import numpy as np
import pytest
import torch
import transformers
from stage1 import make_stage1
from stage2 import (
    CAPTIONS,
    Pictures,
    losses,
    make_arguments,
    make_trainer,
    remove_dropout,
)
from tiny import make_model

from blip2_hf import Blip2ForConditionalGeneration
from blip2_hf.evaluation import GeneratedTextMetrics, exact_match, word_f1
from blip2_hf.training import (
    Blip2Trainer,
    FineTuningArguments,
    RetrievalArguments,
    Stage1Arguments,
    Stage2Arguments,
)


def test_the_papers_settings(tmp_path):
    stage2 = Stage2Arguments(str(tmp_path))
    assert (stage2.max_steps, stage2.learning_rate, stage2.adam_beta2, stage2.weight_decay) == (
        80_000,
        1e-4,
        0.98,
        0.05,
    )
    assert stage2.lr_scheduler_kwargs["min_lr_rate"] == pytest.approx(0.5)
    assert Stage2Arguments(str(tmp_path), num_train_epochs=3).max_steps == -1
    tuning = FineTuningArguments(str(tmp_path))
    assert (tuning.num_train_epochs, tuning.learning_rate, tuning.warmup_steps) == (5, 1e-5, 1000)
    assert (tuning.adam_beta2, tuning.preset, tuning.predict_with_generate) == (0.999, "finetune", True)
    retrieval = RetrievalArguments(str(tmp_path))
    assert (retrieval.num_train_epochs, retrieval.learning_rate, retrieval.warmup_steps) == (5, 1e-5, 1000)
    assert (retrieval.adam_beta2, retrieval.preset, retrieval.vision_layer_decay) == (0.999, "finetune", 0.95)


def test_a_learning_rate_below_the_papers_last_one_does_not_rise(tmp_path):
    assert Stage2Arguments(str(tmp_path), learning_rate=1e-5).lr_scheduler_kwargs["min_lr_rate"] == 1
    assert Stage2Arguments(str(tmp_path), learning_rate=0.0).lr_scheduler_kwargs["min_lr_rate"] == 0


def test_other_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make_arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="no numbered blocks that are trained"):
        make_trainer(tmp_path, preset="stage2", vision_layer_decay=0.5).create_optimizer()
    with pytest.raises(ValueError, match="Blip2Trainer takes Blip2Arguments"):
        Blip2Trainer(make_model(), transformers.TrainingArguments(str(tmp_path)))


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_metrics_see_the_new_text_alone(name, tmp_path):
    seen = []

    class Metrics(GeneratedTextMetrics):
        def __call__(self, prediction):
            seen.append((self.texts(prediction.predictions), self.texts(prediction.label_ids)))
            return super().__call__(prediction)

    trainer = make_trainer(tmp_path, name, compute_metrics=Metrics)
    metrics = trainer.evaluate()
    model, processor = trainer.model, trainer.processing_class
    texts, wanted = seen[0]
    assert wanted == CAPTIONS
    for row, text in zip(Pictures(), texts, strict=True):
        inputs = processor(images=row["image"], text="a photo of", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=6)
        alone = processor.post_process_image_text_to_text(tokens, input_ids=inputs["input_ids"])[0]
        assert text == alone.partition("\n")[0].strip()
    assert metrics["eval_exact_match"] == exact_match(texts, wanted)
    assert metrics["eval_word_f1"] == word_f1(texts, wanted)
    assert np.isfinite(metrics["eval_loss"])


def test_the_best_checkpoint_is_kept(tmp_path):
    scores = iter([0.1, 0.9, 0.2, 0.3])
    trainer = make_trainer(
        tmp_path,
        compute_metrics=lambda processor: lambda prediction: {"word_f1": next(scores)},
        max_steps=8,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.add_callback(transformers.EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = Blip2ForConditionalGeneration.from_pretrained(trainer.state.best_model_checkpoint)
    torch.testing.assert_close(best.query_tokens.weight, trainer.model.query_tokens.weight)


def test_generation_settings_stay_as_they_are(tmp_path):
    """Trainer fills in defaults as it evaluates, of which a second limit of length would be saved."""
    trainer = make_trainer(tmp_path, compute_metrics=GeneratedTextMetrics)
    before = trainer.model.generation_config.to_dict()
    trainer.evaluate()
    assert trainer.model.generation_config.to_dict() == before
    trainer.save_model()
    saved = Blip2ForConditionalGeneration.from_pretrained(tmp_path).generation_config
    assert (saved.max_new_tokens, saved.max_length) == (6, None)


def test_adapters_are_drawn_by_the_seed(tmp_path):
    def draw(seed: int) -> torch.Tensor:
        trainer = make_trainer(tmp_path, preset="lora_language_model", seed=seed)
        return next(p for name, p in trainer.model.named_parameters() if "lora_A" in name)

    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_adapters_in_the_trainer(tmp_path):
    """Evaluation by generation, checkpoints of adapters alone, the same losses after a stop."""
    options = {"preset": "lora_language_model", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    torch.manual_seed(0)
    whole = make_trainer(tmp_path / "whole", compute_metrics=GeneratedTextMetrics, **options)
    whole.train()
    assert whole.evaluate()["eval_word_f1"] >= 0
    assert (tmp_path / "whole" / "checkpoint-2" / "adapter_config.json").exists()
    assert not (tmp_path / "whole" / "checkpoint-2" / "model.safetensors").exists()
    torch.manual_seed(0)
    rest = make_trainer(tmp_path / "rest", **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    np.testing.assert_allclose(losses(rest)[-2:], losses(whole)[-2:], rtol=1e-5)


def test_resuming_with_a_learning_rate_for_each_layer(tmp_path):
    options = {"vision_layer_decay": 0.5, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make_trainer(tmp_path / "whole", model=remove_dropout(make_model()), **options)
    whole.train()
    rest = make_trainer(tmp_path / "rest", model=remove_dropout(make_model()), **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    np.testing.assert_allclose(losses(rest)[-2:], losses(whole)[-2:], rtol=1e-5)


def test_adapters_in_stage_1_are_still_stage_1(tmp_path):
    arguments = Stage1Arguments(str(tmp_path), preset="lora_qformer", gradient_caching_chunk_size=2, use_cpu=True)
    trainer = Blip2Trainer(make_stage1(), arguments)
    assert trainer.model.get_base_model().gradient_caching_chunk_size == 2


def test_exact_match_and_word_f1():
    assert exact_match(["A  dog", "cat"], ["a dog", "bird"]) == 0.5
    assert word_f1(["a dog", "two"], ["a cat", "two"]) == pytest.approx((0.5 + 1) / 2)


def test_accumulated_batches_weigh_each_label_alike(tmp_path):
    histories = []
    for batch_size, steps in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path,
            kind=Stage2Arguments,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=3,
            seed=1,
            model=remove_dropout(make_model()),
        )
        trainer.train()
        histories.append(losses(trainer))
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-4)
