"""Number the classes of a classifier, in the order that a trained head already has."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from automodel.logs import get_logger, warn_for_all

log = get_logger(__name__)

_NO_NAME = re.compile(r"LABEL_\d+")
"""What transformers calls a class that nobody has named."""


def numbered_labels(
    name: str, labels: Collection[str], head_labels: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the classes by their index, as the model and as the rows call them.

    A trained head keeps its order, and all of its classes, where the rows use its names, or its numbers from 0 on.

    Args:
        name: what the rows are called in messages.
        labels: those of the rows.
        head_labels: those of the head that the checkpoint brings, by index; empty where it has none.
    """
    _warn_of_minus_one(name, labels)
    spelt = {label.strip().casefold(): label for label in labels}
    if len(spelt) == len(labels) and spelt.keys() <= {label.casefold() for label in head_labels}:
        return tuple(head_labels), tuple(spelt.get(label.casefold(), label) for label in head_labels)
    numbers = tuple(str(index) for index in range(len(head_labels)))
    if set(labels) <= set(numbers):
        is_named = not all(_NO_NAME.fullmatch(label) for label in head_labels)
        return (tuple(head_labels) if is_named else numbers), numbers
    ordered = _ordered(labels)
    if head_labels:
        becomes = "is replaced by a new one"
        if len(head_labels) == len(ordered):
            pairs = ", ".join(f"{old} -> {new}" for old, new in zip(head_labels, ordered, strict=True))
            becomes = f"is trained on with other labels in its places: {pairs}"
        listed = ", ".join(head_labels[:12])
        warn_for_all(log, "%s: the labels are not those of the checkpoint's head (%s), which %s", name, listed, becomes)
    return ordered, ordered


def _warn_of_minus_one(name: str, labels: Collection[str]) -> None:
    if "-1" in labels and set(labels) != {"-1", "1"}:
        warn_for_all(
            log,
            "%s: -1 is trained as a class like the others; data sets of the hub give it to rows without a label: leave "
            "those out if it means that here",
            name,
        )


def _ordered(labels: Collection[str]) -> tuple[str, ...]:
    """Return labels in the order of their numbers if all are numbers, else of their names."""
    try:  # "1" and "01" are two names of one number: the name decides, not the order of a set
        return tuple(sorted(labels, key=lambda label: (float(label), label)))
    except ValueError:
        return tuple(sorted(labels))
