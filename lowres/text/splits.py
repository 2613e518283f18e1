"""Which files are for training, validation and test, by their names.

A *plain* name is the word alone: the folder `validation/`, the file `val.jsonl.zst`. It counts where other
files are for training. A word *inside* a name (`c4-validation.00000-of-00008`, `TinyStories-valid.txt`)
counts only beside names with the word "train", or beside the same name without the word (mC4's
`c4-en-validation.tfrecord-00000-of-00011` and `c4-en.tfrecord-00000-of-11264`): alone, `my-test-set.jsonl`
is a name like any other. The words are those of the `datasets` library, and `heldout`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowres.text.source import TEST, TRAIN, VALIDATION

WORDS = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "val", "dev", "heldout", "holdout"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
_PART = {word: part for part, words in WORDS.items() for word in words}
# what a folder of text may well be called for other reasons
_NEEDS_TRAIN = ("dev", "heldout", "holdout", "testing", "eval", "evaluation")
# split=train, TestSet
_BETWEEN = re.compile(r"[\W\d_]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def part_of_word(word: str) -> str:
    """The part that a split of this name is: "train_sft" is TRAIN, and so is anything unknown."""
    found = {_PART[w] for w in _words_of(word) if w in _PART}
    return found.pop() if len(found) == 1 else TRAIN


def has_word(name: str, part: str) -> bool:
    """Whether a file's name, alone, says that it is for this part."""
    return part in (_plain(name), _inside(name))


def says_part(name: str) -> bool:
    return any(has_word(name, part) for part in WORDS)


def parts(names: Sequence[str]) -> list[str]:
    """TRAIN, VALIDATION or TEST for each file, by its path relative to the source."""
    plain = [_plain(name) for name in names]
    inside = [_inside(name) for name in names]
    paired = TRAIN in inside
    without_word = {_words(name) for name, i in zip(names, inside, strict=True) if i is None}
    found = [
        p or (i if i and (paired or _words(name) in without_word) else TRAIN)
        for name, p, i in zip(names, plain, inside, strict=True)
    ]
    # a source of nothing but test files is what the user wants to read
    return found if TRAIN in found else [TRAIN] * len(found)


def parts_of_code(names: Sequence[str]) -> list[str]:
    """The same for the files of a program, whose `train.py` and `tests/` say nothing of splits: only its
    outermost folders count, and only if one of them is `train`."""
    tops = [_plain(name.split("/")[0]) if "/" in name else None for name in names]
    return [top or TRAIN for top in tops] if TRAIN in tops else [TRAIN] * len(names)


def _plain(name: str) -> str | None:
    """The part that the deepest folder, or the file, of a plain name says."""
    for component in reversed(name.lower().split("/")):
        word = component.split(".")[0]
        # shards have numbers: validation_00
        word = re.sub(r"[-_ 0-9]+$", "", word)
        if word in _PART and word not in _NEEDS_TRAIN:
            return _PART[word]
    return None


def _words_of(component: str) -> list[str]:
    return [word for word in _BETWEEN.split(_CAMEL.sub("-", component).lower()) if word]


def _words(name: str) -> tuple[str, ...]:
    """What a name says besides its part and its numbers."""
    return tuple(
        "-".join(word for word in _words_of(component) if word not in _PART) for component in name.split("/")
    )


def _inside(name: str) -> str | None:
    for component in reversed(name.split("/")):
        found = {_PART[word] for word in _words_of(component) if word in _PART}
        if len(found) == 1:
            return found.pop()
    return None
