"""The kinds of sample that formats read from rows, and tasks prepare."""

from __future__ import annotations

from typing import Any, NamedTuple

Turn = dict[str, Any]
"""A message as a chat template takes it: ``role`` and ``content``, perhaps ``reasoning_content`` or ``tool_calls``."""


class PromptCompletion(NamedTuple):
    """Plain text of which only the completion is supervised.

    Attributes:
        kind: the group that the row's score is reported under, if any.
    """

    prompt: str
    completion: str
    kind: str | None = None


class Messages(NamedTuple):
    """A conversation.

    Attributes:
        weights: a loss weight for each turn. None for a turn, or for all of them, means 1 for the assistant's turns and
            0 for the others.
    """

    turns: list[Turn]
    tools: list[dict[str, Any]] | None = None
    weights: list[float | None] | None = None


class PlainText(NamedTuple):
    """Text for continued pre-training, all of it supervised."""

    text: str


class TextLabel(NamedTuple):
    """A text and the name of its class."""

    text: str
    label: str


class Preference(NamedTuple):
    """A prompt with an answer that was preferred and one that was not; none of the three is empty."""

    prompt: list[Turn]
    chosen: list[Turn]
    rejected: list[Turn]
    tools: list[dict[str, Any]] | None = None


Sample = PromptCompletion | Messages | PlainText | TextLabel | Preference
"""The kinds that shipped formats read; a format of your own may read any other that its task takes."""
