"""
Train a captioner by reward: its own captions, by how much they are like the references (CIDEr-D), with TRL's GRPO.

That is self-critical training (Rennie et al. 2017), with the mean of several captions of a picture as the baseline.

    make demo                              # trains the captioner that this starts from
    pip install "trl>=1.16"
    python examples/reward_captions.py     # a table: reward, held-out CIDEr-D, and captions that are right

The scenes are drawn in a style that the demo never saw. docs/results.md has the table.
"""

import argparse
import json
import statistics
from pathlib import Path

import datasets
import torch
import transformers
from scenes import TEST_STYLE, exact, make_scenes
from transformers import pipeline

from blip2_hf import Blip2ForConditionalGeneration, Blip2Processor
from blip2_hf.jobs.errors import tell_errors
from blip2_hf.rewards import CiderReward


PROMPT = [{"role": "user", "content": ""}]  # a message without text asks for a caption
LONGEST = 12  # tokens


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--model", type=Path, default=Path("outputs/demo/model"), help="captioner to start from")
    parser.add_argument("--output", type=Path, default=Path("outputs/rewarded"), help="folder of models and table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=32, help="steps of 8 pictures with 4 captions each")
    parser.add_argument("--learning-rate", type=float, default=6e-5)
    parser.add_argument("--test", type=int, default=200, help="held-out scenes")
    return parser.parse_args()


def evaluate(model: torch.nn.Module, processor: Blip2Processor, scenes: datasets.Dataset, reward: CiderReward) -> dict:
    """Return CIDEr-D and the share of right captions, written by greedy search."""
    captioner = pipeline("image-to-text", model=model.eval(), processor=processor)
    found = captioner(list(scenes["image"]), batch_size=20, generate_kwargs={"max_new_tokens": LONGEST})
    captions = [caption[0]["generated_text"] for caption in found]
    cider_d = statistics.mean(reward(captions, references=scenes["captions"]))
    return {"held-out CIDEr-D": cider_d, "right (%)": 100 * exact(captions, scenes)}


def train(seed: int, rows: datasets.Dataset, reward: CiderReward, options: argparse.Namespace):
    """Train the Q-Former and the projection on the reward of captions that are sampled, and return the trainer."""
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(
        str(options.output / f"seed{seed}"),
        seed=seed,
        max_steps=options.steps,
        per_device_train_batch_size=32,
        num_generations=4,
        max_completion_length=LONGEST,
        learning_rate=options.learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        disable_tqdm=True,
    )
    model = Blip2ForConditionalGeneration.from_pretrained(options.model)
    processor = Blip2Processor.from_pretrained(options.model)
    trainer = GRPOTrainer(model, reward, settings, rows, processing_class=processor)
    trainer.train()
    return trainer


def main():
    options = parse_arguments()
    transformers.logging.set_verbosity_error()
    scenes = make_scenes((TEST_STYLE,), 8 * options.steps, "rewarded")
    test = make_scenes((TEST_STYLE,), options.test, "rewarded test")
    reward = CiderReward(scenes["captions"])
    rows = scenes.select_columns(["image", "captions"]).rename_column("captions", "references")
    rows = rows.add_column("prompt", [PROMPT] * len(rows))
    processor = Blip2Processor.from_pretrained(options.model)
    model = Blip2ForConditionalGeneration.from_pretrained(options.model)
    results = {"before": evaluate(model, processor, test, reward)}
    for seed in options.seeds:
        trainer = train(seed, rows, reward, options)
        # Pictures differ from step to step, so that single steps tell little
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        tenth = max(1, len(rewards) // 10)
        first, last = statistics.mean(rewards[:tenth]), statistics.mean(rewards[-tenth:])
        results[f"seed {seed}"] = evaluate(trainer.model, processor, test, reward)
        results[f"seed {seed}"] |= {"reward, first steps": first, "reward, last steps": last}
        trainer.save_model()
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "results.json").write_text(json.dumps(results, indent=1))
        print(f"seed {seed}: {results[f'seed {seed}']}", flush=True)
    columns = ["reward, first steps", "reward, last steps", "held-out CIDEr-D", "right (%)"]
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, row in results.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:.2f}" if c in row else "" for c in columns) + " |")


if __name__ == "__main__":
    with tell_errors("reward_captions.py"):
        main()
