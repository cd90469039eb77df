"""One micro-batch: what the model reads, what it should answer, and the counts that the host knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from automodel.types import IGNORE_INDEX

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class Batch:
    """A micro-batch of one rank. Tensors can also be read by name: ``batch["labels"]``, ``{**batch}``.

    The counts are plain numbers, so that a step never waits for the device to know them. Left out, they are computed
    from the tensors.

    Attributes:
        inputs: keyword arguments of the model's forward: ``input_ids`` [B, T], masks, positions; perhaps plain numbers.
        labels: aligned with the logits, [B, T] for a language model, [B] for a classifier; -100 is not supervised.
        loss_weights: a factor for each label, of the same shape; None: 1 everywhere.
        num_label_tokens: supervised labels.
        num_tokens: tokens without padding.
        sum_squared_lengths: of the documents in it, which the cost of attention grows with.
        label_positions: where ``labels`` are supervised, int64 [N], as positions in the flattened labels; None for
            labels made on a device, because it would have to be waited for.
    """

    inputs: dict[str, Any]
    labels: torch.Tensor
    loss_weights: torch.Tensor | None = None
    num_label_tokens: int = field(default=-1)
    num_tokens: int = field(default=-1)
    sum_squared_lengths: int = field(default=-1)
    label_positions: torch.Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.labels.device.type == "cpu":
            self.label_positions = (self.labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
        if self.num_label_tokens < 0:
            self.num_label_tokens = int((self.labels != IGNORE_INDEX).sum())
        if self.num_tokens < 0 or self.sum_squared_lengths < 0:
            counts = _count_tokens(self.inputs) if self.num_label_tokens else (0, 0)  # a dummy counts for nothing
            self.num_tokens, self.sum_squared_lengths = counts

    @property
    def num_slots(self) -> int:
        """The tokens that the model computes, padding included."""
        ids = self.inputs.get("input_ids")
        return self.num_tokens if ids is None else ids.numel()

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on ``device``; the copies may still be in flight."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; torch's DataLoader calls it."""
        return self._with_each(lambda tensor: tensor.pin_memory())

    def keys(self) -> Iterator[str]:
        """Return the names of the tensors."""
        return iter(self._tensors())

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors()[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors()

    def get(self, name: str, default: Any = None) -> Any:
        """Return a tensor by name, or ``default`` if the batch has none of that name."""
        return self._tensors().get(name, default)

    def _tensors(self) -> dict[str, Any]:
        weights = {} if self.loss_weights is None else {"loss_weights": self.loss_weights}
        return {**self.inputs, "labels": self.labels, **weights}

    def _with_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        import torch

        done: dict[int, torch.Tensor] = {}  # one tensor may be two of the model's inputs

        def changed(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) not in done:
                done[id(value)] = change(value)
            return done[id(value)]

        copy = replace(
            self,
            inputs={name: changed(value) for name, value in self.inputs.items()},
            labels=changed(self.labels),
            loss_weights=changed(self.loss_weights),
        )
        copy.label_positions = changed(self.label_positions)
        return copy


def as_batch(tensors: Batch | Mapping[str, torch.Tensor]) -> Batch:
    """Return ``tensors`` as a Batch: all but ``labels`` and ``loss_weights`` are the model's inputs."""
    if isinstance(tensors, Batch):
        return tensors
    inputs = {name: value for name, value in tensors.items() if name not in ("labels", "loss_weights")}
    return Batch(inputs, tensors["labels"], tensors.get("loss_weights"))


def _count_tokens(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Return (tokens that are not padding, squared lengths of the rows)."""
    if "attention_mask" in inputs:
        lengths = inputs["attention_mask"].sum(dim=-1)
        return int(lengths.sum()), int(lengths.square().sum())
    ids = inputs.get("input_ids")
    return (0, 0) if ids is None else (ids.numel(), ids.shape[0] * ids.shape[-1] ** 2)
