"""
Train stage 1 on the pictures of the recipe, and evaluate it: retrieval of names and pictures, and captions.

Contrast alone comes first, in large batches, then all losses. Runs that differ only in the latter share the former.

    python examples/recipe/learn_stage1.py --variant full --seed 0
    python examples/recipe/learn_stage1.py --variant full --seed 0 --validate --set steps=300   # to choose settings

With --validate, one of the training styles is held out and tested on, and the test pictures are not used.
"""

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers
from evaluate_stage1 import evaluate
from features import choose_splits, image_processor
from safetensors.torch import load_model
from settings import FOLDER, STAGE1, Stage1
from training import fingerprint, learn, parse_options, save_json, save_tensors
from transformers import AutoTokenizer, BertConfig, BertModel


sys.path.insert(0, str(Path(__file__).parents[1]))
import two_towers  # noqa: E402
from demo import NEW_PARTS  # noqa: E402
from precision import computed_in  # noqa: E402
from real_assets import real_assets  # noqa: E402

from blip2_hf import Blip2ForPreTraining, Blip2Processor  # noqa: E402
from blip2_hf.data import ImageTextCollator, ImageTextPairs  # noqa: E402
from blip2_hf.models.losses import image_text_contrastive_loss, image_text_similarity  # noqa: E402
from blip2_hf.training import Blip2Trainer, Stage1Arguments  # noqa: E402


HEADS = ("itm_head", "lm_head.transform")


class NegativeCurriculum(Blip2ForPreTraining):
    """Draws the negatives of matching by their similarity, as the paper does, to the power of `hardness`."""

    hardness = 1.0

    def _draw_negatives(self, compared, is_match):
        return super()._draw_negatives({name: logits * self.hardness for name, logits in compared.items()}, is_match)


class WithoutMatching(Blip2ForPreTraining):
    """Leaves out the second pass, which is half of a step and which only matching needs."""

    def _second_pass(self, images, negative_images, text_embeds, *args):
        return self.itm_head.weight.new_zeros(3 * len(text_embeds), 2)


class LogsTemperature(Blip2Trainer):
    """Logs the temperature with each loss."""

    def log(self, logs, start_time=None):
        super().log(logs | {"temperature": self.model.temperature.weight.item()}, start_time)


