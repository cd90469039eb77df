"""From text to token ids with supervised positions, cut to length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from automodel.data.formats import PromptCompletion
from automodel.data.readers import BadRow
from automodel.types import IGNORE_INDEX, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["right", "left", "drop", "error"]


class Tokens(NamedTuple):
    """Token ids, whether each is supervised, and how many of them stand before the (last) answer."""

    ids: list[int]
    is_supervised: list[bool]
    num_prompt: int


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a user's text; what looks like a special token in it stays text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def tokenize_template(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of text that a chat template wrote; the special tokens in it are read as such."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]


def tokenize_input(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int], list[int]]:
    """Return a user's text as ids, with what the tokenizer itself puts before and after a text."""
    inner = tokenize_text(tokenizer, text)
    whole = tokenizer(text, add_special_tokens=True, split_special_tokens=True, verbose=False)["input_ids"]
    starts = range(len(whole) - len(inner) + 1)
    start = next(start for start in starts if whole[start : start + len(inner)] == inner)
    return whole[:start], inner, whole[start + len(inner) :]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that stand for no text: bos, eos, ends of turns..."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer itself puts before a text: its bos token, or nothing."""
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return [i for i in ids[:1] if i == tokenizer.bos_token_id]


def require_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that ends an answer.

    Raises:
        UserError: the tokenizer has none, so that the model could never learn to stop.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token, so the model could not learn to end an answer")
    return tokenizer.eos_token_id


def tokenize_completion(tokenizer: PreTrainedTokenizerBase, row: PromptCompletion) -> Tokens:
    """Tokenise prompt and completion apart, so that no token spans both; the completion and eos are supervised.

    A newline is put between them unless one of them brings white space there; it belongs to the prompt.
    """
    prompt = row.prompt
    if prompt and not prompt[-1].isspace() and not row.completion[0].isspace():
        prompt += "\n"
    before = leading_ids(tokenizer) + tokenize_text(tokenizer, prompt)
    answer = [*tokenize_text(tokenizer, row.completion), require_eos(tokenizer)]
    return Tokens(before + answer, [False] * len(before) + [True] * len(answer), len(before))


def cut(tokens: Tokens, *, max_length: int, truncation: Truncation) -> Tokens | None:
    """Return ``tokens`` cut to ``max_length``, or None where the row is dropped.

    Raises:
        BadRow: too long, and ``truncation`` is ``error``.
    """
    excess = len(tokens.ids) - max_length
    if excess <= 0:
        return tokens
    if truncation == "error":
        raise BadRow(
            f"{len(tokens.ids)} tokens, more than the {max_length} allowed (dataset.max_length); raise it, or choose "
            "dataset.truncation=right, left or drop"
        )
    if truncation == "drop":
        return None
    if truncation == "left":
        return Tokens(tokens.ids[excess:], tokens.is_supervised[excess:], max(0, tokens.num_prompt - excess))
    return Tokens(tokens.ids[:max_length], tokens.is_supervised[:max_length], min(max_length, tokens.num_prompt))


def shifted_example(tokens: Tokens) -> dict[str, Any] | None:
    """Return ``input_ids`` and ``labels`` (what each position must predict), or None if nothing is supervised.

    The first token is predicted by nothing, so that its own supervision does not count.
    """
    supervised = zip(tokens.ids[1:], tokens.is_supervised[1:], strict=True)
    labels = [i if keep else IGNORE_INDEX for i, keep in supervised] + [IGNORE_INDEX]
    if all(label == IGNORE_INDEX for label in labels):
        return None
    return {"input_ids": tokens.ids, "labels": labels}
