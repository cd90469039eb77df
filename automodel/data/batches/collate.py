"""Pad rows to a batch; masks come from positions, never from token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from automodel.types import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

Example = dict[str, Any]


@dataclass(frozen=True)
class CausalLMCollator:
    """Makes ``input_ids``, ``attention_mask`` and ``labels``, all int64 [B, T], padded on the right.

    Where an example has ``loss_weights``, so has the batch: float32 [B, T], 1 for the examples without, 0 where
    padded. No rows make a dummy of one token that supervises nothing, for a rank that has no row left in a step.

    Attributes:
        length_multiple: T is filled up to a multiple of it.
    """

    pad_token_id: int
    length_multiple: int = 1

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        batch = _pad_inputs(examples, self.pad_token_id, self.length_multiple)
        return batch | _pad_targets(examples, batch["input_ids"])


@dataclass(frozen=True)
class PackedCollator:
    """Makes batches of packed rows, whose documents only ``position_ids`` tell apart.

    ``input_ids``, ``position_ids`` and ``labels`` are int64 [B, T], ``loss_weights`` as above, and ``num_tokens``
    counts the tokens that are not padding, int64 []. The padded tail of a row is a document of its own, so that no
    attention mask is needed: transformers would stop looking at the positions beside one.

    Flash attention and flex attention get one row [1, sum of T]: the former's variable-length kernels take no
    other, the latter's kernel for a CPU compiles for no other. For flash attention the batch also has
    ``cu_seq_lens``, int32 [num_documents + 1], and ``max_length``, [longest document, 0]: a length as the shape of
    an empty tensor, which the host still knows without waiting after the batch has gone to the device.

    Attributes:
        length_multiple: T is filled up to a multiple of it.
        attention: transformers' name of the implementation that will read the batch.
    """

    pad_token_id: int
    length_multiple: int = 1
    attention: str = "sdpa"

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        import torch

        num_tokens = sum(len(example["input_ids"]) for example in examples)
        is_flash = "flash" in self.attention
        if examples and (is_flash or self.attention == "flex_attention"):
            examples = [join_examples(examples)]
        batch = _pad_inputs(examples, self.pad_token_id, self.length_multiple)
        del batch["attention_mask"]
        position_ids = torch.empty_like(batch["input_ids"])
        for row, positions in enumerate([example["position_ids"] for example in examples] or [[]]):
            position_ids[row, : len(positions)] = torch.tensor(positions)
            position_ids[row, len(positions) :] = torch.arange(position_ids.shape[1] - len(positions))
        batch |= {"position_ids": position_ids, **_pad_targets(examples, position_ids)}
        if is_flash:
            starts = (position_ids[0] == 0).nonzero()[:, 0]
            batch["cu_seq_lens"] = torch.cat([starts, torch.tensor([position_ids.shape[1]])]).int()
            batch["max_length"] = torch.empty(int(position_ids.max()) + 1, 0)
        return batch | {"num_tokens": torch.tensor(num_tokens)}


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


def _pad_targets(examples: Sequence[Example], like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return ``labels`` and, where an example has them, ``loss_weights``, of the shape of ``like``."""
    import torch

    targets = {"labels": torch.full_like(like, IGNORE_INDEX)}
    weights = _loss_weights(examples)
    if weights is not None:
        targets["loss_weights"] = torch.zeros(like.shape, dtype=torch.float32)
    for row, example in enumerate(examples):
        length = len(example["labels"])
        targets["labels"][row, :length] = torch.tensor(example["labels"])
        if weights is not None:
            targets["loss_weights"][row, :length] = torch.tensor(weights[row])
    return targets


def join_examples(examples: Sequence[Example]) -> Example:
    """Return examples that have ``position_ids`` as one, in their order."""
    names = ("input_ids", "labels", "position_ids")
    joined = {name: list(chain.from_iterable(example[name] for example in examples)) for name in names}
    weights = _loss_weights(examples)
    return joined if weights is None else joined | {"loss_weights": list(chain.from_iterable(weights))}


def _loss_weights(examples: Sequence[Example]) -> list[Sequence[float]] | None:
    """Return the weights of every example, 1 for one without any (or with none in it); None where none has any."""
    weights = [example.get("loss_weights", ()) for example in examples]
    if not any(map(len, weights)):
        return None
    return [own if len(own) else [1.0] * len(example["labels"]) for own, example in zip(weights, examples, strict=True)]
