"""Render a conversation by its chat template and find, with proof, the places that the assistant wrote.

A template with ``{% generation %}`` marks says it itself. For others the conversation is rendered a second time with
markers around every part of every message. Without its markers this text must be the real rendering, up to white space
that the template trims; so each marker has a known place in the real one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from automodel.data.chat.markers import Marked, Occurrence, Part, find_occurrences, text_after, with_markers
from automodel.data.chat.wholeness import require_whole
from automodel.data.formats.samples import Messages
from automodel.data.rows import BadRow
from automodel.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class CannotRender(BadRow):
    """The template raised."""


class Span(NamedTuple):
    """A place in the rendered text that one message fills, its end-of-turn text included where it has one."""

    start: int
    end: int
    message: int
    end_text: str


class Rendering(NamedTuple):
    """A rendered conversation.

    Attributes:
        spans: of every assistant's message, in order; one that a template marks in several pieces has several.
        left_out: the indices of the messages whose thoughts the template leaves out, as it does for earlier turns.
    """

    text: str
    spans: list[Span]
    left_out: list[int]


class _Own(NamedTuple):
    """A place of a message, and the number of the part that is there."""

    number: int
    start: int | None
    end: int


class _Conversation(NamedTuple):
    """A conversation, its rendering, and the places of its messages in there."""

    tokenizer: PreTrainedTokenizerBase
    row: Messages
    marked: list[dict[str, Any]]
    parts: list[Part]
    text: str
    places: list[list[_Own]]
    specials: Sequence[str]
    is_marked: bool

    def render_alone(self, turns: list[dict[str, Any]], **options: Any) -> str | None:
        """Render turns that are not the whole conversation; None where the template refuses them."""
        try:
            return render(self.tokenizer, turns, self.row.tools, **options)
        except BadRow:
            return None

    @property
    def advice(self) -> str:
        marks = "" if self.is_marked else ", or one with {% generation %} marks"
        return f"choose another dataset.chat_template{marks}"


def render_spans(
    tokenizer: PreTrainedTokenizerBase, row: Messages, *, also: Sequence[int] = (), specials: Sequence[str] = ()
) -> Rendering:
    """Render the conversation and find the span of every assistant's message, and of the others in ``also``.

    Args:
        also: indices of messages of other roles whose content is wanted.
        specials: the texts of the tokenizer's special tokens.

    Raises:
        BadRow: the template cannot render the row, leaves out a part of it, or the spans cannot be proved.
    """
    is_marked = _GENERATION_MARK.search(tokenizer.get_chat_template(tools=row.tools)) is not None
    if is_marked:
        text, generated = _render_generation_spans(tokenizer, row)
    else:
        text, generated = render(tokenizer, row.turns, row.tools), []
    marked, places = _located(tokenizer, row, text)
    own = _by_message(row, marked.parts, places)
    talk = _Conversation(tokenizer, row, marked.turns, marked.parts, text, own, specials, is_marked)
    left_out = require_whole(row, text, marked, places, talk.render_alone, is_marked=is_marked, advice=talk.advice)
    spans = _attributed(talk, generated) if is_marked else _derive(talk)
    if not any(span.end > span.start for span in spans):
        raise BadRow("the chat template renders nothing of what the assistant wrote")
    for index in also:
        place = talk.places[index][0] if talk.places[index] else None
        if place is None or place.start is None:
            raise BadRow(f"message {index + 1}: its weight cannot be kept, since its content has no certain place")
        spans.append(Span(place.start, place.end, index, ""))
    return Rendering(text, sorted(span for span in spans if span.end > span.start), left_out)


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], tools: Any, **options: Any) -> str:
    """Return the text of a conversation.

    Raises:
        BadRow: the template cannot render it.
        UserError: the template is not valid jinja.
    """
    try:
        return tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **options)
    except Exception as error:
        raise _cannot_render(error) from error


def _render_generation_spans(tokenizer: PreTrainedTokenizerBase, row: Messages) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[row.turns],
            tools=row.tools,
            chat_template=tokenizer.get_chat_template(tools=row.tools),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:
        raise _cannot_render(error) from error
    return texts[0], list(spans[0])


def _cannot_render(error: Exception) -> CannotRender | UserError:
    """Say what a template raised; its expressions can raise anything, depending on the row."""
    from jinja2 import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return UserError(f"the chat template is not valid jinja: line {error.lineno}: {error.message}")
    return CannotRender(f"the chat template cannot render this row: {error}")


def _located(tokenizer: PreTrainedTokenizerBase, row: Messages, text: str) -> tuple[Marked, list[list[Occurrence]]]:
    """Return the marked turns and each marked part's places in ``text``."""
    # A template may sort arguments by their names, or write them as Python does, which changes the marks.
    for arguments in ("all", "values", "none"):
        marked = with_markers(row.turns, arguments=arguments)
        places = find_occurrences(text, render(tokenizer, marked.turns, row.tools), len(marked.parts))
        if places is not None:
            return marked, places
        if not any(part.kind == "argument" for part in marked.parts):
            break
    raise BadRow(
        "the chat template writes this conversation otherwise when its contents are marked, so what the assistant "
        "wrote cannot be separated from the rest; choose another dataset.chat_template"
    )


