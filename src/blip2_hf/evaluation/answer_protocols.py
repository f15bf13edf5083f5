"""Protocols that score answers, and the lemmatiser in front of them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from .metrics import choose_vqa_protocol, gqa_accuracy, lemmatize_answers, pope, vqa_accuracy
from .metrics.lemmas import load_lemmatizer
from .metrics.pope import check_yes_or_no
from .metrics.vqa import check_annotators
from .samples import QuestionSample


class AnswerProtocol(NamedTuple):
    """A metric of answers and lists of references, and the benchmark's names of question and answer."""

    score: Callable[[list[str], list[list[str]]], dict[str, float]]
    question_name: str = "question_id"
    answer_name: str = "answer"


def _of_one_answer(
    predictions: list[str], references: list[list[str]], score: Callable[..., dict[str, float]], **kwargs: str
) -> dict[str, float]:
    return score(predictions, [answer for (answer,) in references], **kwargs)


_GQA_NAMES = ("questionId", "prediction")
ANSWER_PROTOCOLS = {
    "official": AnswerProtocol(partial(vqa_accuracy, protocol="official")),
    "lavis": AnswerProtocol(partial(vqa_accuracy, protocol="lavis")),
    "exact": AnswerProtocol(partial(vqa_accuracy, protocol="exact")),
    "normalized": AnswerProtocol(partial(_of_one_answer, score=gqa_accuracy, protocol="normalized"), *_GQA_NAMES),
    "strict": AnswerProtocol(partial(_of_one_answer, score=gqa_accuracy, protocol="strict"), *_GQA_NAMES),
    "pope": AnswerProtocol(partial(_of_one_answer, score=pope)),
}


def check_protocol(samples: Sequence[QuestionSample], protocol: str | None, lemmatize: bool) -> str:
    """
    Check, before anything is predicted, that the answers can be scored as asked, and return the protocol: the one that
    is given, or the one that the data choose ([`choose_vqa_protocol`]). Questions without answers are not scored.
    """
    scored = [sample for sample in samples if sample.answers]
    references = [sample.answers for sample in scored]
    if protocol is None:
        protocol = choose_vqa_protocol(references)
    if protocol not in ANSWER_PROTOCOLS:
        raise ValueError(f"protocol={protocol!r}: one of {', '.join(ANSWER_PROTOCOLS)} was expected.")
    if protocol in ("normalized", "strict"):
        for sample in scored:
            if len(sample.answers) > 1:
                raise ValueError(
                    f"question {sample.question_id} has {len(sample.answers)} answers; protocol={protocol!r} is GQA's "
                    "and takes one. Give protocol='exact': a match with one of several counts 1."
                )
    elif protocol == "pope":
        check_yes_or_no(references, [sample.question_id for sample in scored])
    else:
        check_annotators(references, protocol, [sample.question_id for sample in scored])
    if lemmatize and scored:
        load_lemmatizer()
    return protocol


def answer_scorer(protocol: str, lemmatize: bool) -> Callable[[list[str], list[list[str]]], dict[str, float]]:
    """Return the metric of a protocol, for predictions that it lemmatises first if asked."""
    score = ANSWER_PROTOCOLS[protocol].score
    if not lemmatize:
        return score
    return lambda predictions, references: score(lemmatize_answers(predictions), references)
