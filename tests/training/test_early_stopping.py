"""Which checkpoint is the best one, and runs that stop early, are resumed, and are run again."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from stage2 import make_trainer

from blip2_hf import Blip2ForConditionalGeneration
from blip2_hf.training import EarlyStopping
from blip2_hf.training.early_stopping import is_as_good_as_the_best


EACH_STEP = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


def make_run(folder, scores: list[float], patience: int | None = None, max_steps: int = 8):
    left = iter(scores)
    metrics = {"compute_metrics": lambda processor: lambda prediction: {"word_f1": next(left)}}
    trainer = make_trainer(folder, **metrics, max_steps=max_steps, **EACH_STEP)
    if patience is not None:
        trainer.add_callback(EarlyStopping(patience))
    return trainer


def make_state(*evaluations: tuple[float, float], best: int | None = None) -> transformers.TrainerState:
    history = [
        {"step": step, "eval_word_f1": score, "eval_loss": loss} for step, (score, loss) in enumerate(evaluations, 1)
    ]
    score = None if best is None else evaluations[best - 1][0]
    return transformers.TrainerState(log_history=history, best_global_step=best, best_metric=score)


ARGS = SimpleNamespace(metric_for_best_model="word_f1", greater_is_better=True)


@pytest.mark.parametrize(
    ("score", "loss", "expected"),
    [(0.5, 1.9, True), (0.5, 2.0, True), (0.5, 2.1, False), (0.4, 1.0, False), (0.5, float("nan"), False)],
)
def test_of_equal_scores_the_lower_loss_counts(score, loss, expected):
    metrics = {"eval_word_f1": score, "eval_loss": loss}
    assert is_as_good_as_the_best(ARGS, make_state((0.5, 2.0), best=1), metrics) == expected
    assert not is_as_good_as_the_best(ARGS, make_state(), metrics)


@pytest.mark.parametrize(
    ("evaluations", "over"),
    [
        ([(0.5, 3.0), (0.4, 2.0), (0.5, 3.0)], True),
        ([(0.5, 3.0), (0.4, 2.0), (0.5, 2.9)], False),
        ([(0.5, 3.0), (0.4, 2.0), (0.6, 9.0)], False),
        ([(0.5, 3.0), (0.6, 3.0), (0.5, 2.0)], False),
        ([(0.0, 3.0)] * 3, True),
        ([], False),
    ],
)
def test_patience(evaluations, over):
    assert EarlyStopping(2).is_over(ARGS, make_state(*evaluations)) == over


def test_scores_that_stay_equal_leave_the_choice_to_the_loss(tmp_path):
    trainer = make_run(tmp_path, [0.0] * 6, patience=2, max_steps=6)
    trainer.train()
    losses = {logs["step"]: logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs}
    assert losses[6] < losses[1]
    best = max(step for step, loss in losses.items() if loss == min(losses.values()))
    assert trainer.state.best_global_step == best and trainer.state.global_step == 6
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")


def test_a_run_that_stopped_early_is_finished(tmp_path, capsys):
    first = make_run(tmp_path, [0.1, 0.9, 0.2, 0.3], patience=2)
    first.train()
    assert first.state.global_step == 4
    capsys.readouterr()
    again = make_run(tmp_path, [], patience=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 4 and "The training is finished" in capsys.readouterr().out
    best = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2")
    torch.testing.assert_close(again.model.query_tokens.weight, best.query_tokens.weight)
    # With more patience it goes on, and counts the two
    further = make_run(tmp_path, [0.4, 0.5, 0.6], patience=3)
    further.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert further.state.global_step == 5 and further.state.best_global_step == 2
