"""TRL's trainers train two steps, and their losses and log-probabilities are the model's own."""

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from tiny import CAPTIONS, DECODER_ONLY, NUM_QUERIES, make_image_processor, make_model, make_tokenizer

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.cli import main
from blip2_hf.rewards import CiderReward


trl = pytest.importorskip("trl")
trl_rewards = pytest.importorskip("trl.rewards")

# The assistant's turns, which are what is learned, are marked
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}</s>{% endgeneration %}{% else %}{{ message.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_processor() -> Blip2Processor:
    return Blip2Processor(
        make_image_processor(), make_tokenizer(), num_query_tokens=NUM_QUERIES, chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder, processor = str(tmp_path_factory.mktemp("model")), make_processor()
    make_model("llama", image_token_index=processor.image_token_id).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (28, 28, 3), dtype=np.uint8)) for _ in CAPTIONS]


def said(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def rows(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {"images": [image], **{name: column(caption) for name, column in columns.items()}}
            for image, caption in zip(pictures(), CAPTIONS, strict=True)
        ]
    )


PROMPT_COMPLETION = {"prompt": lambda _: "a photo of", "completion": lambda caption: f" {caption}"}
CONVERSATION = {
    "prompt": lambda _: said("user", "what is it?"),
    "completion": lambda caption: said("assistant", caption),
}
MESSAGES = {"messages": lambda caption: said("user", "what is it?") + said("assistant", caption)}


def arguments(config_class, folder, **settings):
    common = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False}
    return config_class(str(folder), **common, logging_steps=1, save_strategy="no", learning_rate=1e-3, **settings)


def trained(trainer, log: str = "loss") -> list[float]:
    """Train, and return what was logged at each step."""
    model = trainer.model
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer.train()
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert any("qformer" in name for name in changed) and any("language_projection" in name for name in changed)
    assert not any("language_model." in name and "lora" not in name for name in changed)
    values = [entry[log] for entry in trainer.state.log_history if log in entry]
    assert len(values) == 2 and all(np.isfinite(values))
    return values


needs_masks = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="TRL's assistant_only_loss needs transformers 5.18"
)


@pytest.mark.parametrize(
    "columns",
    [
        pytest.param(PROMPT_COMPLETION, id="text"),
        pytest.param(CONVERSATION, id="chat"),
        pytest.param(MESSAGES, id="messages", marks=needs_masks),
    ],
)
def test_sft_has_the_loss_of_the_model_and_trains(columns, saved, tmp_path):
    model, processor = Blip2ForConditionalGeneration.from_pretrained(saved), Blip2Processor.from_pretrained(saved)
    settings = arguments(trl.SFTConfig, tmp_path, max_length=None, assistant_only_loss=columns is MESSAGES)
    data = rows(**columns)
    trainer = trl.SFTTrainer(model, args=settings, train_dataset=data, processing_class=processor)
    batch = trainer.data_collator([data[0], data[1]])
    learned = [processor.tokenizer.decode(row[row != -100]).strip() for row in batch["labels"]]
    end = "" if columns is PROMPT_COMPLETION else "</s>"
    assert [text.removesuffix("\n") for text in learned] == [caption + end for caption in CAPTIONS[:2]]
    with torch.no_grad():
        own, of_trl = model.eval()(**batch), model(**batch, fused_lm_head=True)
    torch.testing.assert_close(of_trl.loss, own.loss, rtol=1e-5, atol=1e-5)
    trained(trainer)


