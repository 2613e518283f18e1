"""Which files are for training, validation and test, by their names.

A *plain* name is the word alone: the folder `validation/`, the file `val.jsonl.zst`. It counts where other
files are for training. A word *inside* a name (`c4-validation.00000-of-00008`, `TinyStories-valid.txt`)
counts only beside names with the word "train": alone, `my-test-set.jsonl` is a name like any other. The
words are those of the `datasets` library.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowres.text.source import TEST, TRAIN, VALIDATION

WORDS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "val", "dev"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
_PART = {word: part for part, words in WORDS.items() for word in words}
# what a folder of text may well be called for other reasons
_NEEDS_TRAIN = ("dev", "testing", "eval", "evaluation")
_BETWEEN = re.compile(r"[-._ 0-9]+")


def part_of_word(word: str) -> str:
    """The part that a split of this name is: "train_sft" is TRAIN, and so is anything unknown."""
    found = {_PART[w] for w in _BETWEEN.split(word.lower()) if w in _PART}
    return found.pop() if len(found) == 1 else TRAIN


def has_word(name: str, part: str) -> bool:
    """Whether a file's name, alone, says that it is for this part."""
    return part in (_plain(name), _inside(name))


def parts(names: Sequence[str]) -> list[str]:
    """TRAIN, VALIDATION or TEST for each file, by its path relative to the source."""
    plain = [_plain(name) for name in names]
    inside = [_inside(name) for name in names]
    paired = TRAIN in inside
    found = [p or (i if paired else None) or TRAIN for p, i in zip(plain, inside, strict=True)]
    # a source of nothing but test files is what the user wants to read
    return found if TRAIN in found else [TRAIN] * len(found)


def _plain(name: str) -> str | None:
    """The part that the deepest folder, or the file, of a plain name says."""
    for component in reversed(name.lower().split("/")):
        word = component.split(".")[0]
        # shards have numbers: validation_00
        word = re.sub(r"[-_ 0-9]+$", "", word)
        if word in _PART and word not in _NEEDS_TRAIN:
            return _PART[word]
    return None


def _inside(name: str) -> str | None:
    for component in reversed(name.lower().split("/")):
        found = {_PART[word] for word in _BETWEEN.split(component) if word in _PART}
        if len(found) == 1:
            return found.pop()
    return None
