"""From text to token ids: a user's text, a template's text, and what the tokenizer itself puts around a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from automodel.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokens(NamedTuple):
    """Token ids of a row and what is supervised of them.

    Attributes:
        weights: a loss weight for each token; 0.0 where it is not supervised.
        num_prompt: how many tokens stand before the last supervised turn.
        end: the index of the last supervised token that ends a turn (the template's mark, or eos); None without one.
    """

    ids: list[int]
    weights: list[float]
    num_prompt: int
    end: int | None = None


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a user's text; what looks like a special token in it stays text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def tokenize_template(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of text that a chat template wrote; the special tokens in it are read as such."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]


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
