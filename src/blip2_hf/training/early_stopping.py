"""Which evaluation was the best, and a stop once none has been better for long enough."""

import math
from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerState

from .arguments import Blip2Arguments


class EarlyStopping(TrainerCallback):
    r"""
    Ends a training after some evaluations without improvement: a better `metric_for_best_model`, or an equal one with
    a lower loss. They are counted in the history of the training, which each checkpoint has, so a run that goes on
    counts on. transformers' `EarlyStoppingCallback` begins again.

    Args:
        patience (`int`):
            Number of evaluations without improvement until a stop.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def is_over(self, args: Blip2Arguments, state: TrainerState) -> bool:
        """
        Tell whether a training has ended.

        Args:
            args ([`Blip2Arguments`]):
                Its settings.
            state (`TrainerState`):
                Its state, or that of a checkpoint.

        Returns:
            `bool`: whether the last `patience` evaluations brought no improvement.
        """
        return _count_without_improvement(args, state) >= self.patience

    def on_evaluate(self, args, state, control, **kwargs):
        if self.is_over(args, state):
            control.should_training_stop = True


def is_as_good_as_the_best(args: Blip2Arguments, state: TrainerState, metrics: dict[str, float]) -> bool:
    """Return whether an evaluation has the metric of the best one, and no higher loss."""
    best = [logs for logs in state.log_history if logs.get("step") == state.best_global_step and "eval_loss" in logs]
    if not best or _metric(args, metrics) != state.best_metric:
        return False
    return metrics.get("eval_loss", math.inf) <= best[-1]["eval_loss"]


def _metric(args: Blip2Arguments, logs: dict[str, Any]) -> float | None:
    return logs.get(f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}")


def _count_without_improvement(args: Blip2Arguments, state: TrainerState) -> int:
    best, count = None, 0
    sign = 1 if args.greater_is_better else -1
    for logs in state.log_history:
        if (value := _metric(args, logs)) is None:
            continue
        score = (sign * value, -logs.get("eval_loss", math.inf))
        if best is None or score > best:
            best, count = score, 0
        else:
            count += 1
    return count


__all__ = ["EarlyStopping", "is_as_good_as_the_best"]
