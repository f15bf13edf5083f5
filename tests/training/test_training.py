"""Plain `Trainer`, `Seq2SeqTrainer` and PEFT, a few steps each."""

import numpy as np
import peft
import pytest
import torch
import transformers
from stage2 import CAPTIONS, Pictures, losses, make_collator, remove_dropout
from tiny import make_image, make_model, make_processor

from blip2_hf import Blip2ForConditionalGeneration


NAMES = ["opt", "t5"]


def make_trainer(model, processor, folder, kind=transformers.Trainer, **options):
    arguments = {transformers.Trainer: transformers.TrainingArguments}.get(kind, transformers.Seq2SeqTrainingArguments)
    trainer_options = {k: options.pop(k) for k in ("compute_metrics", "callbacks") if k in options}
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "remove_unused_columns": False,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return kind(
        model=model,
        args=arguments(**(defaults | options)),
        train_dataset=Pictures(),
        eval_dataset=Pictures(),
        data_collator=make_collator(processor),
        processing_class=processor,
        **trainer_options,
    )


def assert_learns(trainer):
    trainer.train()
    history = losses(trainer)
    # A frozen language model of random weights can be steered only so far
    assert np.mean(history[:2]) - np.mean(history[-3:]) > 0.1, history


@pytest.mark.parametrize("name", NAMES)
def test_trainer_trains_the_qformer_and_leaves_the_frozen_parts_alone(name, tmp_path):
    model, processor = make_model(name), make_processor(is_encoder_decoder=name == "t5")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = make_trainer(model, processor, tmp_path)
    assert_learns(trainer)
    for key, value in model.state_dict().items():
        frozen = key.startswith(("language_model.", "vision_model.e"))
        assert torch.equal(value, before[key]) == frozen or "key.bias" in key, key


@pytest.mark.parametrize("name", NAMES)
def test_gradient_accumulation_gives_the_same_loss(name, tmp_path):
    processor = make_processor(is_encoder_decoder=name == "t5")
    histories = []
    for batch_size, steps in ((4, 1), (2, 2), (1, 4)):
        torch.manual_seed(0)
        model = make_model(name)
        remove_dropout(model)
        trainer = make_trainer(
            model,
            processor,
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=3,
            seed=1,
        )
        trainer.train()
        histories.append(losses(trainer))
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-4)
    np.testing.assert_allclose(histories[2], histories[0], rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_evaluate_with_compute_metrics(name, tmp_path):
    model, processor = make_model(name), make_processor(is_encoder_decoder=name == "t5")

    def compute_metrics(prediction):
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        labels = prediction.label_ids
        if name != "t5":
            logits, labels = logits[:, :-1], labels[:, 1:]
        learned = labels != -100
        return {"accuracy": float((logits.argmax(-1) == labels)[learned].mean()), "tokens": int(learned.sum())}

    trainer = make_trainer(model, processor, tmp_path, compute_metrics=compute_metrics, max_steps=60)
    before = trainer.evaluate()
    assert before["eval_tokens"] > len(CAPTIONS)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] > before["eval_accuracy"]
    assert after["eval_loss"] < before["eval_loss"]


@pytest.mark.parametrize("name", NAMES)
def test_seq2seq_trainer_predicts_with_generate(name, tmp_path):
    model, processor = make_model(name), make_processor(is_encoder_decoder=name == "t5")
    seen = []

    def compute_metrics(prediction):
        predictions = np.where(prediction.predictions < 0, processor.tokenizer.pad_token_id, prediction.predictions)
        seen.extend(processor.tokenizer.batch_decode(predictions, skip_special_tokens=True))
        return {"count": len(predictions)}

    trainer = make_trainer(
        model,
        processor,
        tmp_path,
        kind=transformers.Seq2SeqTrainer,
        predict_with_generate=True,
        generation_max_length=40,
        compute_metrics=compute_metrics,
        max_steps=2,
    )
    trainer.train()
    assert trainer.evaluate()["eval_count"] == len(CAPTIONS) == len(seen)
    # The answer in the prompt would be a perfect score
    assert not any(caption in text for caption, text in zip(CAPTIONS, seen, strict=True)), seen


def test_checkpoints_resume(tmp_path):
    processor = make_processor()
    whole = make_trainer(make_model(), processor, tmp_path / "whole", max_steps=6, seed=3)
    whole.train()
    torch.manual_seed(0)
    options = {"save_strategy": "steps", "save_steps": 3, "seed": 3}
    torch.manual_seed(0)
    half = make_trainer(make_model(), processor, tmp_path / "half", max_steps=3, **options)
    half.train()
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "half" / "checkpoint-3")
    rest = make_trainer(model, processor, tmp_path / "half", max_steps=6, **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    assert rest.state.global_step == 6
    np.testing.assert_allclose(losses(rest)[-3:], losses(whole)[-3:], rtol=1e-3)


PEFT = {
    "language model": peft.LoraConfig(
        r=8, target_modules=r"language_model\..*\.(q_proj|v_proj)", modules_to_save=["language_projection"]
    ),
    "Q-Former": peft.LoraConfig(
        r=8, target_modules=r"qformer\..*\.(query|key|value|dense)", modules_to_save=["language_projection"]
    ),
    "queries": peft.LoraConfig(
        r=1,
        target_modules=r"qformer\.encoder\.layer\.0\.attention\.attention\.query",
        modules_to_save=["query_tokens", "language_projection"],
    ),
}


@pytest.mark.parametrize("part", PEFT)
def test_peft(part, tmp_path):
    model, processor = make_model(), make_processor()
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, PEFT[part])
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    adapted.train()
    lm_trains = any(m.training for m in adapted.base_model.model.language_model.modules())
    assert lm_trains == (part == "language model")
    assert_learns(make_trainer(adapted, processor, tmp_path / "run", learning_rate=2e-2, max_steps=30))
    adapted.save_pretrained(tmp_path / "adapter")
    base = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs = processor(images=[make_image(0)], text="a photo of", return_tensors="pt")
    adapted.eval()
    torch.testing.assert_close(loaded(**inputs).logits, adapted(**inputs).logits)
    assert not torch.allclose(loaded(**inputs).logits, make_fresh(tmp_path)(**inputs).logits, atol=1e-3)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=3), adapted.generate(**inputs, max_new_tokens=3))


def make_fresh(folder):
    return Blip2ForConditionalGeneration.from_pretrained(folder / "base").eval()
