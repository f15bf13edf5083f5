"""Options of generation: what the commands make of them, and their checks before a model is loaded."""

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._parser import did_you_mean


if TYPE_CHECKING:
    from ..models.generation_presets import GenerationPreset

_OPTIONS = ("num_beams", "max_new_tokens", "top_p", "temperature")  # of commands, that generate has too
_OF_SAMPLING = {"top_p", "temperature", "top_k", "min_p", "typical_p"}  # without an effect on a search
# Arguments that other options stand for, and those that make generate return more than texts
_OTHERS = {
    "prompt": "--prompt",
    "num_return_sequences": "--captions-per-image or --num-captions",
    "return_dict_in_generate": None,
    "output_attentions": None,
    "output_hidden_states": None,
    "output_logits": None,
    "output_scores": None,
}

NORMALIZATION_HELP = (
    "how likely a choice is: sum of the tokens' log-probabilities (default), their mean, or relative to the prompt "
    "without the picture"
)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, above: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and above < value <= most


_FROM_1 = (lambda value: _is_whole(value, 1)), "a whole number of at least 1"
_FROM_0 = (lambda value: _is_whole(value, 0)), "a whole number of at least 0"
_ABOVE_0 = (lambda value: _is_number(value, 0)), "a number above 0"
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_beams": _FROM_1,
    "max_new_tokens": _FROM_1,
    "min_new_tokens": _FROM_0,
    "top_k": _FROM_0,
    "no_repeat_ngram_size": _FROM_0,
    "top_p": ((lambda value: _is_number(value, 0, 1)), "a number above 0 and at most 1"),
    "temperature": _ABOVE_0,
    "repetition_penalty": _ABOVE_0,
    "length_penalty": (_is_number, "a number"),
    "do_sample": ((lambda value: isinstance(value, bool)), "true or false"),
}


def given_generation(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `generate` that the options give. One that it does not have, or can't be, is refused."""
    given = {name: value for name in _OPTIONS if (value := getattr(options, name, None)) is not None}
    given |= dict(options.generate or [])
    if given.keys() & _OF_SAMPLING:
        given.setdefault("do_sample", True)
    for name, value in given.items():
        _check_argument(name, value)
    return given


def _check_argument(name: str, value: Any):
    from transformers import GenerationConfig

    known = set(GenerationConfig().to_dict()) - _OTHERS.keys()
    if name not in known:
        instead = _OTHERS.get(name)
        hint = did_you_mean(name, known) if instead is None else f" Give {instead}."
        raise ValueError(f"--generate {name}: there is no argument {name!r} of generate that can be given here.{hint}")
    fits, expected = _VALUES.get(name, (lambda value: True, ""))
    if not fits(value):
        raise ValueError(f"{name}={value!r} was given, {expected} was expected.")


def generation_with_preset(preset: "GenerationPreset", given: dict[str, Any]) -> dict[str, Any]:
    """
    Return the arguments of `generate` that are given, and the preset's others, within a given length. If the given
    ones ask for sampling, one text is sampled: beams are for a search.
    """
    kwargs = dict(preset.generate_kwargs)
    if given.get("do_sample") and "num_beams" not in given:
        kwargs["num_beams"] = 1
    if given.get("num_beams", kwargs.get("num_beams")) == 1:
        kwargs.pop("length_penalty", None)  # has a meaning for beams alone
    kwargs |= given
    if "min_new_tokens" in kwargs.keys() - given.keys():
        kwargs["min_new_tokens"] = min(kwargs["min_new_tokens"], kwargs["max_new_tokens"])
    return kwargs


def check_generation(kwargs: dict[str, Any], model: str, num_texts: int = 1, seed: int | None = None):
    """
    Refuse arguments of `generate` that do not go together, more texts of a picture than they give, and a seed of what
    is not sampled. `model` names the checkpoint, whose own settings hold for the others.
    """
    from transformers import GenerationConfig

    from ..jobs.inference import weights_place

    GenerationConfig(**kwargs).validate()
    try:
        own = GenerationConfig.from_pretrained(weights_place(model))
    except OSError:  # without settings of its own
        own = GenerationConfig()
    beams = kwargs.get("num_beams") or own.num_beams or 1
    samples = kwargs.get("do_sample", own.do_sample)
    if seed is not None and not samples:
        raise ValueError(f"--seed {seed}: nothing is sampled, so it would have no effect. Give --top-p 0.9 too.")
    if num_texts > beams and (beams > 1 or not samples):
        raise ValueError(
            f"{num_texts} captions of a picture were asked for, and a search with --num-beams {beams} writes at most "
            f"{beams}. Give --num-beams {num_texts}, or sample them: --num-beams 1 --top-p 0.9."
        )


def check_room(config: Any, kwargs: dict[str, Any], num_tokens: int = 1, num_images: int = 1):
    """
    Refuse more new tokens than the language model has positions for, behind the picture, or the frames of a video, and
    a prompt of some tokens.
    """
    text_config = config.text_config
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is None or (new := kwargs.get("max_new_tokens")) is None:
        return
    used = 1 if text_config.is_encoder_decoder else config.num_query_tokens * num_images + num_tokens
    # The last token is written, and not read
    room = positions - used + 1
    if new > room:
        ways = [f"at most {room}"] if room > 0 else []
        ways += ["fewer --num-frames"] if num_images > 1 else []
        raise ValueError(
            f"--max-new-tokens {new}: the language model has {positions} positions, and {used} are taken before the "
            f"first new token. Give {', or '.join(ways) or 'a shorter prompt'}."
        )
