"""See that a model keeps the documents of a packed row apart, before anything is trained on such rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from automodel.distributed.parallel.handle import handle_of
from automodel.types import IGNORE_INDEX, UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    Batch = Any  # of data/batches, a neighbour of this room

# Of different and odd lengths, and two rows, so that one of them is padded. Short: every model can take them.
DOCUMENT_LENGTHS = ((5, 8, 6), (3, 4))
CHANGED_DOCUMENT = 1


def require_isolation(
    model: nn.Module,
    *,
    collate: Callable[[Sequence[dict[str, Any]]], Batch],
    forward: Callable[[nn.Module, Batch], torch.Tensor],
    vocab_size: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    attention: str,
) -> None:
    """Refuse a model in which one packed document changes what is computed for another.

    Two packed rows go through ``model`` twice, fed as in training but without dropout; the second time one
    document has other tokens. The logits of every other document must stay the same to the last bit: what is
    masked has a weight of exactly 0. This finds what no list of names could: attention that overlooks
    ``position_ids``, and linear attention, state spaces and convolutions that run on over a border.

    Every rank must call it, with the model as it will train (sharded, adapted, compiled). All ranks take the same
    tokens, so all come to the same result; ``run_on_all_ranks`` makes sure of it. Nothing of the model changes.

    Args:
        collate: the collator of the training batches.
        forward: (model, batch on ``device``) -> logits [B, T, V], as the loss computes them.
        vocab_size: token ids are drawn below it; at least 2.
        autocast: makes the context of a forward.
        attention: the model's attention implementation, for the message.

    Raises:
        UserError: the documents are not kept apart, or the model does not take packed rows at all.
    """
    import torch

    first, second = _documents(vocab_size)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast():
            before, after = (
                _logits_by_document(model, _batch(rows, collate), device=device, forward=forward)
                for rows in (first, second)
            )
    except (TypeError, ValueError) as error:
        raise UserError(_refusal(attention, f"does not take packed rows ({type(error).__name__}: {error})")) from error
    finally:
        model.train(was_training)
        handle_of(model).reshard()
    pairs = list(zip(before, after, strict=True))
    if torch.equal(*pairs.pop(CHANGED_DOCUMENT)):
        raise UserError(_refusal(attention, "gave a packed document the same logits after its tokens were replaced"))
    if not all(torch.equal(old, new) for old, new in pairs):
        change = max((new - old).abs().max().item() for old, new in pairs)
        what = f"does not keep packed documents apart: one of them changed the logits of another by {change:.2g}"
        raise UserError(_refusal(attention, what))


def _documents(vocab_size: int) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """Return two packed rows of documents, and the same with other tokens in one document."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = [
        [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
        for lengths in DOCUMENT_LENGTHS
    ]
    changed = [list(row) for row in rows]
    shifts = torch.randint(1, vocab_size, (DOCUMENT_LENGTHS[0][CHANGED_DOCUMENT],), generator=generator).tolist()
    old = rows[0][CHANGED_DOCUMENT]
    changed[0][CHANGED_DOCUMENT] = [(i + shift) % vocab_size for i, shift in zip(old, shifts, strict=True)]
    return rows, changed


def _batch(rows: list[list[list[int]]], collate: Callable[[Sequence[dict[str, Any]]], Batch]) -> Batch:
    return collate(
        [
            {
                "input_ids": [i for document in row for i in document],
                "labels": [IGNORE_INDEX for document in row for _ in document],
                "position_ids": [position for document in row for position in range(len(document))],
            }
            for row in rows
        ]
    )


def _logits_by_document(
    model: nn.Module,
    batch: Batch,
    *,
    device: torch.device,
    forward: Callable[[nn.Module, Batch], torch.Tensor],
) -> list[torch.Tensor]:
    """Return the logits [T of the document, V] of every document, padded tails among them, in their order."""
    borders = (batch["position_ids"].flatten() == 0).nonzero()[1:, 0]
    logits_BTV = forward(model, batch.to(device))
    return list(logits_BTV.flatten(0, 1).float().cpu().tensor_split(borders))


def _refusal(attention: str, what: str) -> str:
    other = "" if attention == "sdpa" else ", or try model.attn_implementation=sdpa"
    return (
        f"packing.enabled=true: this model with attention {attention!r} {what}; set packing.enabled=false{other}. "
        "No setting helps where layers of linear attention, state spaces or convolutions run on from one document "
        "into the next, or where the model's own code masks without reading position_ids"
    )
