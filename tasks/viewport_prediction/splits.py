"""Which videos and viewers make up training, validation and test."""

from collections.abc import Mapping, Sequence

from netllm_pl.errors import UserError, unknown

Labels = Sequence[int | str]
Splits = Mapping[str, Mapping[str, Labels | None]]
"""Split name -> ``videos`` and ``users`` -> labels; a split holds the traces that have both. Null means all."""

NAMES = ("train", "valid", "test")
KEYS = ("videos", "users")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split()]


PUBLISHED_SPLITS: dict[str, dict[str, dict[str, list[int]]]] = {
    "jin2022": {
        "train": {
            "videos": _numbers("1 5 9 2 6 11 15 16 13 17 21 22 26 19 23"),
            "users": _numbers(
                "50 54 6 34 66 63 52 39 62 46 75 28 65 18 37 13 80 33 69 78 19 40 10 43 61 72 56 41 79 82 27 71 57 67 "
                "8 2 12 81 1 64 32 42"
            ),
        },
        "valid": {
            "videos": _numbers("3 7 12 10 20 27"),
            "users": _numbers("9 25 73 29 31 70 58 11 14 38 16 76 77 74 24 5 17 20 51 68 36"),
        },
        "test": {
            "videos": _numbers("4 8 14 18 24 25"),
            "users": _numbers("83 15 3 35 48 22 55 4 45 60 26 21 44 23 53 84 59 49 7 47 30"),
        },
    },
    "wu2017": {
        "train": {
            "videos": _numbers("9 7 4 1 6"),
            "users": _numbers("23 3 19 24 18 28 9 26 6 15 21 25 32 38 45 34 48 44 29 43 4 36 39 8 17 42 30 11 22 37"),
        },
        "valid": {"videos": _numbers("8 2"), "users": _numbers("40 20 14 1 31 12 33 27 10")},
        "test": {"videos": _numbers("3 5"), "users": _numbers("16 7 46 5 35 2 41 47 13")},
    },
}
"""Splits of NetLLM (SIGCOMM 2024) by data set; no two splits of one share a video or a viewer."""


def check_splits(splits: Splits) -> None:
    """Refuse splits that are misspelt, empty, or test on traces they train on.

    Raises:
        UserError: An unknown split or key, an empty list, or a (video, user) pair in two splits.
    """
    for name, parts in splits.items():
        if name not in NAMES:
            raise unknown("split", name, NAMES)
        _check_keys(name, parts)
    names = list(splits)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            _check_apart(splits, first, second)


def _check_keys(name: str, parts: Mapping[str, Labels | None]) -> None:
    for key, labels in parts.items():
        if key not in KEYS:
            raise unknown(f"key of split {name}", key, KEYS)
        if labels is not None and (isinstance(labels, str) or not isinstance(labels, Sequence)):
            raise UserError(f"splits.{name}.{key}: '{labels}' is not a list; write [{labels}]")
        if labels is not None and not labels:
            raise UserError(f"splits.{name}.{key}: is empty; list labels, or leave the key out to take all")


def _check_apart(splits: Splits, first: str, second: str) -> None:
    shared = []
    for key in KEYS:
        ours, theirs = splits[first].get(key), splits[second].get(key)
        common = _common(ours, theirs)
        if not common:
            return
        shared.append(f"{key[:-1]} {common[0]}")
    raise UserError(f"splits {first} and {second} share {', '.join(shared)}; move it to one of them")


def _common(ours: Labels | None, theirs: Labels | None) -> list[str]:
    """Return labels in both lists, where null holds every label."""
    if ours is None or theirs is None:
        labels = ours if theirs is None else theirs
        return ["(all)"] if labels is None else [str(label) for label in labels]
    known = {str(label) for label in theirs}
    return [str(label) for label in ours if str(label) in known]
