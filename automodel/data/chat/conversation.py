"""Tokenise a conversation with what the assistant wrote supervised."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from automodel.data.chat.encode import (
    QUOTE_CLOSE,
    QUOTE_OPEN,
    Encoded,
    Tokens,
    added_ids,
    encode,
    require_eos,
    special_tokens,
)
from automodel.data.chat.markers import THOUGHT_KEYS
from automodel.data.chat.spans import CannotRender, Rendering, Span, render_spans
from automodel.data.formats.samples import Messages, Turn
from automodel.data.rows import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHTS_LEFT_OUT = "the chat template leaves out thoughts of earlier messages, which it writes only where none follows"
RESPELT = "the chat template writes numbers in the arguments of calls in another spelling (1e3 as 1000.0)"
JOINED = "one token holds the end of the prompt and the beginning of the answer; it is trained on, and generated"

_KEPT_FOR_MARKERS = re.compile("[\ufdd0-\ufdd4]")


def tokenize_messages(
    tokenizer: PreTrainedTokenizerBase, row: Messages, *, supervise: Literal["all", "last"] = "all"
) -> Tokens:
    """Tokenise the rendered conversation; what the assistant wrote, with its end of turn, is supervised.

    The text is tokenised in one piece, and a token is supervised if it holds a character that is. A special token
    written by the template is that token; in a message it stays text. Where the template ends the last turn with
    nothing, eos follows it: else nothing would teach when to stop.

    Args:
        supervise: ``last`` leaves only the last of the assistant's messages that has a weight.

    Raises:
        BadRow: the template cannot render the row, leaves a part of it out, or the borders cannot be known.
    """
    specials = special_tokens(tokenizer)
    marked = Messages(_mark(row.turns, specials), _mark(row.tools, specials))
    weights = _message_weights(row)
    others = [i for i, turn in enumerate(row.turns) if turn["role"] != "assistant" and weights[i]]
    form, rendering = _render_in_some_form(tokenizer, marked, also=others, specials=specials)
    answers = [i for i, turn in enumerate(row.turns) if turn["role"] == "assistant"]
    if supervise == "last":
        last = max((i for i in answers if weights[i]), default=None)
        weights = [weight if i == last else 0.0 for i, weight in enumerate(weights)]
    text, spans = _with_eos(tokenizer, rendering, answers[-1])
    text, spans, quoted = _unquoted(text, spans, specials)
    borders = [border for span in spans for border in (span.start, span.end)]
    encoded = encode(tokenizer, text, quoted=quoted, borders=borders)
    weighted = [(span, weights[span.message]) for span in spans if weights[span.message]]
    tokens = _supervised(tokenizer, encoded, weighted, row)
    left_out = (THOUGHTS_LEFT_OUT,) if rendering.left_out else ()
    respelt = (RESPELT,) if _are_respelt(marked, form) else ()
    return tokens._replace(
        notes=tokens.notes + left_out + respelt,
        text=text,
        spans=tuple((span.start, span.end) for span, _ in weighted),
        quoted=tuple(quoted),
    )


def _supervised(
    tokenizer: PreTrainedTokenizerBase, encoded: Encoded, spans: list[tuple[Span, float]], row: Messages
) -> Tokens:
    """Give each token the weight of the span that it holds a character of."""
    weights = [0.0] * len(encoded.ids)
    num_prompt, last, ends, end_texts, is_joined = 0, None, [], [], False
    for span, weight in spans:
        first, stop = encoded.tokens_of(span.start, span.end)
        weights[first:stop] = [max(weight, each) for each in weights[first:stop]]
        if span.message != last:
            num_prompt, last = first, span.message
        is_joined |= encoded.starts[first] < span.start
        if span.end_text:
            ends.append(stop - 1)
            if encoded.ids[stop - 1] not in added_ids(tokenizer) and not row.turns[last].get("tool_calls"):
                end_texts.append(span.end_text)
    notes = (JOINED,) if is_joined else ()
    return Tokens(encoded.ids, weights, num_prompt, tuple(ends), tuple(dict.fromkeys(end_texts)), notes)


def _render_in_some_form(
    tokenizer: PreTrainedTokenizerBase, row: Messages, **options: Any
) -> tuple[Messages, Rendering]:
    """Render the row in the first of the forms that templates expect which this one writes as a whole."""
    problem: BadRow | None = None
    for form in _forms(row, tokenizer.get_chat_template(tools=row.tools)):
        try:
            return form, render_spans(tokenizer, form, **options)
        except BadRow as error:
            # What raises may have been given a form that is not meant for it: the other form's problem says more.
            problem = error if problem is None or not isinstance(error, CannotRender) else problem
    raise problem


def _forms(row: Messages, template: str) -> Iterator[Messages]:
    """Yield the row as templates may expect it: thoughts by their several names; arguments as text, or as objects."""
    given = {key for turn in row.turns for key in THOUGHT_KEYS if turn.get(key)}
    read = [key for key in THOUGHT_KEYS if re.search(rf"[.'\"]{key}\b", template)]
    names = sorted(read, key=lambda key: key not in given) or sorted(given)
    for name in names if given else [None]:
        turns = row.turns if name is None else [_with_thought(turn, name) for turn in row.turns]
        if any(isinstance(call["function"]["arguments"], str) for turn in turns for call in _calls(turn)):
            yield row._replace(turns=turns)
            turns = [_with_objects(turn) for turn in turns]
        yield row._replace(turns=turns)


def _with_thought(turn: Turn, name: str) -> Turn:
    thoughts = {turn[key] for key in THOUGHT_KEYS if turn.get(key)}
    if not thoughts:
        return turn
    if len(thoughts) > 1:
        raise BadRow(f"a message holds different thoughts under {' and '.join(k for k in THOUGHT_KEYS if turn.get(k))}")
    return {key: value for key, value in turn.items() if key not in THOUGHT_KEYS} | {name: thoughts.pop()}


def _with_objects(turn: Turn) -> Turn:
    """Return the turn with the arguments of its calls as objects; numbers keep their values, not their spelling."""
    if not _calls(turn):
        return turn
    calls = []
    for call in _calls(turn):
        arguments = call["function"]["arguments"]
        function = call["function"] | {"arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}
        calls.append(call | {"function": function})
    return turn | {"tool_calls": calls}


def _are_respelt(given: Messages, form: Messages) -> bool:
    """Return whether arguments given as text are objects in ``form``, with a number that JSON spells differently."""
    spellings: list[str] = []
    for before, after in zip(given.turns, form.turns, strict=True):
        for call, other in zip(_calls(before), _calls(after), strict=True):
            if call["function"]["arguments"] != other["function"]["arguments"]:
                json.loads(call["function"]["arguments"], parse_float=spellings.append)
    return any(repr(float(spelling)) != spelling for spelling in spellings)


def _calls(turn: Turn) -> list[Any]:
    return turn.get("tool_calls") or []


def _with_eos(tokenizer: PreTrainedTokenizerBase, rendering: Rendering, last: int) -> tuple[str, list[Span]]:
    """Put eos after message ``last`` where the template ends it with nothing."""
    text, spans = rendering.text, rendering.spans
    index = max((i for i, span in enumerate(spans) if span.message == last), default=None)
    if index is None or spans[index].end_text:
        return text, spans
    require_eos(tokenizer)
    eos, end = tokenizer.eos_token, spans[index].end
    spans = [
        span._replace(start=span.start + len(eos), end=span.end + len(eos)) if span.start >= end else span
        for span in spans
    ]
    spans[index] = spans[index]._replace(end=end + len(eos), end_text=eos)
    return text[:end] + eos + text[end:], spans


def _unquoted(text: str, spans: list[Span], specials: list[str]) -> tuple[str, list[Span], list[tuple[int, int]]]:
    """Take the brackets out of ``text``; also return the spans moved with it, and what was in brackets."""
    if QUOTE_OPEN not in text and QUOTE_CLOSE not in text:
        return text, spans, []
    # A template may cut a message within a token's text: what has lost one of its brackets counts as the template's.
    names = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
    pieces, quoted, removed, length, position = [], [], [], 0, 0
    for found in re.finditer(f"{QUOTE_OPEN}({names}){QUOTE_CLOSE}|[{QUOTE_OPEN}{QUOTE_CLOSE}]", text):
        pieces += [text[position : found.start()], found.group(1) or ""]
        length += len(pieces[-2])
        if found.group(1):
            quoted.append((length, length + len(found.group(1))))
            removed.append(found.end() - 1)
        removed.append(found.start())
        length += len(pieces[-1])
        position = found.end()
    removed.sort()
    moved = [
        span._replace(
            start=span.start - bisect_left(removed, span.start), end=span.end - bisect_left(removed, span.end)
        )
        for span in spans
    ]
    return "".join([*pieces, text[position:]]), moved, quoted


def _message_weights(row: Messages) -> list[float]:
    usual = [float(turn["role"] == "assistant") for turn in row.turns]
    given = row.weights or [None] * len(row.turns)
    return [weight if own is None else own for own, weight in zip(given, usual, strict=True)]


def _mark(value: Any, specials: list[str]) -> Any:
    """Return a copy of ``value`` in which the text of every special token is bracketed."""
    if isinstance(value, dict):
        return {key: _mark(each, specials) for key, each in value.items()}
    if isinstance(value, list):
        return [_mark(each, specials) for each in value]
    if not isinstance(value, str):
        return value
    if _KEPT_FOR_MARKERS.search(value):
        raise BadRow("holds U+FDD0 to U+FDD4, which are not characters")
    # Longer ones first: one special token may begin with another.
    found = sorted((token for token in specials if token in value), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, found)), f"{QUOTE_OPEN}\\g<0>{QUOTE_CLOSE}", value) if found else value