class Contrast(LogsTemperature):
    """Learns from ITC alone, by one pass over the pictures and one over the texts."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        # Accelerate's own autocast covers only `forward`
        with self.accelerator.autocast():
            images = model.get_image_features(image_embeds=inputs["image_embeds"], return_dict=True).pooler_output
            texts = (inputs["input_ids"], inputs["attention_mask"])
            texts = model.get_text_features(*texts, return_dict=True).pooler_output
        logits = model.temperature(image_text_similarity(images.float(), texts.float()))
        is_match = inputs["image_ids"][:, None] == inputs["image_ids"]
        loss = image_text_contrastive_loss(logits, logits.T, is_match)
        return (loss, {"loss": loss}) if return_outputs else loss


class ContrastAndMore(Contrast):
    """Learns ITC from the whole batch and the other losses from a part of it. Negatives become harder."""

    def __init__(self, *args, settings: Stage1, **kwargs):
        self.settings = settings
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        first, last = self.settings.hardness
        self.model.hardness = first + (last - first) * self.state.global_step / self.state.max_steps
        if not self.settings.losses:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        part = {name: values[: self.settings.part] for name, values in inputs.items()}
        _, outputs = super(Contrast, self).compute_loss(model, part, return_outputs=True, **kwargs)
        is_whole = self.settings.part >= len(inputs["input_ids"])
        contrast = outputs["loss_itc"] if is_whole else super().compute_loss(model, inputs)
        loss = contrast + sum(outputs[f"loss_{name}"] for name in self.settings.losses)
        return (loss, outputs) if return_outputs else loss


def make_model(settings: Stage1) -> Blip2ForPreTraining:
    text_encoder = real_assets().text_encoder
    if settings.random_initialisation:
        text_encoder = BertModel(BertConfig.from_pretrained(text_encoder), add_pooling_layer=False)
    model_class = NegativeCurriculum if "itm" in settings.losses else WithoutMatching
    model = model_class.from_encoders_pretrained(
        two_towers.pretrained_folder(),
        text_encoder,
        num_query_tokens=settings.num_query_tokens,
        load_vision_tower=False,
        cross_attention_frequency=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        # Given here because there is no tokenizer beside the weights
        bos_token_id=30522,
        eos_token_id=102,
        vocab_size=30523,
    )
    # For small batches and short texts in bfloat16 on a CPU, twice as fast as the fused kernels
    model.set_attn_implementation("eager")
    if not settings.random_initialisation:
        # They are half of the weights, and some hundred names teach them little
        model.embeddings.word_embeddings.requires_grad_(False)
    return model


class Lesson:
    """Trains on drawings and their names: first by contrast, then by all losses. Equal names are no negatives."""

    def __init__(
        self, rows: datasets.Dataset, processor, settings: Stage1, seed: int, folder: Path, text: str = "name"
    ):
        pairs = ImageTextPairs(rows, text_column=text, id_column=text, seed=seed)
        self.rows, self.settings, self.where = rows, settings, (seed, folder)
        self.parts = pairs, ImageTextCollator(processor)

    def contrast(self, model) -> list[dict]:
        """Train by contrast alone, and return the log."""
        learned = learn(model, *self.parts, self.settings.contrast, NEW_PARTS, *self.where, Contrast, Stage1Arguments)
        return [entry | {"loss_itc": entry["loss"]} for entry in learned.state.log_history if "loss" in entry]

    def all_losses(self, model) -> list[dict]:
        """Train by all losses, and return the log."""
        # Of the parts without pretrained weights, contrast has trained all but two heads
        trainer = partial(ContrastAndMore, settings=self.settings)
        learned = learn(model, *self.parts, self.settings, HEADS, *self.where, trainer, Stage1Arguments)
        before = STAGE1[self.settings.after] if self.settings.after else None
        first, log = self.settings.contrast.steps + (before.steps if before else 0), []
        for entry in learned.state.log_history:
            log.append(entry | {"step": entry["step"] + first})
            if "loss" in entry:
                # The trainer has logged that of the part
                log[-1]["loss_itc"] = entry["loss"] - sum(entry[f"loss_{name}"] for name in self.settings.losses)
        return log


def contrast_once(model, lesson: Lesson, file: Path | None) -> list[dict]:
    """Load the model after contrast from `file` if its fingerprint fits, or train it. Return the log."""
    key = fingerprint(lesson.settings.contrast, lesson.rows)
    if file and file.exists():
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if saved.get("fingerprint") == key:
            model.load_state_dict(saved["model"])
            return saved["log"]
        print(f"{file} was made with other settings, pictures or dtypes, and is made again.")
    log = lesson.contrast(model)
    if file:
        save_tensors(file, {"model": model.state_dict(), "log": log, "fingerprint": key})
    return log


def go_on(model, folder: Path) -> list[dict]:
    """Load the weights of another variant, and return its log."""
    if not (folder / "results.json").exists():
        sys.exit(
            f"This variant continues from {folder}, which does not exist. Run that variant first, with this seed."
        )
    load_model(model, folder / "model" / "model.safetensors")
    return json.loads((folder / "results.json").read_text())["log"]


def override(settings: Stage1, values: dict) -> Stage1:
    """Change some settings: `steps=2` that of all losses, `contrast.steps=2` that of contrast alone."""
    inner = {name.removeprefix("contrast."): value for name, value in values.items() if "." in name}
    outer = {name: value for name, value in values.items() if "." not in name}
    return replace(settings, contrast=replace(settings.contrast, **inner), **outer)


def contrast_file(settings: Stage1, seed: int) -> Path:
    """Return the file of the model after contrast, which runs share."""
    start = ", random" if settings.random_initialisation else ""
    start += ", clip art" if settings.clip_art else ""
    return FOLDER / "contrast" / f"{settings.num_query_tokens} queries{start}-seed{seed}.pt"


def main():
    options = parse_options(__doc__.splitlines()[1], STAGE1)
    settings = override(STAGE1[options.variant], options.set)
    if settings.after and options.validate:
        sys.exit(
            f"{options.variant!r} continues from {settings.after!r}, which has learned from all styles. No style is "
            "left to test it on: leave out --validate."
        )
    folder = options.output or FOLDER / "stage1" / f"{options.variant}-seed{options.seed}"
    transformers.logging.set_verbosity_error()
    start = time.time()
    train_rows, tests = choose_splits(options.validate, settings.clip_art)
    # After the features, because computing them uses random numbers
    transformers.set_seed(options.seed)
    model = make_model(settings)
    tokenizer = AutoTokenizer.from_pretrained(real_assets().text_encoder)
    processor = Blip2Processor(image_processor(), tokenizer, num_query_tokens=settings.num_query_tokens)
    lesson = Lesson(train_rows, processor, settings, options.seed, folder)
    results = {}
    if settings.after is None:
        shared = None if options.validate or options.set else contrast_file(settings, options.seed)
        log = contrast_once(model, lesson, shared)
        results["contrast"] = evaluate(model, processor, tests, contrast_only=True)
    else:
        log = go_on(model, FOLDER / "stage1" / f"{settings.after}-seed{options.seed}")
    log += lesson.all_losses(model)
    trained = time.time()
    results |= evaluate(model, processor, tests)
    print(json.dumps(results, indent=1))
    print(f"{trained - start:.0f} s training, {time.time() - trained:.0f} s evaluating")
    if not options.validate:
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        record = {"results": results, "log": log, "seconds": trained - start, "computed in": computed_in()}
        save_json(folder / "results.json", record)


if __name__ == "__main__":
    main()
