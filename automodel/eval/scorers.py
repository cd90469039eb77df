"""Scores of a generated answer: (prompt, answer) -> number."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from automodel.data.prepare.prepared import Prompt

EXACT_MATCH = "exact_match"
"""The name of the score that is always measured."""


def exact_match(prompt: Prompt, answer: str) -> bool:
    """Return whether the answer is the right one, ignoring surrounding white space."""
    return answer.strip() == prompt.answer.strip()
