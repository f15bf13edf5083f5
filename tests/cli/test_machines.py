"""Commands on two machines with one process each, which share the output and nothing else."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from docs_world import SIZES
from processes import make_machine, run
from safetensors.torch import load_file
from saved_models import save_captioner, save_stage1
from stage1 import Processor
from tiny import make_image, make_image_processor

from blip2_hf.capfilt.result import ResultFiles
from blip2_hf.captioning.caption_output import CaptionOutput
from blip2_hf.cli import main
from blip2_hf.data import load_cached_features


WORDS = ["a dog", "a red bus", "two people", "the sky", "green house", "big tree"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Thirteen pictures with captions, and models."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "photos").mkdir()
    for number in range(13):
        make_image(number).save(folder / "photos" / f"{number:02d}.png")
        (folder / "photos" / f"{number:02d}.txt").write_text(f"{WORDS[number % 6]} {number}")
    save_captioner(folder / "captioner")
    save_stage1(folder / "stage1")
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=28)).save_pretrained(folder / "tower")
    make_image_processor().save_pretrained(folder / "tower")
    sizes = {**SIZES, "vocab_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder / "bert")
    Processor().tokenizer.save_pretrained(folder / "bert")
    return folder


def caption(world: Path, output: Path) -> list[str]:
    model = ["--model", str(world / "captioner"), "--max-new-tokens", "5", "--batch-size", "1", "--num-workers", "0"]
    return ["caption", str(world / "photos"), *model, "--output", str(output)]


def evaluate(world: Path, output: Path) -> list[str]:
    model = ["--model", str(world / "captioner"), "--generate", "max_new_tokens=5", "min_new_tokens=0"]
    options = [*model, "--num-workers", "0", "--output", str(output)]
    return ["evaluate", "caption", "--data", str(world / "photos"), *options]


def cache_features(world: Path, output: Path) -> list[str]:
    model = ["--vision-model", str(world / "tower"), "--size", "28", "--rows-per-shard", "2", "--num-workers", "0"]
    return ["cache-features", str(world / "photos"), *model, "--output", str(output)]


def pretrain(world: Path, features: Path, output: Path, batch_size: int) -> list[str]:
    """Stage 1 without chance: features are not cropped, and there is no dropout."""
    parts = ["--vision-model", str(world / "tower"), "--text-encoder", str(world / "bert"), "--image-size", "28"]
    steps = ["--max-steps", "3", "--learning-rate", "0.01", "--optim", "sgd", "--logging-steps", "1"]
    rest = ["--held-out", "4", "--batch-size", str(batch_size), "--num-query-tokens", "4", "--output", str(output)]
    return ["pretrain", str(features), "--stage", "1", *parts, *steps, *rest]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(output: Path) -> list[float]:
    state = json.loads(max(output.glob("checkpoint-*")).joinpath("trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def assert_same_results(world: Path, one: Path, two: Path):
    """Compare what one process and two machines have written."""
    assert read_lines(two / "captions.jsonl") == read_lines(one / "captions.jsonl")
    assert [row["file"] for row in read_lines(two / "captions.jsonl")] == [f"{n:02d}.png" for n in range(13)]
    results = [json.loads((folder / "scores" / "results.json").read_text()) for folder in (one, two)]
    assert [result["run"]["num_processes"] for result in results] == [1, 2]
    assert results[0]["scores"] == results[1]["scores"] and results[0]["settings"] == results[1]["settings"]
    predictions = [json.loads((folder / "scores" / "predictions.json").read_text()) for folder in (one, two)]
    assert predictions[0] == predictions[1]
    features = [load_cached_features(folder / "features") for folder in (one, two)]
    assert features[0].to_list() == features[1].to_list() and len(features[0]) == 13


def without_chance(commands: list[list[str]]):
    """Run commands one after another, with the likeliest negatives."""
    torch.multinomial = lambda weights, *args, **kwargs: weights.argmax(-1, keepdim=True)
    for arguments in commands:
        main(arguments)


def jobs(world: Path, folder: Path) -> list[list[str]]:
    return [
        caption(world, folder / "captions.jsonl"),
        evaluate(world, folder / "scores"),
        cache_features(world, folder / "features"),
    ]


def test_two_machines_write_what_one_process_writes(world, tmp_path):
    """Both machines have a process 0 of their own."""
    for one, two in zip(jobs(world, tmp_path / "one"), jobs(world, tmp_path / "two"), strict=True):
        folder = tmp_path / f"printed-{one[0]}"
        folder.mkdir()
        main(one)
        first, second = run(main, two, folder=folder, processes=2, machines=2)
        # The second machine says nothing of the result
        assert second.stdout == "" and (first.stdout == "") == (one[0] == "caption")
    assert_same_results(world, tmp_path / "one", tmp_path / "two")


def caption_blindly(command: list[str]):
    """Run a command on a machine that does not see yet what others wrote, unless it is the first."""
    if os.environ["RANK"] == "1":
        CaptionOutput.done = lambda self: set()
        CaptionOutput.parts = lambda self: []
    main(command)


def test_a_machine_that_does_not_see_the_output_yet(world, tmp_path):
    """It would count another share of the pictures: some would be captioned twice, some not at all."""
    output = tmp_path / "captions.jsonl"
    main(caption(world, output))
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:8]))
    first, _ = run(caption_blindly, caption(world, output), folder=tmp_path, processes=2, machines=2)
    assert "Captions written: 5." in first.stderr
    assert output.read_text() == "".join(lines)


def capfilt_blindly(command: list[str]):
    """Run a command on a machine that does not see what others wrote, unless it is the first."""
    if os.environ["RANK"] == "1":
        ResultFiles.report = lambda self: pytest.fail("the files of others are not there")
        ResultFiles.check_own = ResultFiles.report
    main(command)


def test_a_machine_that_does_not_see_the_filtered_rows_at_the_end(world, tmp_path):
    models = ["--captioner", str(world / "captioner"), "--filter", str(world / "stage1"), "--num-captions", "2"]
    options = ["--rows-per-shard", "4", "--num-workers", "0", "--output", str(tmp_path / "filtered")]
    command = ["capfilt", str(world / "photos"), *models, *options]
    first, second = run(capfilt_blindly, command, folder=tmp_path, processes=2, machines=2)
    assert "13 of 13 rows are in the result" in first.stderr and "in the result" not in second.stderr


@pytest.mark.slow
def test_stage1_on_two_machines_is_that_of_one_process_with_both_batches(world, tmp_path, capsys):
    """From features that the machines have stored, and on to a search by what they have trained."""
    folders = {"one": (1, 8), "two": (2, 4)}
    for name, (count, batch_size) in folders.items():
        features = tmp_path / f"features-{name}"
        commands = [cache_features(world, features), pretrain(world, features, tmp_path / name, batch_size)]
        run(without_chance, commands, folder=tmp_path, processes=count, machines=count)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in folders)
    assert len(logged(tmp_path / "one")) == 3
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-4)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    index = ["--index", str(tmp_path / "index")]
    main(["index", str(world / "photos"), "--model", str(tmp_path / "two"), "--num-workers", "0", *index])
    capsys.readouterr()
    main(["search", "a dog", *index, "--json"])
    assert len(json.loads(capsys.readouterr().out)) == 12


def test_index_runs_in_one_process(world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="index was started in 2 processes"):
        main(["index", str(world / "photos"), "--model", str(world / "stage1")])


class Machines:
    """Two `accelerate launch`, each with an environment of its own. `--multi_gpu` is for CPUs too."""

    def __init__(self, folder: Path, *command: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.files = [folder / f"machine-{rank}.txt" for rank in range(2)]
        self.started = []
        for rank, file in enumerate(self.files):
            own = make_machine(folder / f"machine-{rank}")
            place = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--machine_rank", str(rank)]
            launch = ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", *place, "-m", "blip2_hf.cli"]
            arguments = [sys.executable, "-m", "accelerate.commands.launch", *launch, *command]
            with file.open("w") as output:
                process = subprocess.Popen(
                    arguments,
                    cwd=own["PWD"],
                    env={**os.environ, **own},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self.started.append(process)

    def wait(self, timeout: float = 300) -> list[int]:
        return [process.wait(timeout) for process in self.started]

    def kill(self, rank: int):
        """Kill all processes of a machine. torchrun starts its own in sessions of their own."""
        launcher = psutil.Process(self.started[rank].pid)
        for process in [*launcher.children(recursive=True), launcher]:
            process.kill()

    def printed(self) -> list[str]:
        return [file.read_text() for file in self.files]


@pytest.mark.slow
def test_accelerate_launch_on_two_machines(world, tmp_path):
    for one, two in zip(jobs(world, tmp_path / "one"), jobs(world, tmp_path / "two"), strict=True):
        main(one)
        machines = Machines(tmp_path, *two)
        assert machines.wait() == [0, 0], machines.printed()
    assert_same_results(world, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_captions_go_on_after_a_machine_is_killed(world, tmp_path):
    main(caption(world, tmp_path / "one.jsonl"))
    command = caption(world, tmp_path / "two.jsonl")
    machines = Machines(tmp_path, *command)
    part = tmp_path / "two.jsonl.part-00001.jsonl"
    ends = time.monotonic() + 200
    while not (part.exists() and part.stat().st_size) and time.monotonic() < ends:
        time.sleep(0.01)
    machines.kill(1)
    # The first machine ends by itself: the other one has closed its connection
    assert all(machines.wait()), machines.printed()
    done = len(part.read_text().splitlines())
    assert done > 0 and not (tmp_path / "two.jsonl").exists()
    again = Machines(tmp_path, *command)
    assert again.wait() == [0, 0], again.printed()
    assert "0 done already" not in again.printed()[0]
    assert read_lines(tmp_path / "two.jsonl") == read_lines(tmp_path / "one.jsonl")
