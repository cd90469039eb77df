"""From what a format reads to token ids with their loss weights, cut to length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from automodel.data.chat.conversation import JOINED, tokenize_messages
from automodel.data.chat.encode import Tokens, encode, leading_ids, require_eos, tokenize_text
from automodel.data.formats.samples import Messages, PlainText, PromptCompletion
from automodel.data.prepare.options import Supervise, Truncation
from automodel.data.rows import BadRow
from automodel.types import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNSEPARATED = (
    "no white space is between prompt and completion, and none is added; where there should be some, "
    "dataset.columns.prompt='\"{NAME_OF_FIELD}\\n\"' adds a newline"
)


def tokenize_sample(
    tokenizer: PreTrainedTokenizerBase, sample: PromptCompletion | Messages | PlainText, *, supervise: Supervise = "all"
) -> Tokens:
    """Tokenise a row; ``supervise`` says whether all answers of a conversation count, or the last alone.

    Raises:
        BadRow: see `tokenize_messages`.
        UserError: the tokenizer has no eos token.
    """
    if isinstance(sample, PromptCompletion):
        return tokenize_completion(tokenizer, sample)
    if isinstance(sample, PlainText):
        return tokenize_plain_text(tokenizer, sample)
    return tokenize_messages(tokenizer, sample, supervise=supervise)


def tokenize_input(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int], list[int]]:
    """Return a user's text as ids, with what the tokenizer itself puts before and after a text."""
    inner = tokenize_text(tokenizer, text)
    whole = tokenizer(text, add_special_tokens=True, split_special_tokens=True, verbose=False)["input_ids"]
    starts = range(len(whole) - len(inner) + 1)
    start = next(start for start in starts if whole[start : start + len(inner)] == inner)
    return whole[:start], inner, whole[start + len(inner) :]


def tokenize_completion(tokenizer: PreTrainedTokenizerBase, row: PromptCompletion) -> Tokens:
    """Tokenise prompt and completion as one text, with nothing between them; the completion and eos are supervised.

    A token that holds characters of both is supervised: the model has to write it.
    """
    text, border = row.prompt + row.completion, len(row.prompt)
    encoded = encode(tokenizer, text, as_text=True, borders=[border])
    first, _ = encoded.tokens_of(border, len(text))
    tokens = _ended(tokenizer, leading_ids(tokenizer) + encoded.ids[:first], encoded.ids[first:])
    notes = (JOINED,) if encoded.starts[first] < border else ()
    if not notes and border and not text[border - 1].isspace() and not text[border].isspace():
        notes = (UNSEPARATED,)
    return tokens._replace(notes=notes, text=text, spans=((border, len(text)),))


def tokenize_plain_text(tokenizer: PreTrainedTokenizerBase, row: PlainText) -> Tokens:
    """Tokenise a text for continued pre-training: all of it and eos are supervised, a bos before it is not."""
    return _ended(tokenizer, leading_ids(tokenizer), tokenize_text(tokenizer, row.text))


def cut(tokens: Tokens, *, max_length: int, truncation: Truncation, limit: str = "") -> Tokens | None:
    """Return ``tokens`` cut to ``max_length``, or None where the row is dropped.

    Args:
        limit: what ``max_length`` comes from, for the message.

    Raises:
        BadRow: too long, and ``truncation`` is ``error``.
    """
    excess = len(tokens.ids) - max_length
    if excess <= 0:
        return tokens
    if truncation == "error":
        raise BadRow(
            f"{len(tokens.ids)} tokens, more than {limit or f'dataset.max_length={max_length}'}; shorten the row, or "
            "choose dataset.truncation=right, left or drop"
        )
    if truncation == "drop":
        return None
    first = excess if truncation == "left" else 0
    return tokens._replace(
        ids=tokens.ids[first : first + max_length],
        weights=tokens.weights[first : first + max_length],
        num_prompt=min(max(0, tokens.num_prompt - first), max_length),
        ends=tuple(end - first for end in tokens.ends if first <= end < first + max_length),
    )


def shifted_example(tokens: Tokens) -> dict[str, Any] | None:
    """Return ``input_ids`` and ``labels`` (what each position must predict), or None if nothing is supervised.

    ``loss_weights`` (a float for each position, as the labels) comes with them only where a weight is neither 0
    nor 1. The first token is predicted by nothing, so that its own supervision does not count.
    """
    weights = [*tokens.weights[1:], 0.0]
    if not any(weights):
        return None
    following = [*tokens.ids[1:], IGNORE_INDEX]
    labels = [i if weight else IGNORE_INDEX for i, weight in zip(following, weights, strict=True)]
    example = {"input_ids": tokens.ids, "labels": labels}
    return example if all(weight in (0.0, 1.0) for weight in weights) else example | {"loss_weights": weights}


def _ended(tokenizer: PreTrainedTokenizerBase, before: list[int], supervised: list[int]) -> Tokens:
    ids = [*before, *supervised, require_eos(tokenizer)]
    weights = [0.0] * len(before) + [1.0] * (len(supervised) + 1)
    return Tokens(ids, weights, len(before), (len(ids) - 1,))
