"""Choose a chat template, and tokenise a conversation with what the assistant wrote supervised."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from automodel.data.encode import Tokens, require_eos, special_tokens, tokenize_template, tokenize_text
from automodel.data.formats import Messages
from automodel.data.readers import BadRow
from automodel.data.spans import render_spans
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
    ),
    "llama3": (
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
    ),
    # There is no role for the system: what it says opens the first turn of the user.
    "gemma": (
        "{{- bos_token -}}"
        "{%- set said = namespace(system='') -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}"
        "{%- set said.system = said.system + message['content'] | trim + '\n\n' -%}"
        "{%- else -%}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
        "{{ said.system + message['content'] | trim + '<end_of_turn>\n' }}"
        "{%- set said.system = '' -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
    ),
    "alpaca": (
        "{{- bos_token -}}"
        "{%- if messages[0]['role'] != 'system' -%}"
        "{{ 'Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n' }}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}{{ message['content'] + '\n\n' }}"
        "{%- elif message['role'] == 'user' -%}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '### Response:\n' }}{%- endif -%}"
    ),
}
"""Templates by name. The built-in ones know no tool calls: a row with some is refused."""

_END_MARKS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")

# Noncharacters, which Unicode keeps for a program's own use: they bracket a special token's text in a user's
# message, so that it can be told from the tokens that the template writes.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_KEPT_FOR_MARKERS = re.compile("[\ufdd0-\ufdd4]")


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


def tokenize_messages(
    tokenizer: PreTrainedTokenizerBase, row: Messages, *, supervise: Literal["all", "last"] = "all"
) -> Tokens:
    """Tokenise the rendered conversation; what the assistant wrote, with its end of turn, is supervised.

    The text is cut where the assistant's turns begin and end and each piece is tokenised alone, so that no
    token spans a border. A special token written by the template is that token; in a message it stays text.
    Where the template ends the last turn with nothing, eos follows it: else nothing would teach when to stop.

    Args:
        supervise: ``last`` leaves only the last of the assistant's messages that has a weight.

    Raises:
        BadRow: the template cannot render the row, leaves a part of it out, or the borders cannot be known.
    """
    specials = special_tokens(tokenizer)
    marked = Messages(_mark(row.turns, specials), _mark(row.tools, specials))
    weights = _message_weights(row)
    others = [i for i, turn in enumerate(row.turns) if turn["role"] != "assistant" and weights[i]]
    text, spans = render_spans(tokenizer, marked, also=others, specials=specials)
    answers = [i for i, turn in enumerate(row.turns) if turn["role"] == "assistant"]
    if supervise == "last":
        last = max((i for i in answers if weights[i]), default=None)
        weights = [weight if i == last else 0.0 for i, weight in enumerate(weights)]
    tokens = Tokens([], [], 0)
    position = 0
    for span in spans:
        weight = weights[span.message]
        tokens = _extended(tokens, _piece_ids(tokenizer, text[position : span.start]), weight=0.0)
        if weight:
            tokens = tokens._replace(num_prompt=len(tokens.ids))
        tokens = _extended(tokens, _piece_ids(tokenizer, text[span.start : span.end]), weight=weight)
        needs_eos = span.message == answers[-1] and not span.has_end
        if needs_eos:
            tokens = _extended(tokens, [require_eos(tokenizer)], weight=weight)
        if weight and (span.has_end or needs_eos):
            tokens = tokens._replace(end=len(tokens.ids) - 1)
        position = span.end
    return _extended(tokens, _piece_ids(tokenizer, text[position:]), weight=0.0)


def _message_weights(row: Messages) -> list[float]:
    usual = [float(turn["role"] == "assistant") for turn in row.turns]
    given = row.weights or [None] * len(row.turns)
    return [weight if own is None else own for own, weight in zip(given, usual, strict=True)]


def _built_in(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a built-in template whose turns end with a token that this tokenizer has.

    Spelt out in ordinary tokens, an end mark would be learnt as text, and generation would not stop at it.
    """
    template = BUILT_IN_TEMPLATES[name]
    if tokenizer.eos_token is None:
        return template
    for mark in _END_MARKS:
        if mark not in tokenizer.get_vocab():
            template = template.replace(mark, tokenizer.eos_token)
    return template


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
    if _KEPT_FOR_MARKERS.search(value):
        raise BadRow("holds U+FDD0 to U+FDD4, which are not characters")
    # Longer ones first: one special token may begin with another.
    found = sorted((token for token in specials if token in value), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, found)), f"{_OPEN}\\g<0>{_CLOSE}", value) if found else value


def _piece_ids(tokenizer: PreTrainedTokenizerBase, piece: str) -> list[int]:
    ids: list[int] = []
    for number, part in enumerate(re.split(f"{_OPEN}(.*?){_CLOSE}", piece, flags=re.DOTALL)):
        if part:  # re.split puts what was bracketed at the odd places
            ids += tokenize_text(tokenizer, part) if number % 2 else tokenize_template(tokenizer, part)
    return ids


def _extended(tokens: Tokens, ids: list[int], *, weight: float) -> Tokens:
    return tokens._replace(ids=tokens.ids + ids, weights=tokens.weights + [weight] * len(ids))
