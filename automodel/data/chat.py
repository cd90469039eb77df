"""Render a conversation by its chat template and find the tokens that the assistant wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from automodel.data.formats import Messages
from automodel.data.readers import BadRow
from automodel.data.tokenize import Tokens, require_eos
from automodel.logs import get_logger

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


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> None:
    """Give ``tokenizer`` the template chosen: a built-in name, a jinja file, or with None its own.

    A tokenizer without one gets ``chatml``, and a line says so. The template travels with the export.
    """
    if choice is None:
        if tokenizer.chat_template is None:
            log.info("the tokenizer has no chat template: chatml is used (dataset.chat_template chooses another)")
            tokenizer.chat_template = BUILT_IN_TEMPLATES["chatml"]
    elif choice in BUILT_IN_TEMPLATES:
        tokenizer.chat_template = BUILT_IN_TEMPLATES[choice]
    else:
        tokenizer.chat_template = Path(choice).expanduser().read_text(encoding="utf-8")


def tokenize_messages(tokenizer: PreTrainedTokenizerBase, row: Messages) -> Tokens:
    """Tokenise the rendered conversation; what the assistant wrote, with its end of turn, is supervised.

    The text is cut where the assistant's turns begin and end and each piece is tokenised alone, so that no
    token spans a border.

    Raises:
        BadRow: the template cannot render the row, or renders the beginning of a conversation otherwise than
            within the whole, so that the borders cannot be known.
    """
    text, spans = _rendered_spans(tokenizer, row)
    ids: list[int] = []
    is_supervised: list[bool] = []
    num_prompt = position = 0
    for start, end in spans:
        num_prompt = len(ids)
        for piece, supervised in ((text[position:start], False), (text[start:end], True)):
            piece_ids = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            ids += piece_ids
            is_supervised += [supervised] * len(piece_ids)
            num_prompt = num_prompt if supervised else len(ids)
        position = end
    rest = tokenizer(text[position:], add_special_tokens=False)["input_ids"] if text[position:] else []
    if not _ends_in_marker(text, row):  # then nothing would teach the model to stop
        ids.append(require_eos(tokenizer))
        is_supervised.append(True)
    return Tokens(ids + rest, is_supervised + [False] * len(rest), num_prompt)


def _rendered_spans(tokenizer: PreTrainedTokenizerBase, row: Messages) -> tuple[str, list[tuple[int, int]]]:
    """Return the whole text and the spans of it that the assistant wrote, end of turn included."""
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
                "end, so what the assistant wrote cannot be told from the rest; choose another dataset.chat_template"
            )
        spans.append((len(before), len(before) + len(through[len(before) :].rstrip("\n"))))
    return text, spans


def _render(
    tokenizer: PreTrainedTokenizerBase, row: Messages, *, num_turns: int, with_header: bool = False
) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            row.turns[:num_turns], tools=row.tools, tokenize=False, add_generation_prompt=with_header
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise BadRow(f"the chat template cannot render this row: {error}") from error


def _ends_in_marker(text: str, row: Messages) -> bool:
    """Return whether the template closes the last assistant turn with a mark of its own."""
    last = next(turn for turn in reversed(row.turns) if turn["role"] == "assistant")
    return not text.rstrip("\n").endswith(last["content"].rstrip("\n"))

