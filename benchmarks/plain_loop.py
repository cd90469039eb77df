"""Train a Llama in a plain PyTorch loop: what a careful user writes without a framework.

    python -m benchmarks.plain_loop JOB.json OUT.json        (or under torchrun)

It runs the model's body, keeps the positions that are supervised, and projects and scores only those.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.cases import Job, encode, read_rows


class LossSum(torch.nn.Module):
    """The summed cross entropy of a causal language model, as a module that DDP can wrap."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the sum over the positions of ``labels`` (int64 [B, T], as ``input_ids``) that are not -100."""
        hidden = self.model.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        is_scored = targets != -100
        logits = self.model.lm_head(hidden[:, :-1][is_scored])
        return F.cross_entropy(logits, targets[is_scored], reduction="sum")


def train(job: Job) -> Iterator[dict[str, Any]]:
    """Train on the ordered rows; yield each step's number of tokens and mean loss over all ranks, and its end."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group("gloo")
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    rows = [encode(tokenizer, row) for row in read_rows(job.ordered_rows)]
    torch.manual_seed(job.torch_seed)
    model = LossSum(AutoModelForCausalLM.from_config(AutoConfig.for_model(**job.model), dtype=torch.float32))
    model.train()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr, weight_decay=0.0, fused=True)
    stride = job.local_batch_size * world_size
    for step in range(job.num_steps):
        starts = range(step * job.global_batch_size, (step + 1) * job.global_batch_size, stride)
        mine = [start + rank * job.local_batch_size for start in starts]
        batches = [collate(rows[start : start + job.local_batch_size], tokenizer.pad_token_id) for start in mine]
        counts = torch.tensor(
            [
                sum(int((b["labels"] != -100).sum()) for b in batches),
                sum(int(b["attention_mask"].sum()) for b in batches),
            ]
        )
        if world_size > 1:
            dist.all_reduce(counts)
        loss_sum = torch.zeros(())
        for index, batch in enumerate(batches):
            must_sync = world_size == 1 or index == len(batches) - 1
            with nullcontext() if must_sync else wrapped.no_sync():
                loss = wrapped(**batch)
                (loss * (world_size / counts[0])).backward()  # DDP divides by world_size
            loss_sum += loss.detach()
        if world_size > 1:
            dist.all_reduce(loss_sum)
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield {"end": time.time(), "num_tokens": int(counts[1]), "loss": float(loss_sum / counts[0])}
    if world_size > 1:
        dist.destroy_process_group()


def collate(rows: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad ``rows`` on the right to the longest; int64 [B, T]."""
    longest = max(len(row["input_ids"]) for row in rows)
    pads = [longest - len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor(
            [row["input_ids"] + [pad_token_id] * pad for row, pad in zip(rows, pads, strict=True)]
        ),
        "attention_mask": torch.tensor([[1] * (longest - pad) + [0] * pad for pad in pads]),
        "labels": torch.tensor([row["labels"] + [-100] * pad for row, pad in zip(rows, pads, strict=True)]),
    }


if __name__ == "__main__":
    steps = list(train(Job.load(sys.argv[1])))
    if int(os.environ.get("RANK", 0)) == 0:
        Path(sys.argv[2]).write_text(json.dumps(steps))
