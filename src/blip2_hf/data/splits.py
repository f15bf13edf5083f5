"""Splits of local data: their names, and rows of one of them."""

from collections.abc import Iterable, Mapping, Sequence

import datasets


_NAMES = {  # what a split may be called
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def split_by_folder(names: Sequence[str]) -> dict[str, list[int]]:
    """
    Return the numbers of the files in each split, if all files lie in folders of the top that are named like splits,
    and otherwise nothing. `names` are paths with slashes.
    """
    parts: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        top, slash, _ = name.partition("/")
        if not slash or (split := _NAMES.get(top.lower())) is None:
            return {}
        parts.setdefault(split, []).append(number)
    return parts


def split_by_column(names: Iterable[str]) -> dict[str, list[int]]:
    """Return the numbers of the rows of each split, by the names that the rows have for it."""
    parts: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        parts.setdefault(_NAMES.get(name, name), []).append(number)
    return parts


def select_split(
    rows: datasets.Dataset, parts: Mapping[str, Sequence[int]], split: str, name: str
) -> datasets.Dataset:
    """
    Return the rows of a split, or of a part of it, such as `train[:10]`. `parts` has the numbers of each split's rows;
    without splits, all rows are called `train`. Errors call the data `name`.
    """
    if not parts and split == "train":
        return rows
    numbers: Mapping[str, Sequence[int]] = parts or {"train": range(len(rows))}
    names = {name: name for name in numbers} | {name: own for name, own in _NAMES.items() if own in numbers}
    lengths = {name: len(numbers[own]) for name, own in names.items()}
    try:
        pieces = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (AssertionError, ValueError) as error:
        raise ValueError(_explain_unknown(name, split, parts)) from error
    return rows.select([row for piece in pieces for row in numbers[names[piece.splitname]][piece.from_ : piece.to]])


def _explain_unknown(name: str, split: str, parts: Iterable[str]) -> str:
    if not parts:
        return f"{name} has no splits, but {split!r} was asked for. Leave the split out, or give a part: train[:100]."
    return f"{name} has the splits {', '.join(parts)}, but {split!r} was asked for. Give one of them."
