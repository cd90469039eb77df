"""Pad rows to a batch; masks come from positions, never from token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from automodel.data.batches.batch import Batch
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

    def __call__(self, examples: Sequence[Example]) -> Batch:
        inputs = _pad_inputs(examples, self.pad_token_id, self.length_multiple)
        return Batch(inputs, **_pad_targets(examples, inputs["input_ids"]))


@dataclass(frozen=True)
class PackedCollator:
    """Makes batches of packed rows, whose documents only ``position_ids`` tell apart.

    ``input_ids``, ``position_ids`` and ``labels`` are int64 [B, T], ``loss_weights`` as above. The padded tail of a
    row is a document of its own, so no attention mask is needed; with a mask, transformers would ignore the positions.

    Flash attention and flex attention get one row [1, sum of T]: the former's variable-length kernels take no
    other, the latter's kernel for a CPU compiles for no other. For flash attention the inputs also hold
    transformers' FlashAttentionKwargs: the borders of the documents, int32 [num_documents + 1], and the length of the
    longest, which the kernels take as a number of the host.

    Attributes:
        length_multiple: T is filled up to a multiple of it.
        attention: transformers' name of the implementation that will read the batch.
    """

    pad_token_id: int
    length_multiple: int = 1
    attention: str = "sdpa"

    def __call__(self, examples: Sequence[Example]) -> Batch:
        import torch

        num_tokens = sum(len(example["input_ids"]) for example in examples)
        is_flash = "flash" in self.attention
        if examples and (is_flash or self.attention == "flex_attention"):
            examples = [join_examples(examples)]
        inputs: dict[str, Any] = _pad_inputs(examples, self.pad_token_id, self.length_multiple)
        del inputs["attention_mask"]
        position_ids = torch.empty_like(inputs["input_ids"])
        for row, positions in enumerate([example["position_ids"] for example in examples] or [[]]):
            position_ids[row, : len(positions)] = torch.tensor(positions)
            position_ids[row, len(positions) :] = torch.arange(position_ids.shape[1] - len(positions))
        inputs["position_ids"] = position_ids
        if is_flash:
            starts = (position_ids[0] == 0).nonzero()[:, 0]
            borders = torch.cat([starts, torch.tensor([position_ids.shape[1]])]).int()
            longest = int(position_ids.max()) + 1
            inputs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
            inputs |= {"max_length_q": longest, "max_length_k": longest}
        return Batch(
            inputs,
            **_pad_targets(examples, position_ids),
            num_tokens=num_tokens,
            # 1 + 3 + 5 + ... over the positions of a document is the square of its length.
            sum_squared_lengths=int((2 * position_ids + 1).sum()),
        )


@dataclass(frozen=True)
class RowTargetCollator:
    """Makes ``input_ids`` and ``attention_mask``, int64 [B, T], and one target for each row as ``labels``, [B].

    No rows make a dummy, as above.

    Attributes:
        target: ``int`` for classes (int64), ``float`` for numbers (float32).
    """

    pad_token_id: int
    length_multiple: int = 1
    target: type = int

    def __call__(self, examples: Sequence[Example]) -> Batch:
        import torch

        labels = [self.target(example["labels"]) for example in examples] or [self.target(IGNORE_INDEX)]
        return Batch(_pad_inputs(examples, self.pad_token_id, self.length_multiple), torch.tensor(labels))


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