def test_sft_loads_a_model_by_its_name_and_commands_open_the_result(saved, tmp_path, capsys):
    settings = arguments(trl.SFTConfig, tmp_path / "run", max_length=None)
    trainer = trl.SFTTrainer(saved, args=settings, train_dataset=rows(**CONVERSATION))
    assert isinstance(trainer.model, Blip2ForConditionalGeneration)
    assert isinstance(trainer.processing_class, Blip2Processor)
    trained(trainer)
    trainer.save_model(str(tmp_path / "learned"))
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "learned")
    assert torch.equal(model.language_projection.weight, trainer.model.language_projection.weight)
    picture = tmp_path / "picture.png"
    pictures()[0].save(picture)
    processor = Blip2Processor.from_pretrained(tmp_path / "learned")
    question = {"type": "text", "text": "what is it?"}
    chat = [{"role": "user", "content": [{"type": "image", "path": str(picture)}, question]}]
    pipe = transformers.pipeline("image-text-to-text", model=str(tmp_path / "learned"))
    answer = pipe(text=chat, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = model.generate(**inputs, max_new_tokens=6)
    assert processor.post_process_image_text_to_text(expected, inputs["input_ids"]) == [answer.strip()]
    main(["caption", str(picture), "--model", str(tmp_path / "learned"), "--max-new-tokens", "6"])
    assert capsys.readouterr().out.strip()


def test_sft_trains_adapters(saved, tmp_path):
    model, processor = Blip2ForConditionalGeneration.from_pretrained(saved), Blip2Processor.from_pretrained(saved)
    lora = peft.LoraConfig(r=2, target_modules=r"language_model\..*\.(q_proj|v_proj)", init_lora_weights=False)
    settings = arguments(trl.SFTConfig, tmp_path, max_length=None)
    data = rows(**CONVERSATION)
    trainer = trl.SFTTrainer(model, args=settings, train_dataset=data, processing_class=processor, peft_config=lora)
    batch = trainer.data_collator([data[0], data[1]])
    with torch.no_grad():
        own, of_trl = trainer.model.eval()(**batch), trainer.model(**batch, fused_lm_head=True)
    torch.testing.assert_close(of_trl.loss, own.loss, rtol=1e-5, atol=1e-5)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    changed = [name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])]
    assert changed and all("lora_" in name for name in changed)


@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "text"])
def test_dpo_starts_from_equal_log_probabilities_and_trains(is_chat, saved, tmp_path):
    model, processor = Blip2ForConditionalGeneration.from_pretrained(saved), Blip2Processor.from_pretrained(saved)
    written = said if is_chat else lambda role, text: text if role == "user" else f" {text}"
    data = rows(
        prompt=lambda _: written("user", "what is it?"),
        chosen=lambda caption: written("assistant", caption),
        rejected=lambda _: written("assistant", "no"),
    )
    settings = arguments(trl.DPOConfig, tmp_path)
    trainer = trl.DPOTrainer(model, args=settings, train_dataset=data, processing_class=processor)
    # The reference, which the trainer has loaded, is the model itself at the first step
    assert trained(trainer)[0] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_rewards_what_the_model_writes_and_trains(beta, saved, tmp_path):
    model, processor = Blip2ForConditionalGeneration.from_pretrained(saved), Blip2Processor.from_pretrained(saved)
    seen = []

    def length(completions, caption, **kwargs):
        texts = [completion[0]["content"] for completion in completions]
        seen.extend(zip(texts, caption, strict=True))
        return [float(len(text)) for text in texts]

    data = rows(
        prompt=lambda _: said("user", "what is it?"), caption=lambda caption: caption, references=lambda text: [text]
    )
    settings = arguments(trl.GRPOConfig, tmp_path, num_generations=2, max_completion_length=6, beta=beta)
    rewards = [length, CiderReward(data["references"]), trl_rewards.get_repetition_penalty_reward()]
    trainer = trl.GRPOTrainer(model, rewards, args=settings, train_dataset=data, processing_class=processor)
    lengths = trained(trainer, "rewards/length/mean")
    assert all("rewards/cider_d/mean" in entry for entry in trainer.state.log_history[:2])
    assert len(seen) == 4 and {caption for _, caption in seen} <= set(CAPTIONS)
    assert lengths[0] == pytest.approx(np.mean([len(text) for text, _ in seen[:2]]))


@pytest.mark.parametrize("in_front", [False, True], ids=["placeholders", "images in front"])
@pytest.mark.parametrize("language_model", DECODER_ONLY)
def test_hidden_states_of_the_base_model_give_the_logits(language_model, in_front):
    torch.manual_seed(0)
    processor = make_processor()
    index = None if in_front else processor.image_token_id
    processor.num_query_tokens = None if in_front else NUM_QUERIES
    model = make_model(language_model, image_token_index=index)
    batch = processor(images=pictures()[:3], text=CAPTIONS[:3], return_tensors="pt")
    with torch.no_grad():
        hidden_states = model.base_model(**batch).last_hidden_state
        logits = model(**batch).logits[:, -batch["input_ids"].shape[1] :]
        torch.testing.assert_close(model.get_output_embeddings()(hidden_states), logits, rtol=1e-5, atol=1e-5)
