"""The summed cross entropy of a linear output layer, whose logits exist for one chunk of positions at a time.

The gradients are computed together with the loss, while a chunk's logits exist, so nothing is computed twice.

Shapes: N positions, D features, V entries of the vocabulary (with tensor parallelism: of this rank's part).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from automodel.distributed.parallel.reduce import all_reduce_, all_reduce_sum_
from automodel.types import IGNORE_INDEX

if TYPE_CHECKING:
    from automodel.losses.cross_entropy import Batch
    from automodel.losses.linear_cross_entropy import LinearCrossEntropy
    from automodel.losses.output_layer import LogitTransform

_CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**29}
"""Float32 logits in a chunk. On a CPU larger ones gain nothing; a GPU needs larger products to be busy."""


@dataclass(frozen=True)
class Targets:
    """The supervised positions of a batch: where they are in [B * T], their labels, and their weights or None."""

    positions_N: torch.Tensor
    labels_N: torch.Tensor
    weights_N: torch.Tensor | None

    @staticmethod
    def of(batch: Batch) -> Targets:
        """Return those of ``batch``."""
        positions, labels = batch.label_positions, batch.labels.flatten()
        if positions is None:  # a batch made on the device, which has to be waited for
            positions = (labels != IGNORE_INDEX).nonzero()[:, 0]
        weights = batch.loss_weights
        weights = None if weights is None else weights.flatten().index_select(0, positions)
        return Targets(positions, labels.index_select(0, positions), weights)

    def __getitem__(self, rows: slice) -> Targets:
        weights = None if self.weights_N is None else self.weights_N[rows]
        return Targets(self.positions_N[rows], self.labels_N[rows], weights)


@dataclass(frozen=True)
class VocabularyPart:
    """A rank's part of the vocabulary: from entry ``offset`` on, split over ``group``; the whole without a group."""

    vocab_size: int
    offset: int = 0
    group: dist.ProcessGroup | None = None


