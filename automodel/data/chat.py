"""Render a conversation by its chat template and find the tokens that the assistant wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from automodel.data.formats import Messages
from automodel.data.readers import BadRow
from automodel.data.tokenize import Tokens, require_eos, special_tokens, tokenize_template, tokenize_text
from automodel.logs import get_logger
from automodel.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

BUILT_IN_TEMPLATES = {
    "chatml": (
        "{%- for message in messages -%}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )
}

_END_MARK = "<|im_end|>"
_GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

# Noncharacters, which Unicode keeps for a program's own use: they bracket a special token's text in a user's
# message, so that it can be told from the tokens that the template writes.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class _Rendered(NamedTuple):
    """A conversation's text and the spans (start, end) of it that the assistant wrote, end of turn included."""

    text: str
    spans: list[tuple[int, int]]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> None:
    """Give ``tokenizer`` the template chosen: a built-in name, a jinja file, or with None its own.

    A tokenizer without one gets ``chatml``, and a line says so. The template travels with the export.

    Raises:
        UserError: the file cannot be read.
    """
    if choice is None:
        if tokenizer.chat_template is None:
            log.info("the tokenizer has no chat template: chatml is used (dataset.chat_template chooses another)")
            tokenizer.chat_template = _built_in("chatml", tokenizer)
    elif choice in BUILT_IN_TEMPLATES:
        tokenizer.chat_template = _built_in(choice, tokenizer)
    else:
        tokenizer.chat_template = _read_template(Path(choice).expanduser())


def tokenize_messages(tokenizer: PreTrainedTokenizerBase, row: Messages) -> Tokens:
    """Tokenise the rendered conversation; what the assistant wrote, with its end of turn, is supervised.

    The text is cut where the assistant's turns begin and end and each piece is tokenised alone, so that no
    token spans a border. A special token written by the template is that token; in a message it stays text.
    Where the template ends the last turn with nothing, eos follows it: else nothing would teach when to stop.

    Raises:
        BadRow: the template cannot render the row, or renders the beginning of a conversation otherwise than
            within the whole, so that the borders cannot be known.
    """
    specials = special_tokens(tokenizer)
    marked = Messages(_mark(row.turns, specials), _mark(row.tools, specials))
    text, spans = _render_spans(tokenizer, marked)
    tokens = Tokens([], [], 0)
    position = 0
    for start, end in spans:
        tokens = _extended(tokens, _piece_ids(tokenizer, text[position:start]), is_supervised=False)
        tokens = tokens._replace(num_prompt=len(tokens.ids))
        tokens = _extended(tokens, _piece_ids(tokenizer, text[start:end]), is_supervised=True)
        position = end
    if not _has_end_of_turn(text[slice(*spans[-1])], marked):
        tokens = _extended(tokens, [require_eos(tokenizer)], is_supervised=True)
    return _extended(tokens, _piece_ids(tokenizer, text[position:]), is_supervised=False)


def _built_in(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a built-in template whose turns end with a token that this tokenizer has.

    Spelt out in ordinary tokens, an end mark would be learnt as text, and generation would not stop at it.
    """
    template = BUILT_IN_TEMPLATES[name]
    if _END_MARK in tokenizer.get_vocab() or tokenizer.eos_token is None:
        return template
    return template.replace(_END_MARK, tokenizer.eos_token)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        built_in = ", ".join(BUILT_IN_TEMPLATES)
        raise UserError(
            f"dataset.chat_template={path} cannot be read ({reason}); give a jinja file, or a built-in name: {built_in}"
        ) from error


def _mark(value: Any, specials: list[str]) -> Any:
    """Return a copy of ``value`` in which the text of every special token is bracketed."""
    if isinstance(value, dict):
        return {key: _mark(each, specials) for key, each in value.items()}
    if isinstance(value, list):
        return [_mark(each, specials) for each in value]
    if not isinstance(value, str):
        return value
    if _OPEN in value or _CLOSE in value:
        raise BadRow("holds U+FDD0 or U+FDD1, which are not characters")
    # Longer ones first: one special token may begin with another.
    found = sorted((token for token in specials if token in value), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, found)), f"{_OPEN}\\g<0>{_CLOSE}", value) if found else value


def _piece_ids(tokenizer: PreTrainedTokenizerBase, piece: str) -> list[int]:
    ids: list[int] = []
    for number, part in enumerate(re.split(f"{_OPEN}(.*?){_CLOSE}", piece, flags=re.DOTALL)):
        if part:  # re.split puts what was bracketed at the odd places
            ids += tokenize_text(tokenizer, part) if number % 2 else tokenize_template(tokenizer, part)
    return ids


def _has_end_of_turn(last_span: str, row: Messages) -> bool:
    """Return whether the template wrote something after the last answer; it may have trimmed the answer itself."""
    answer = next(turn["content"] for turn in reversed(row.turns) if turn["role"] == "assistant").rstrip()
    return not answer or not last_span.rstrip().endswith(answer)


def _extended(tokens: Tokens, ids: list[int], *, is_supervised: bool) -> Tokens:
    return Tokens(tokens.ids + ids, tokens.is_supervised + [is_supervised] * len(ids), tokens.num_prompt)


def _render_spans(tokenizer: PreTrainedTokenizerBase, row: Messages) -> _Rendered:
    if _GENERATION_MARK.search(tokenizer.get_chat_template(tools=row.tools)):
        rendered = _render_marked_spans(tokenizer, row)
    else:
        rendered = _render_prefix_spans(tokenizer, row)
    # The newline between turns is the template's, not the assistant's.
    spans = [(start, start + len(rendered.text[start:end].rstrip("\n"))) for start, end in rendered.spans]
    spans = [(start, end) for start, end in spans if end > start]
    if not spans:
        raise BadRow("the chat template renders nothing of what the assistant wrote")
    return _Rendered(rendered.text, spans)


def _render_marked_spans(tokenizer: PreTrainedTokenizerBase, row: Messages) -> _Rendered:
    """Take the spans that the template itself marks with ``{% generation %}``."""
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
    return _Rendered(texts[0], list(spans[0]))


def _render_prefix_spans(tokenizer: PreTrainedTokenizerBase, row: Messages) -> _Rendered:
    """Find the spans by rendering the conversation up to and through every turn of the assistant."""
    text = _render(tokenizer, row, num_turns=len(row.turns))
    spans = []
    for index, turn in enumerate(row.turns):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, row, num_turns=index, with_header=True)
        through = _render(tokenizer, row, num_turns=index + 1)
        if not (through.startswith(before) and text.startswith(through)):
            raise BadRow(
                f"the chat template renders message {index + 1} otherwise within the whole conversation than at its "
                "end, so what the assistant wrote cannot be told from the rest; choose another dataset.chat_template, "
                "or one with {% generation %} marks"
            )
        spans.append((len(before), len(through)))
    return _Rendered(text, spans)


def _render(tokenizer: PreTrainedTokenizerBase, row: Messages, *, num_turns: int, with_header: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(
            row.turns[:num_turns], tools=row.tools, tokenize=False, add_generation_prompt=with_header
        )
    except Exception as error:
        raise _cannot_render(error) from error


def _cannot_render(error: Exception) -> BadRow | UserError:
    """Say what a template raised; its expressions can raise anything, depending on the row."""
    from jinja2 import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return UserError(f"the chat template is not valid jinja: line {error.lineno}: {error.message}")
    return BadRow(f"the chat template cannot render this row: {error}")
