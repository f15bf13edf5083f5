"""CHAIR (Rohrbach et al. 2018): objects that captions name and pictures lack."""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property


# A dog's is a dog, but o'clock is no clock. Signs keep apart the words on their sides
_TOKENS = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_POSSESSIVE = re.compile(r"['’]s$")
_PLURALS = (("men", "man"), ("children", "child"), ("people", "person"), ("geese", "goose"), ("mice", "mouse"))
_PLURALS += (("oxen", "ox"), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))
_ANIMALS = ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub"]
# What the words on the left are as one word. A baby bird is no person, and a home plate is no plate
_SINGLE_WORDS = {("toilet", "seat"): "toilet", ("home", "plate"): "home plate"}
_SINGLE_WORDS |= {(age, animal): animal for age in ("baby", "adult") for animal in _ANIMALS}
_SINGLE_WORDS |= {("passenger", vehicle): vehicle for vehicle in ("jet", "train")}


def chair(
    predictions: Sequence[str], references: Sequence[Sequence[str]], synonyms: Sequence[Sequence[str]]
) -> dict[str, float]:
    r"""
    Compute CHAIR: how much of what captions name is not there. Scores compare only between captions of similar length,
    because longer captions name more objects.

    Args:
        predictions (`list[str]`):
            One caption for each picture.
        references (`list[list[str]]`):
            The objects in each picture, by any of their words. A list may be empty.
        synonyms (`list[list[str]]`):
            The words of each object, the object's name first, as [`~readers.read_synonyms`] returns them.

    Returns:
        `dict[str, float]`: `CHAIRs`, the share of captions with an object that is not in the picture; `CHAIRi`, the
        share of such objects among all that are named, each as often as it is named; and `object_recall`, the share
        of the objects in the pictures that captions name. All are between 0 and 1; a share of nothing is 0.

    Raises:
        `ValueError`: if there is nothing to score, if there is not one list of objects for each prediction, or if an
            object is none of the synonyms.

    Example:

    ```python
    >>> synonyms = [["person", "man"], ["dog", "puppy"], ["frisbee"]]
    >>> scores = chair(["A man and two puppies.", "a dog"], [["person"], ["dog", "frisbee"]], synonyms)
    >>> round(scores["CHAIRs"], 2), round(scores["CHAIRi"], 2), round(scores["object_recall"], 2)
    (0.5, 0.33, 0.67)
    ```"""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} lists of objects: each needs one")
    if len(predictions) == 0:
        raise ValueError("there are no predictions to score")
    words = ObjectWords(synonyms)
    named = words.find_all(predictions)
    present = [words.names_of(objects, f"picture {number}") for number, objects in enumerate(references)]
    pairs = list(zip(named, present, strict=True))
    invented = [[name for name in own if name not in there] for own, there in pairs]
    return {
        "CHAIRs": sum(map(bool, invented)) / len(invented),
        "CHAIRi": sum(map(len, invented)) / max(sum(map(len, named)), 1),
        "object_recall": sum(len(there & {*own}) for own, there in pairs) / max(sum(map(len, present)), 1),
    }


def find_objects(captions: Sequence[str], synonyms: Sequence[Sequence[str]]) -> list[list[str]]:
    r"""
    Find the objects that captions name, by the rules of CHAIR.

    Args:
        captions (`list[str]`):
            Captions.
        synonyms (`list[list[str]]`):
            The words of each object, the object's name first, as [`~readers.read_synonyms`] returns them.

    Returns:
        `list[list[str]]`: for each caption, the names of the objects, in order, each as often as it is named.

    Raises:
        `ValueError`: if a caption is no text, or a word is that of two objects.

    Example:

    ```python
    >>> find_objects(["Two puppies and a baby bird."], [["person", "baby"], ["dog", "puppy"], ["bird"]])
    [['dog', 'bird']]
    ```"""
    return ObjectWords(synonyms).find_all(captions)


class ObjectWords:
    """Words of objects, and the way from a caption to the objects that it names."""

    def __init__(self, synonyms: Sequence[Sequence[str]]):
        self.names: dict[str, str] = {}
        for words in synonyms:
            if isinstance(words, str) or not words or not all(isinstance(word, str) for word in words):
                raise ValueError(f"synonyms are lists of words, one list for each object, but one is {words!r}")
            for word in words:
                name = self.names.setdefault(" ".join(word.lower().split()), words[0])
                if name != words[0]:
                    raise ValueError(f"the synonyms have {word!r} twice: for {name!r} and for {words[0]!r}")

    def names_of(self, objects: Iterable[str], where: str = "a picture") -> set[str]:
        """Return the names of objects that are given by any of their words. Errors call the picture `where`."""
        if isinstance(objects, str):
            raise ValueError(f"the objects of {where} are a list, not {objects!r}")
        for word in objects:
            if not isinstance(word, str) or word.lower() not in self.names:
                raise ValueError(f"{where} has the object {word!r}, which the synonyms lack: give its words, too")
        return {self.names[word.lower()] for word in objects}

    def find_all(self, captions: Sequence[str]) -> list[list[str]]:
        if isinstance(captions, str):
            raise ValueError("captions are a list of texts, not one text")
        for caption in captions:
            if not isinstance(caption, str):
                raise ValueError(f"captions are a list of texts, but one is {caption!r}")
        return [self.find(caption) for caption in captions]

    def find(self, caption: str) -> list[str]:
        tokens = [_POSSESSIVE.sub("", token) for token in _TOKENS.findall(caption.lower())]
        words = self._join([self._singular(token) for token in tokens])
        if "toilet" in words:  # the seat of a toilet is no chair
            words = [word for word in words if word != "seat"]
        return [self.names[word] for word in words if word in self.names]

    @cached_property
    def _phrases(self) -> dict[tuple[str, ...], str]:
        """Return phrases of several words, and the word that each stands for."""
        return _SINGLE_WORDS | {tuple(word.split()): word for word in self.names if " " in word}

    @cached_property
    def _known(self) -> set[str]:
        return {*self.names}.union(*self._phrases)

    def _singular(self, token: str) -> str:
        """Return the word that a token is the plural of; any other token as it is."""
        if token in self._known:
            return token
        singulars = (token.removesuffix(end) + new for end, new in _PLURALS if token.endswith(end))
        return next((word for word in singulars if word in self._known), token)

    def _join(self, words: list[str]) -> list[str]:
        """Replace phrases by the words that they stand for, the longest first."""
        joined, place = [], 0
        while place < len(words):
            for length in range(self._longest, 1, -1):
                phrase = tuple(words[place : place + length])
                if phrase in self._phrases:
                    joined.append(self._phrases[phrase])
                    place += length
                    break
            else:
                joined.append(words[place])
                place += 1
        return joined

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._phrases))


__all__ = ["chair", "find_objects"]
