"""Rows of the embedding for all tokens of the tokenizer: find what is missing, and add it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from automodel.models.hf import HFModel, ScratchModel
from automodel.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_NAMED = 5


def new_token_ids(source: Any, tokenizer: PreTrainedTokenizerBase) -> range:
    """Return the ids for which ``model.resize_embeddings`` adds rows; empty without it.

    Args:
        source: what the ``model`` section builds.
    """
    if not isinstance(source, HFModel) or not source.resize_embeddings:
        return range(0)
    return range(source.config().get_text_config().vocab_size, len(tokenizer))


def require_embeddings(source: Any, tokenizer: PreTrainedTokenizerBase, *, largest_id: int) -> None:
    """Refuse rows that hold ids for which the model's embedding has no row; an embedding may be larger.

    Args:
        source: what the ``model`` section builds.
        largest_id: of the ids in the rows, and of the one that fills batches up.

    Raises:
        UserError: there are such ids; it names them and says what to do.
    """
    num_rows = _num_embeddings(source, tokenizer)
    if num_rows is None or largest_id < num_rows:
        return
    ids = range(num_rows, largest_id + 1)
    named = [f"{token_id} ({tokenizer.convert_ids_to_tokens(token_id)})" for token_id in ids[:_MOST_NAMED]]
    if len(ids) > _MOST_NAMED:
        named.append("...")
    remedy = (
        f"model.config.vocab_size={len(tokenizer)} fits, or leave it out"
        if isinstance(source, ScratchModel)
        else f"model.resize_embeddings=true adds rows for all {len(tokenizer):,} tokens of the tokenizer, or use the "
        "tokenizer that belongs to the model"
    )
    raise UserError(
        f"the rows hold the token ids {', '.join(named)}, but the model's embedding has {num_rows:,} rows (ids 0 to "
        f"{num_rows - 1}); {remedy}"
    )


def _num_embeddings(source: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    if isinstance(source, HFModel):
        num_rows = getattr(source.config().get_text_config(), "vocab_size", None)
        return max(num_rows, len(tokenizer)) if num_rows is not None and source.resize_embeddings else num_rows
    return source.config.get("vocab_size") if isinstance(source, ScratchModel) else None
