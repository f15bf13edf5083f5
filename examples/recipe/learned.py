"""
What the models know of drawings that they have learned from, those by one of the hands: how much of what is missing on
the test hand has not been learned, and how much is lost from one hand to another.

    python examples/recipe/learned.py --seed 0
"""

import argparse

import transformers
from evaluate_stage1 import evaluate
from features import choose_splits
from learn_stage2 import score, write
from settings import FOLDER

from blip2_hf import Blip2ForConditionalGeneration, Blip2ForPreTraining, Blip2Processor


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    transformers.logging.set_verbosity_error()
    # The drawings that would be tested on with --validate; without it they are learned from
    _, tests = choose_splits(validate=True)
    folders = {stage: FOLDER / stage / f"full-seed{seed}" / "model" for stage in ("stage1", "stage2")}
    model = Blip2ForPreTraining.from_pretrained(folders["stage1"])
    results = evaluate(model, Blip2Processor.from_pretrained(folders["stage1"]), tests)["seen"]
    model = Blip2ForConditionalGeneration.from_pretrained(folders["stage2"])
    captions = write(model, Blip2Processor.from_pretrained(folders["stage2"]), tests["seen"])
    results |= {f"stage 2 {name}": value for name, value in score(captions, list(tests["seen"]["name"])).items()}
    print(*(f"{name:32} {value:.3f}" for name, value in results.items()), sep="\n")


if __name__ == "__main__":
    main()
