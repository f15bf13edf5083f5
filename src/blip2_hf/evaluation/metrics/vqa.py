"""VQA accuracy (Antol et al. 2015), with the normalisation of answers of the official evaluation; for OK-VQA too."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from .captions import check_texts


_ANNOTATORS = 10  # of a question in VQAv2 and OK-VQA
_LEAST_ANNOTATORS = 4  # with fewer, not even the answer of all annotators counts 1

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}

# A word that lacks one of these apostrophes gets it back.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_REPAIRED = {
    word[:index] + word[index + 1 :]: word
    for word in _CONTRACTIONS.split()
    for index, character in enumerate(word)
    if character == "'"
}
_REPAIRED["somebody'd"] = "somebodyd"  # the official table has this one the wrong way round


def _strip_punctuation(answer: str) -> str:
    """Remove each sign that is beside a space anywhere in the answer, and replace the others by a space."""
    text = answer
    comma_in_number = _COMMA_IN_NUMBER.search(answer) is not None  # then nothing becomes a space
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in answer or f" {sign}" in answer
        text = text.replace(sign, "" if beside_space or comma_in_number else " ")
    return _FULL_STOP.sub("", text, count=32)  # the official code passes re.UNICODE, 32, in the place of the count


def normalize_vqa_answer(answer: str) -> str:
    r"""
    Normalise an answer as the official VQA evaluation does: lower case, no punctuation, no articles, number words up
    to ten as digits, apostrophes put back.

    Args:
        answer (`str`):
            What a model answered.

    Returns:
        `str`: the normalised answer.

    Example:

    ```python
    >>> normalize_vqa_answer("The man has two dogs, dont they?")
    "man has 2 dogs don't they"
    ```"""
    text = _strip_punctuation(_strip_ends(answer))
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def _strip_ends(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def comparable_answer(answer: str) -> str:
    """Return [`normalize_vqa_answer`] of an answer, but keep the articles or signs of one without words ("A", "+")."""
    return normalize_vqa_answer(answer) or _strip_punctuation(answer).strip().lower() or answer.strip()


def _share_of_three(prediction: str, answers: Sequence[str]) -> float:
    """Return the mean of min(matches / 3, 1) over the subsets that leave out one annotator."""
    matches = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(matches)


def _official(prediction: str, answers: Sequence[str]) -> float:
    prediction, answers = _strip_ends(prediction), [_strip_ends(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalize_vqa_answer(prediction), [normalize_vqa_answer(answer) for answer in answers]
    return _share_of_three(prediction, answers)


def _lavis(prediction: str, answers: Sequence[str]) -> float:
    if len(set(answers)) > 1:
        answers = [_strip_punctuation(answer) for answer in answers]
    return _share_of_three(normalize_vqa_answer(prediction), answers)


def _exact(prediction: str, answers: Sequence[str]) -> float:
    return float(comparable_answer(prediction) in {comparable_answer(answer) for answer in answers})


_PROTOCOLS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "official": _official,
    "lavis": _lavis,
    "exact": _exact,
}


def choose_vqa_protocol(references: Sequence[Sequence[str]]) -> str:
    r"""
    Choose the protocol of [`vqa_accuracy`] that fits the references. Choose it once for all questions of a run:
    otherwise its groups may be scored differently.

    Args:
        references (`list[list[str]]`):
            The accepted answers to each question that is scored.

    Returns:
        `str`: `"official"` if every question has ten annotators, as in VQAv2 and OK-VQA; else `"exact"`.

    Raises:
        `ValueError`: if the answers to a question are not a list.

    Example:

    ```python
    >>> choose_vqa_protocol([["yes"] * 10, ["no"] * 9 + ["yes"]])
    'official'
    >>> choose_vqa_protocol([["couch", "sofa"]])
    'exact'
    ```"""
    for index, answers in enumerate(references):
        if isinstance(answers, str):
            raise ValueError(f"the answers to question {index} are a list, not the text {answers!r}")
    has_ten = len(references) > 0 and all(len(answers) == _ANNOTATORS for answers in references)
    return "official" if has_ten else "exact"


def check_annotators(
    references: Sequence[Sequence[str]], protocol: str, question_ids: Sequence[int | str] | None = None
) -> None:
    """Raise a `ValueError` if there is no such protocol, or a question has too few annotators for it."""
    if protocol not in _PROTOCOLS:
        raise ValueError(f"protocol={protocol!r}: one of {', '.join(_PROTOCOLS)} was expected")
    if protocol == "exact":
        return
    for question_id, answers in zip(question_ids or range(len(references)), references, strict=True):
        if len(answers) < _LEAST_ANNOTATORS:
            raise ValueError(
                f"question {question_id} has too few answers ({len(answers)}): protocol={protocol!r} is for ten "
                f"annotators, and with fewer than {_LEAST_ANNOTATORS} no answer counts 1. Give protocol='exact': it "
                "takes any number of accepted answers, and a match with one of them counts 1"
            )


def vqa_accuracy_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], protocol: str = "official"
) -> list[float]:
    r"""
    Compute the accuracy of each answer.

    Args:
        predictions (`list[str]`):
            One answer for each question.
        references (`list[list[str]]`):
            The annotators' answers to each question, ten in VQAv2 and OK-VQA.
        protocol (`str`, *optional*, defaults to `"official"`):
            - `"official"`: the official evaluation (GT-Vision-Lab/VQA) since March 2021. The score is the mean of
              min(matches / 3, 1) over the subsets that leave out one annotator. If the annotators differ, prediction
              and answers are normalised ([`normalize_vqa_answer`]). If they all agree, texts are compared as they
              are, capitals included.
            - `"lavis"`: the official evaluation before March 2021, which is LAVIS's, and so the paper's. The same
              mean, but the prediction is always normalised, and the annotators' answers lose their punctuation only,
              and only if they differ.
            - `"exact"`: for other data, with one accepted answer or more. Prediction and answers are normalised, and
              an answer that is one of those accepted counts 1.

    Returns:
        `list[float]`: between 0 and 1.

    Raises:
        `ValueError`: if there is nothing to score, no such protocol, or a question with fewer than four annotators
            under another protocol than `"exact"`.
    """
    check_texts(predictions, references)
    check_annotators(references, protocol)
    score = _PROTOCOLS[protocol]
    return [score(prediction, answers) for prediction, answers in zip(predictions, references, strict=True)]


def vqa_accuracy(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    answer_types: Sequence[str] | None = None,
    question_types: Sequence[str] | None = None,
    protocol: str = "official",
) -> dict:
    r"""
    Compute VQA accuracy: the mean of [`vqa_accuracy_scores`], for VQAv2, OK-VQA and other data.

    Args:
        predictions (`list[str]`):
            One answer for each question.
        references (`list[list[str]]`):
            The annotators' answers to each question, ten in VQAv2 and OK-VQA.
        answer_types (`list[str]`, *optional*):
            The type of each answer (`"yes/no"`, `"number"`, `"other"`), to have the accuracy of each as well.
        question_types (`list[str]`, *optional*):
            The type of each question (`"how many"`), likewise.
        protocol (`str`, *optional*, defaults to `"official"`):
            `"official"`, `"lavis"` or `"exact"`, as for [`vqa_accuracy_scores`]; [`choose_vqa_protocol`] tells which
            one fits the references.

    Returns:
        `dict`: `vqa_accuracy`, between 0 and 1; with types, also `per_answer_type` and `per_question_type`, dicts of
        such.

    Raises:
        `ValueError`: if there is nothing to score, no such protocol, a question without a type, or one with fewer than
            four annotators under another protocol than `"exact"`.

    Example:

    ```python
    >>> vqa_accuracy(["Two dogs."], [["2 dogs"] * 2 + ["2"] * 8])
    {'vqa_accuracy': 0.6}
    >>> vqa_accuracy(["A sofa."], [["couch", "sofa"]], protocol="exact")
    {'vqa_accuracy': 1.0}
    ```"""
    scores = vqa_accuracy_scores(predictions, references, protocol)
    result: dict = {"vqa_accuracy": sum(scores) / len(scores)}
    for name, types in (("per_answer_type", answer_types), ("per_question_type", question_types)):
        if types is not None:
            result[name] = _mean_by_type(scores, types)
    return result


def _mean_by_type(scores: list[float], types: Sequence[str]) -> dict[str, float]:
    if len(types) != len(scores):
        raise ValueError(f"{len(types)} types for {len(scores)} questions: each question needs one")
    groups = defaultdict(list)
    for score, group in zip(scores, types, strict=True):
        groups[group].append(score)
    return {group: sum(own) / len(own) for group, own in groups.items()}


__all__ = ["choose_vqa_protocol", "normalize_vqa_answer", "vqa_accuracy", "vqa_accuracy_scores"]
