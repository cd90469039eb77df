"""Render a conversation by its chat template and find, with proof, the places that the assistant wrote.

A template with ``{% generation %}`` marks says it itself. For others the conversation is rendered a second time with
markers around every content and tool call. Without its markers this text must be the real rendering, up to white space
that the template trims; so each marker has a known place in the real one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from automodel.data.formats import Messages
from automodel.data.markers import Place, find_places, text_after, with_markers
from automodel.data.readers import BadRow
from automodel.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_OTHER = "choose another dataset.chat_template, or one with {% generation %} marks"


class Span(NamedTuple):
    """A place in the rendered text that one message fills, its end-of-turn text included where it has one."""

    start: int
    end: int
    message: int
    has_end: bool


class _Conversation(NamedTuple):
    """A conversation, its rendering, and the places of its messages in there."""

    tokenizer: PreTrainedTokenizerBase
    row: Messages
    marked: list[dict[str, Any]]
    text: str
    places: list[list[Place]]
    specials: Sequence[str]

    def render_alone(self, turns: list[dict[str, Any]], **options: Any) -> str | None:
        """Render turns that are not the whole conversation; None where the template refuses them."""
        try:
            return render(self.tokenizer, turns, self.row.tools, **options)
        except BadRow:
            return None


def render_spans(
    tokenizer: PreTrainedTokenizerBase, row: Messages, *, also: Sequence[int] = (), specials: Sequence[str] = ()
) -> tuple[str, list[Span]]:
    """Return the rendered conversation and the span of every assistant's message, and of the others in ``also``.

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
    marked, owners = with_markers(row.turns)
    places = find_places(text, render(tokenizer, marked, row.tools), owners, num_turns=len(row.turns))
    if places is None:
        raise BadRow(
            "the chat template writes this conversation otherwise when its contents are marked, so what the assistant "
            f"wrote cannot be told from the rest; {_OTHER}"
        )
    talk = _Conversation(tokenizer, row, marked, text, places, specials)
    _require_whole(talk)
    spans = [_attributed(talk, start, end) for start, end in generated] if is_marked else _derive(talk)
    if not any(span.end > span.start for span in spans):
        raise BadRow("the chat template renders nothing of what the assistant wrote")
    for index in also:
        place = places[index][0] if places[index] else None
        if place is None or place.start is None:
            raise BadRow(f"message {index + 1}: its weight cannot be kept, since its content has no certain place")
        spans.append(Span(place.start, place.end, index, False))
    return text, sorted(span for span in spans if span.end > span.start)


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


def _cannot_render(error: Exception) -> BadRow | UserError:
    """Say what a template raised; its expressions can raise anything, depending on the row."""
    from jinja2 import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return UserError(f"the chat template is not valid jinja: line {error.lineno}: {error.message}")
    return BadRow(f"the chat template cannot render this row: {error}")


def _require_whole(talk: _Conversation) -> None:
    """Refuse a rendering that leaves out, or repeats, a part of the conversation that should be learnt from."""
    for index, (turn, places) in enumerate(zip(talk.row.turns, talk.places, strict=True)):
        what = f"message {index + 1} (role {turn['role']})"
        calls = turn.get("tool_calls") or []
        numbers = [place.number for place in places]
        if len(set(numbers)) < bool(turn["content"].strip()) + len(calls):
            part = "the tool calls" + (" or the content" if turn["content"].strip() else "") + " of " if calls else ""
            raise BadRow(f"the chat template leaves out {part}{what}; choose another dataset.chat_template")
        if turn["role"] == "assistant" and len(set(numbers)) < len(numbers):
            raise BadRow(f"the chat template writes {what} more than once, so its place is not certain; {_OTHER}")
    last = next(turn for turn in reversed(talk.row.turns) if turn["role"] == "assistant")
    if (thought := last.get("reasoning_content")) and thought.strip() not in talk.text:
        raise BadRow("the chat template leaves out the assistant's reasoning; choose another dataset.chat_template")
    for tool in talk.row.tools or ():
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and name not in talk.text:
            raise BadRow(f"the chat template leaves out the tool {name!r}; choose another dataset.chat_template")


def _attributed(talk: _Conversation, start: int, end: int) -> Span:
    """Say whose a span is that the template itself has marked."""
    whose = [
        index
        for index, (turn, places) in enumerate(zip(talk.row.turns, talk.places, strict=True))
        if turn["role"] == "assistant" and places and start <= places[-1].end <= end
    ]
    if len(whose) != 1:
        raise BadRow("a {% generation %} block of the chat template does not hold one message of the assistant")
    (index,) = whose
    # The newline between turns is the template's, not the assistant's.
    end = start + len(talk.text[start:end].rstrip("\n"))
    return Span(start, end, index, bool(talk.text[talk.places[index][-1].end : end].strip()))


def _derive(talk: _Conversation) -> list[Span]:
    header = _generation_prompt(talk)
    spans: list[Span] = []
    for index, turn in enumerate(talk.row.turns):
        if turn["role"] == "assistant" and talk.places[index]:
            end, has_end = _turn_end(talk, index)
            spans.append(Span(_turn_start(talk, index, header), end, index, has_end))
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


def _turn_start(talk: _Conversation, index: int, header: str) -> int:
    """Return where the answer begins: after the header that asks for it, or else with the content itself."""
    turn, own = talk.row.turns[index], talk.places[index][0]
    lower = max((place.end for places in talk.places[:index] for place in places), default=0)
    upper = own.end if own.start is None else own.start
    if header:
        fits = {at: _num_common(header, talk.text[at:upper]) for at in range(lower, upper)}
        at = max(fits, key=fits.__getitem__, default=lower)
        length = fits.get(at, 0)
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
    if own.start is None or turn.get("reasoning_content") or not turn["content"].strip():
        raise BadRow(f"the chat template begins message {index + 1} in a way that cannot be told; {_OTHER}")
    return own.start


def _turn_end(talk: _Conversation, index: int) -> tuple[int, bool]:
    """Return where the assistant's message ends, and whether an end-of-turn text does it.

    That text is what follows the message both where it stands last and where another message follows.
    """
    own = talk.places[index][-1]
    is_last = index + 1 == len(talk.row.turns)
    if is_last:
        last = talk.text[own.end :]
        if last.strip() in talk.specials:
            return own.end + len(last.rstrip()), True
        probe = talk.render_alone([*talk.marked, {"role": "user", "content": "?"}])
        followed = last if probe is None else text_after(probe, own.number)
    else:
        through = talk.render_alone(talk.marked[: index + 1])
        if through is None:
            raise BadRow(f"the chat template cannot end with message {index + 1}, so its end is not certain; {_OTHER}")
        last = text_after(through, own.number)
        following = [place for places in talk.places[index + 1 :] for place in places]
        until = min((place.end if place.start is None else place.start for place in following), default=len(talk.text))
        followed = talk.text[own.end : until]
    common = _common_beginning(last, followed, talk.specials)
    rest = last[len(common) :].strip()
    if not rest or rest in talk.specials:
        if common.strip():
            return own.end + len(common.rstrip()), True
        if is_last and rest:
            return own.end + len(last.rstrip()), True
        content_end = len(talk.text[: own.end].rstrip("\n"))
        return max(content_end, own.start or 0), False
    raise BadRow(f"the chat template ends message {index + 1} in a way that cannot be told; {_OTHER}")


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