def _by_message(row: Messages, parts: list[Part], places: list[list[Occurrence]]) -> list[list[_Own]]:
    """Return the places of each message's parts, in their order in the text.

    A later message may repeat a call, as a tool's turn that names it does: of a call the first place counts.
    """
    owned: list[list[_Own]] = [[] for _ in row.turns]
    for index, (part, found) in enumerate(zip(parts, places, strict=True)):
        counted = found if part.kind in ("content", "thought") else found[:1]
        owned[part.message] += [_Own(index, place.start, place.end) for place in counted]
    return [sorted(own, key=lambda place: place.end) for own in owned]


def _attributed(talk: _Conversation, generated: list[tuple[int, int]]) -> list[Span]:
    """Say whose each span is that the template itself has marked.

    A block without a message belongs to the one before it: an eos in its own block, for example.
    """
    spans: list[Span] = []
    for start, end in generated:
        inside = {i for i, own in enumerate(talk.places) if any(start <= place.end <= end for place in own)}
        whose = {i for i in inside if talk.row.turns[i]["role"] == "assistant"}
        if not whose and not inside:
            whose = set([span.message for span in spans][-1:])
        if len(whose) != 1:
            raise BadRow("a {% generation %} block of the chat template does not hold one message of the assistant")
        (index,) = whose
        # The newline between turns is the template's, not the assistant's.
        end = start + len(talk.text[start:end].rstrip("\n"))
        said = max([start, *(place.end for place in talk.places[index] if place.end <= end)])
        spans.append(Span(start, end, index, talk.text[said:end].strip()))
    return spans


def _derive(talk: _Conversation) -> list[Span]:
    header = _generation_prompt(talk)
    spans: list[Span] = []
    before = 0
    for index, turn in enumerate(talk.row.turns):
        if turn["role"] == "assistant" and talk.places[index]:
            end, end_text = _turn_end(talk, index, usual=spans[-1].end_text if spans else "")
            spans.append(Span(_turn_start(talk, index, header, lower=before), end, index, end_text))
        before = max([before, *(place.end for place in talk.places[index])])
    return spans


def _generation_prompt(talk: _Conversation) -> str:
    """Return what the template writes before an answer that is to come, or nothing."""
    roles = [turn["role"] for turn in talk.row.turns]
    first = next((index for index, role in enumerate(roles) if index and role == "assistant"), len(roles))
    plain = talk.render_alone(talk.row.turns[:first])
    before = talk.render_alone(talk.row.turns[:first], add_generation_prompt=True)
    if plain is None or before is None:
        return ""
    return before[_num_common(plain, before) :].lstrip()


