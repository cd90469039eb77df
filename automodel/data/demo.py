"""The embedded instruction data set: short text tasks generated in code from a seed.

The rows are small enough for a tiny character-level model to learn on a CPU in about two
minutes, yet they cannot be solved by recall: whether a row may be trained on or is held out
is decided by what its question is *about* (the word, or the unordered pair of numbers), so
no held-out word or pair occurs in any training row, for any kind, seed or
number of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

DEMO_KINDS: tuple[str, ...] = ("add", "reverse", "upper", "sort", "larger", "last")

DEMO_SPLITS: tuple[str, ...] = ("train", "validation")

DEFAULT_NUM_ROWS: dict[str, int] = {"train": 33_000, "validation": 60 * len(DEMO_KINDS)}

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
SHORTEST_WORD, LONGEST_WORD = 3, 6
LARGEST_NUMBER = 99

# One subject in ten is held out: 26 of the 256 values of a hash's first byte.
HELD_OUT_BYTES = 26

# Far more draws than an unseen question needs while any are plentiful; reaching it means
# that (nearly) every question of the kind has been used.
MAX_DRAWS = 20_000


class Task(NamedTuple):
    """One question with its answer and the subject that decides its split."""

    question: str
    answer: str
    subject: str


def generate_demo_rows(split: str, *, num_rows: int | None = None, seed: int = 0) -> list[dict[str, str]]:
    """Return the rows of ``iter_demo_rows`` as a list; the arguments and errors are the same."""
    return list(iter_demo_rows(split, num_rows=num_rows, seed=seed))


def iter_demo_rows(split: str, *, num_rows: int | None = None, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield the rows of a split, each with a ``prompt``, a ``completion`` and a ``kind``.

    The prompt ends with a newline, so prompt + completion is the whole text. Kinds take
    turns, so every prefix is balanced; a shorter list is a prefix of a longer one of the
    same seed. No question occurs twice in one list, and none occurs in both splits.

    Raises:
        ValueError: on an unknown split, a negative number of rows, or more rows than there
            are different questions (the pairs of numbers run out first).
    """
    if split not in DEMO_SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(DEMO_SPLITS)}")
    count = DEFAULT_NUM_ROWS[split] if num_rows is None else num_rows
    if count < 0:
        raise ValueError(f"num_rows must not be negative, got {count}")
    # A string seeds Random through SHA-512, never through the salted hash().
    rng = Random(f"automodel-demo/{split}/{seed}")
    seen: set[str] = set()
    for index in range(count):
        kind = DEMO_KINDS[index % len(DEMO_KINDS)]
        task = draw_unseen_task(kind, rng, split=split, seen=seen)
        seen.add(task.question)
        yield {"prompt": task.question + "\n", "completion": task.answer, "kind": kind}


def draw_unseen_task(kind: str, rng: Random, *, split: str, seen: set[str]) -> Task:
    """Draw tasks of a kind until one belongs to the split and its question is not in seen."""
    for _ in range(MAX_DRAWS):
        task = _MAKERS[kind](rng)
        if is_held_out(task.subject) == (split == "validation") and task.question not in seen:
            return task
    raise ValueError(f"no unused {split} questions of kind {kind!r} are left: ask for fewer rows")


def is_held_out(subject: str) -> bool:
    """Whether questions about this word or pair of numbers belong to the validation split.

    A hash of the subject alone decides, so the answer is the same for every seed.
    """
    return hashlib.sha256(subject.encode("ascii")).digest()[0] < HELD_OUT_BYTES


def make_word(rng: Random) -> str:
    """Make up a pronounceable word in which consonants and vowels mostly alternate."""
    length = rng.randint(SHORTEST_WORD, LONGEST_WORD)
    consonant_next = rng.random() < 0.5
    letters = ""
    while len(letters) < length:
        letters += rng.choice(CONSONANTS if consonant_next else VOWELS)
        # A pair such as "st" or "ea" now and then.
        if rng.random() < 0.85:
            consonant_next = not consonant_next
    return letters


def make_pair(rng: Random) -> tuple[int, int, str]:
    """Draw two numbers and the subject that is the same for either order."""
    first, second = rng.randint(0, LARGEST_NUMBER), rng.randint(0, LARGEST_NUMBER)
    return first, second, f"{min(first, second)},{max(first, second)}"


def _add(rng: Random) -> Task:
    first, second, subject = make_pair(rng)
    return Task(f"Add: {first}+{second}", str(first + second), subject)


def _larger(rng: Random) -> Task:
    first, second, subject = make_pair(rng)
    return Task(f"Larger: {first} {second}", str(max(first, second)), subject)


def _reverse(rng: Random) -> Task:
    word = make_word(rng)
    return Task(f"Reverse: {word}", word[::-1], word)


def _upper(rng: Random) -> Task:
    word = make_word(rng)
    return Task(f"Upper: {word}", word.upper(), word)


def _sort(rng: Random) -> Task:
    word = make_word(rng)
    return Task(f"Sort: {word}", "".join(sorted(word)), word)


def _last(rng: Random) -> Task:
    word = make_word(rng)
    return Task(f"Last: {word}", word[-1], word)


_MAKERS: dict[str, Callable[[Random], Task]] = {
    "add": _add,
    "reverse": _reverse,
    "upper": _upper,
    "sort": _sort,
    "larger": _larger,
    "last": _last,
}