def chunk_rows(num_positions: int, vocab_size: int, chunk_size: int | None, device_type: str = "cpu") -> int:
    """Return how many positions a chunk has: about equally many in each, and at least 1."""
    most = chunk_size or max(1, _CHUNK_BYTES.get(device_type, _CHUNK_BYTES["cuda"]) // (4 * vocab_size))
    num_chunks = max(1, -(-num_positions // most))
    return max(1, -(-num_positions // num_chunks))


def chunked_loss_sum(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets: Targets,
    *,
    loss: LinearCrossEntropy,
    transform: LogitTransform,
    part: VocabularyPart | None = None,
) -> torch.Tensor:
    """Return the loss sum, a float32 scalar with gradients for the first three tensors.

    Args:
        loss: its label smoothing, z-loss and chunk size are used.
        transform: what the model does to the logits.
        part: this rank's part of a vocabulary that ranks split; each has the same hidden states, and all must call it.
    """
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    scorer = _Scorer(targets, loss, transform, part or VocabularyPart(len(weight_VD)))
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return _ChunkedLoss.apply(hidden_ND, weight_VD, bias_V, scorer, torch.is_grad_enabled())


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        scorer: _Scorer,
        is_training: bool,
    ) -> torch.Tensor:
        needed = [is_training and each for each in ctx.needs_input_grad[:3]]
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        (num, width), vocab = hidden_ND.shape, len(weight_VD)
        rows = chunk_rows(num, vocab, scorer.loss.chunk_size, hidden_ND.device.type)
        # Of several chunks, weights' gradients are summed in float32.
        sum_dtype = weight_VD.dtype if num <= rows else torch.float32
        grad_hidden = torch.empty_like(hidden_ND) if needed[0] else None
        grad_weight = torch.zeros(vocab, width, dtype=sum_dtype, device=weight_VD.device) if needed[1] else None
        grad_bias = torch.zeros(vocab, dtype=torch.float32, device=weight_VD.device) if needed[2] else None
        for start in range(0, num, rows):
            chunk = slice(start, start + rows)
            logits = torch.nn.functional.linear(hidden_ND[chunk], weight_VD, bias_V)
            loss_sum, grad = scorer(logits, chunk, needs_grad=any(needed))
            total += loss_sum
            if grad is None:
                continue
            grad = grad.to(weight_VD.dtype)
            if needed[0]:
                torch.mm(grad, weight_VD, out=grad_hidden[chunk])
            if needed[1] and sum_dtype == weight_VD.dtype:
                torch.addmm(grad_weight, grad.T, hidden_ND[chunk], beta=int(start > 0), out=grad_weight)
            elif needed[1]:
                grad_weight += grad.T @ hidden_ND[chunk]
            if needed[2]:
                grad_bias += grad.sum(dim=0, dtype=torch.float32)
        if grad_hidden is not None:
            all_reduce_sum_(grad_hidden, scorer.part.group)
        ctx.grads = [
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None else grad_bias.to(weight_VD.dtype),
        ]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("a backward through linear_cross_entropy can run once")
        if grad_loss.device.type != "cpu" or grad_loss != 1:  # a device is not waited for to know that
            grads = [None if grad is None else grad.mul_(grad_loss) for grad in grads]
        return *grads, None, None


@dataclass(frozen=True)
class _Scorer:
    """Makes the loss and its gradient of a chunk of logits."""

    targets: Targets
    loss: LinearCrossEntropy
    transform: LogitTransform
    part: VocabularyPart

    def __call__(
        self, logits: torch.Tensor, chunk: slice, *, needs_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (loss sum, gradient of it with respect to the layer's own logits [rows, V] or None)."""
        targets, part, smoothing = self.targets[chunk], self.part, self.loss.label_smoothing
        logits = self.transform(logits.float())
        log_p, log_z = self._log_softmax(logits)
        labels, weights = targets.labels_N - part.offset, targets.weights_N
        is_here = None  # whether this rank's part has the label
        if part.group is not None:
            is_here = (labels >= 0) & (labels < logits.shape[1])
            labels = labels.clamp(0, logits.shape[1] - 1)
        log_p_label = log_p.gather(1, labels[:, None])[:, 0]
        if is_here is not None:
            log_p_label = log_p_label * is_here
            all_reduce_sum_(log_p_label, part.group)
        terms = -(1 - smoothing) * log_p_label
        if smoothing:
            log_p_sum = log_p.sum(dim=1)
            all_reduce_sum_(log_p_sum, part.group)
            terms = terms - smoothing / part.vocab_size * log_p_sum
        if self.loss.z_loss:
            terms = terms + self.loss.z_loss * log_z.square()
        loss_sum = (terms if weights is None else terms * weights).sum()
        if not needs_grad:
            return loss_sum, None
        grad = log_p.exp_()
        if self.loss.z_loss:
            grad *= (1 + 2 * self.loss.z_loss * log_z)[:, None]
        if smoothing:
            grad -= smoothing / part.vocab_size
        share = torch.full_like(log_p_label, smoothing - 1)
        grad.scatter_add_(1, labels[:, None], (share if is_here is None else share * is_here)[:, None])
        if weights is not None:
            grad *= weights[:, None]
        if self.transform.cap is not None:
            grad *= 1 - (logits / self.transform.cap).square()
        return loss_sum, grad if self.transform.scale == 1 else grad.mul_(self.transform.scale)

    def _log_softmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (log of the softmax over the whole vocabulary [rows, V], log of its denominator or None)."""
        if self.part.group is None:
            log_p = logits.log_softmax(dim=1)
            return log_p, logits[:, 0] - log_p[:, 0] if self.loss.z_loss else None
        largest = logits.amax(dim=1)
        all_reduce_(largest, self.part.group, dist.ReduceOp.MAX)
        total = (logits - largest[:, None]).exp_().sum(dim=1)
        all_reduce_sum_(total, self.part.group)
        log_z = largest + total.log()
        return logits - log_z[:, None], log_z