def _turn_start(talk: _Conversation, index: int, header: str, *, lower: int) -> int:
    """Return where the answer begins: after the header that asks for it, or else with the content itself.

    Args:
        lower: where the messages before it end.
    """
    own = talk.places[index][0]
    upper = own.end if own.start is None else own.start
    if header:
        at, length = _best_fit(header, talk.text, lower, upper)
        # In training a template may leave out the end of the header: white space, or an empty thought.
        left_out = header[length:]
        if length and (not left_out.strip() or header[:length].endswith(("\n", *talk.specials))):
            return at + length
    elif index and talk.places[index - 1]:
        # Nothing asks for an answer: it begins where the message before ends when it stands last.
        previous = talk.places[index - 1][-1]
        before = talk.render_alone(talk.marked[:index])
        tail = None if before is None else text_after(before, previous.number)
        if tail is not None and talk.text[previous.end : upper].startswith(tail):
            return previous.end + len(tail)
    if own.start is None or talk.parts[own.number].kind != "content":
        raise BadRow(f"the chat template begins message {index + 1} in a way that cannot be recognised; {talk.advice}")
    return own.start


def _best_fit(header: str, text: str, lower: int, upper: int) -> tuple[int, int]:
    """Return the first place at which ``text`` has the most of the header's beginning, and how much that is."""
    best = (lower, 0)
    at = text.find(header[0], lower, upper)
    while at >= 0 and best[1] < len(header):
        length = _num_common(header, text[at : min(upper, at + len(header))])
        if length > best[1]:
            best = (at, length)
        at = text.find(header[0], at + 1, upper)
    return best


def _turn_end(talk: _Conversation, index: int, *, usual: str) -> tuple[int, str]:
    """Return where the assistant's message ends, and the end-of-turn text that does it, if one does.

    That text is what follows the message both where it stands last and where another message follows.

    Args:
        usual: how the assistant's message before it ends.
    """
    own = talk.places[index][-1]
    if usual in talk.specials and talk.text.startswith(usual, own.end):
        return own.end + len(usual), usual
    is_last = index + 1 == len(talk.row.turns)
    if is_last:
        last = talk.text[own.end :]
        if last.strip() in talk.specials:
            return own.end + len(last.rstrip()), last.strip()
        probe = talk.render_alone([*talk.marked, {"role": "user", "content": "?"}])
        followed = last if probe is None else text_after(probe, own.number)
    else:
        through = talk.render_alone(talk.marked[: index + 1])
        if through is None:
            raise BadRow(
                f"the chat template cannot end with message {index + 1}, so its end is not certain; {talk.advice}"
            )
        last = text_after(through, own.number)
        following = [place for places in talk.places[index + 1 :] for place in places]
        until = min((place.end if place.start is None else place.start for place in following), default=len(talk.text))
        followed = talk.text[own.end : until]
    common = _common_beginning(last, followed, talk.specials)
    rest = last[len(common) :].strip()
    if rest and rest not in talk.specials:  # other text follows: the end is a special token before it, eos if it can be
        common = _up_to_special(common, [talk.tokenizer.eos_token or "", *talk.specials])
        rest = rest if not common else ""
    if not rest or rest in talk.specials:
        if common.strip():
            return own.end + len(common.rstrip()), common.strip()
        if is_last and rest:
            return own.end + len(last.rstrip()), rest
        content_end = len(talk.text[: own.end].rstrip("\n"))
        return max(content_end, own.start or 0), ""
    raise BadRow(f"the chat template ends message {index + 1} in a way that cannot be recognised; {talk.advice}")


def _up_to_special(text: str, specials: Sequence[str]) -> str:
    """Return ``text`` up to the first place of the first of ``specials`` that is in it; nothing if none is."""
    found = next((special for special in specials if special and special in text), None)
    return "" if found is None else text[: text.index(found) + len(found)]


def _common_beginning(one: str, other: str, specials: Sequence[str]) -> str:
    """Return the text with which both begin; no special token is cut in two."""
    if not specials:
        return one[: _num_common(one, other)]
    cut = re.compile("(" + "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) + ")")
    common = ""
    for mine, theirs in zip(cut.split(one), cut.split(other), strict=False):
        if mine != theirs:
            is_text = mine not in specials and theirs not in specials
            return common + (mine[: _num_common(mine, theirs)] if is_text else "")
        common += mine
    return common


def _num_common(one: str, other: str) -> int:
    """Return how many characters both begin with."""
    length = min(len(one), len(other))
    return next((at for at in range(length) if one[at] != other[at]), length)
