"""Ten steps of a real model on real rows in any layout, and the same by a plain loop to compare with."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from automodel.data.batches.collate import CausalLMCollator
from automodel.data.batches.loader import TrainLoader
from automodel.losses.cross_entropy import CrossEntropy
from automodel.losses.objective import as_objective
from automodel.models.adapters import LoRA
from automodel.optim.optimizers import adamw, parameter_groups, sgd
from automodel.tasks.causal_lm import CausalLM
from automodel.train.step import StepConfig, train_step
from tests.conftest import SHARED_DATA
from tests.dist.tiny import clean_name, full, parallel_model

GLOBAL_BATCH, NUM_STEPS, SHORT_ROWS = 16, 10, 5
Result = tuple[list[float], list[float], dict[str, torch.Tensor]]
"""Loss and gradient norm of every step, and the trained weights after the last."""


@dataclass(frozen=True)
class Task:
    """What is computed, whatever the layout.

    Attributes:
        is_short: the last step has only a few rows, so that ranks run out of them.
        is_masked: half the rows of every step supervise nothing, whole micro-batches among them.
    """

    is_short: bool = False
    is_masked: bool = False
    is_clipped: bool = True
    is_lora: bool = False
    optimizer: str = "sgd"


def rows_of(task: Task) -> list[dict[str, list[int]]]:
    """Return real rows of 12 to 36 tokens, of uneven numbers of supervised ones."""
    rows = [dict(row) for row in _tokenized()[: _num_rows(task)]]
    if task.is_masked:
        for batch in _loader(rows, dp_rank=0, dp_size=1, local=GLOBAL_BATCH).global_batches(0):
            for index in batch[: len(batch) // 2]:
                rows[index] = rows[index] | {"labels": [-100] * len(rows[index]["labels"])}
    return rows


def run_layout(strategy: str, accumulation: int, defer: bool, task: Task) -> Result:
    """Train under a strategy as this rank of the group; every rank must call it."""
    model, layout, dp = parallel_model(strategy, model=_model(task))
    optimizer = _optimizer(task)(parameter_groups(model))
    layout.prepare_optimizer(optimizer, model)
    local = max(1, GLOBAL_BATCH // (dp.size * accumulation))
    loader = _loader(rows_of(task), dp_rank=dp.rank, dp_size=dp.size, local=local, multiple=layout.length_multiple)
    config = StepConfig(torch.device("cpu"), dp.group, defer, 1.0 if task.is_clipped else None, nullcontext)
    losses, norms = [], []
    for micro_batches in loader.steps_of(0):
        result = train_step(
            model, micro_batches, objective=as_objective(CrossEntropy()), optimizer=optimizer, config=config
        )
        losses.append((result.loss_sum / max(1, result.num_label_tokens)).item())
        norms.append(result.grad_norm.item())
    weights = {clean_name(n): full(p).detach() for n, p in model.named_parameters() if p.requires_grad}
    return losses, norms, weights


def run_plain(task: Task) -> Result:
    """Train by a loop that knows nothing of ours: whole batches, one process, torch's own clipping."""
    torch.set_num_threads(1)
    model, rows = _model(task), rows_of(task)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decays = [p for p in trained.values() if p.ndim > 1]
    others = [{"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = (
        torch.optim.SGD([{"params": decays}, *others[: len(trained) > len(decays)]], lr=LR["sgd"])
        if task.optimizer == "sgd"
        else torch.optim.AdamW([{"params": decays}, *others[: len(trained) > len(decays)]], lr=LR["adamw"])
    )
    losses, norms = [], []
    for batch in _loader(rows, dp_rank=0, dp_size=1, local=GLOBAL_BATCH).global_batches(0):
        num_tokens = sum(label != -100 for index in batch for label in rows[index]["labels"])
        loss_sum = 0.0
        for index in batch:
            logits = model(input_ids=torch.tensor([rows[index]["input_ids"]])).logits[0]
            loss = F.cross_entropy(logits, torch.tensor(rows[index]["labels"]), reduction="sum") / max(1, num_tokens)
            loss.backward()
            loss_sum += loss.item()
        norm = nn.utils.clip_grad_norm_(trained.values(), 1.0 if task.is_clipped else float("inf"))
        losses.append(loss_sum)
        norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, {name: p.detach() for name, p in trained.items()}


def worst_difference(got: Result, expected: Result) -> tuple[float, float, float]:
    """Return the largest relative differences of loss, gradient norm, and any weight (by its 2-norm)."""
    losses, norms = (max(abs(a - b) / abs(b) for a, b in zip(got[i], expected[i], strict=True)) for i in (0, 1))
    assert got[2].keys() == expected[2].keys()
    weights = max(((got[2][n] - w).norm() / w.norm()).item() for n, w in expected[2].items())
    return losses, norms, weights


LR = {"sgd": 0.02, "adamw": 1e-4}


def _optimizer(task: Task) -> Any:
    build = sgd if task.optimizer == "sgd" else adamw
    return lambda groups: build(groups, lr=LR[task.optimizer])


def _model(task: Task) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(SHARED_DATA / "models" / "stories260k", dtype=torch.float32)
    if not task.is_lora:
        return model
    model = LoRA(rank=4, alpha=8).apply(model, task=CausalLM())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide what happens to lora_A
            nn.init.normal_(parameter, std=0.02)
    return model


def _loader(rows: list, *, dp_rank: int, dp_size: int, local: int, multiple: int = 1) -> TrainLoader:
    return TrainLoader(
        rows,
        collate=CausalLMCollator(0, multiple),
        global_batch_size=GLOBAL_BATCH,
        local_batch_size=local,
        dp_rank=dp_rank,
        dp_size=dp_size,
        seed=3,
    )


def _num_rows(task: Task) -> int:
    return NUM_STEPS * GLOBAL_BATCH - (GLOBAL_BATCH - SHORT_ROWS if task.is_short else 0)


@cache
def _tokenized() -> list[dict[str, list[int]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED_DATA / "models" / "stories260k", model_max_length=10**6)
    rows = []
    with Path(SHARED_DATA / "sft" / "gsm8k_train.jsonl").open() as file:
        for number, line in zip(range(NUM_STEPS * GLOBAL_BATCH), file, strict=False):
            row = json.loads(line)
            prompt = tokenizer(row["question"])["input_ids"][: 6 + number % 7]
            answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"][: 6 + (number * 5) % 19]
            ids = prompt + answer
            labels = [-100] * (len(prompt) - 1) + answer + [-100]
            rows.append({"input_ids": ids, "labels": labels})
    return rows
