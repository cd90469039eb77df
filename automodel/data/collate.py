"""Pad rows to a batch; masks come from positions, never from token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from automodel.types import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

Example = dict[str, Any]


@dataclass(frozen=True)
class CausalLMCollator:
    """Makes ``input_ids``, ``attention_mask`` and ``labels``, all int64 [B, T], padded on the right.

    No rows make a dummy of one token that supervises nothing, for a rank that has no row left in a step.

    Attributes:
        length_multiple: T is filled up to a multiple of it.
    """

    pad_token_id: int
    length_multiple: int = 1

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        import torch

        batch = _pad_inputs(examples, self.pad_token_id, self.length_multiple)
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for row, example in enumerate(examples):
            labels[row, : len(example["labels"])] = torch.tensor(example["labels"])
        return batch | {"labels": labels}


@dataclass(frozen=True)
class ClassificationCollator:
    """Makes ``input_ids`` and ``attention_mask``, int64 [B, T], and ``labels``, int64 [B]; dummies as above."""

    pad_token_id: int
    length_multiple: int = 1

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        import torch

        labels = [example["labels"] for example in examples] or [IGNORE_INDEX]
        return _pad_inputs(examples, self.pad_token_id, self.length_multiple) | {"labels": torch.tensor(labels)}


def _pad_inputs(examples: Sequence[Example], pad_token_id: int, length_multiple: int) -> dict[str, torch.Tensor]:
    import torch

    rows = [example["input_ids"] for example in examples] or [[pad_token_id]]
    length = -(-max(map(len, rows)) // length_multiple) * length_multiple
    input_ids = torch.full((len(rows), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
