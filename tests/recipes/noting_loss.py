"""Losses that note or check under what conditions they are called; named as a user would name their own."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from automodel.data.batches.batch import Batch
from automodel.losses.cross_entropy import CrossEntropy, cross_entropy_sum, forward_logits


class Noting(CrossEntropy):
    """Appends a line for each call to ``$NOTES/RANK.jsonl``."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        random_state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        logits = forward_logits(model, batch)
        loss_sum = cross_entropy_sum(logits, batch.labels, loss_weights=batch.loss_weights)
        note = {
            "is_training": model.training,
            "modes": sorted({module.training for module in model.modules()}),
            "has_graph": loss_sum.requires_grad,
            "dtype": str(logits.dtype),
            "random_state": random_state,
        }
        with Path(os.environ["NOTES"], f"{dist.get_rank()}.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        return loss_sum


class WithoutCuda(CrossEntropy):
    """Fails where this process has opened a context on a CUDA device."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        assert not torch.cuda.is_initialized(), "a context on the device, for a run on the CPU"
        return super().__call__(model, batch)
