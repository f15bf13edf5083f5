"""VQA accuracy (Antol et al. 2015), with the normalisation of answers of the official evaluation; for OK-VQA too."""

import re
from collections import defaultdict
from collections.abc import Sequence

from .captions import check_texts


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
    """A sign that stands beside a space anywhere in the answer goes; another becomes a space."""
    text = answer
    comma_in_number = _COMMA_IN_NUMBER.search(answer) is not None  # then nothing becomes a space
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in answer or f" {sign}" in answer
        text = text.replace(sign, "" if beside_space or comma_in_number else " ")
    return _FULL_STOP.sub("", text, count=32)  # the official code passes re.UNICODE, 32, in the place of the count


def normalize_vqa_answer(answer: str) -> str:
    r"""
    An answer as the official VQA evaluation compares it: lower case, no punctuation, no articles, number words up to
    ten as digits, apostrophes put back.

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
    text = _strip_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    r"""
    The accuracy of each answer: an answer that three annotators gave is right, one that two or one gave is so in part;
    the mean over the subsets that leave out one annotator.

    As in the official evaluation, the prediction is normalised in full ([`normalize_vqa_answer`]), the annotators'
    answers lose their punctuation only, and only where annotators differ.

    Args:
        predictions (`list[str]`):
            One answer for each question.
        references (`list[list[str]]`):
            The annotators' answers to each question, ten in VQAv2 and OK-VQA.

    Returns:
        `list[float]`: between 0 and 1.

    Raises:
        `ValueError`: if there is nothing to score, or a question with less than two annotators.
    """
    check_texts(predictions, references)
    scores = []
    for index, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
        if len(answers) < 2:
            raise ValueError(f"question {index} has one annotator; VQA accuracy leaves one out and needs two or more")
        if len(set(answers)) > 1:
            answers = [_strip_punctuation(answer) for answer in answers]
        matches = [answer == normalize_vqa_answer(prediction) for answer in answers]
        scores.append(sum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(matches))
    return scores


def vqa_accuracy(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    answer_types: Sequence[str] | None = None,
    question_types: Sequence[str] | None = None,
) -> dict:
    r"""
    VQA accuracy: the mean of [`vqa_accuracy_scores`], for VQAv2 and OK-VQA.

    Args:
        predictions (`list[str]`):
            One answer for each question.
        references (`list[list[str]]`):
            The annotators' answers to each question, ten in VQAv2 and OK-VQA.
        answer_types (`list[str]`, *optional*):
            The type of each answer (`"yes/no"`, `"number"`, `"other"`), to have the accuracy of each as well.
        question_types (`list[str]`, *optional*):
            The type of each question (`"how many"`), likewise.

    Returns:
        `dict`: `vqa_accuracy`, between 0 and 1; with types, also `per_answer_type` and `per_question_type`, dicts of
        such.

    Raises:
        `ValueError`: if there is nothing to score, or a question with less than two annotators or without a type.

    Example:

    ```python
    >>> vqa_accuracy(["Two dogs."], [["2 dogs"] * 2 + ["2"] * 8])
    {'vqa_accuracy': 0.6}
    ```"""
    scores = vqa_accuracy_scores(predictions, references)
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


__all__ = ["normalize_vqa_answer", "vqa_accuracy", "vqa_accuracy_scores"]
