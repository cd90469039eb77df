"""A tiny Llama and rows of uneven length, the same in every process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from automodel.distributed.ddp import DDP
from automodel.distributed.dist_info import DistInfo
from automodel.distributed.fsdp2 import FSDP2

VOCAB = 48


def tiny_llama(*, tied: bool = True) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def uneven_rows(num_rows: int, *, masked: tuple[int, ...] = ()) -> list[dict[str, list[int]]]:
    """Rows of 3 to 13 tokens whose first third is not supervised; those in ``masked`` supervise nothing."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(num_rows):
        length = 3 + (number * 7) % 11
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        labels = [-100 if i < length // 3 or number in masked else ids[i + 1] for i in range(length - 1)] + [-100]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def cpu_info() -> DistInfo:
    return DistInfo("gloo", dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.get_rank() == 0)


def strategy_named(name: str) -> DDP | FSDP2:
    return {"ddp": DDP(), "fsdp2": FSDP2(), "hsdp": FSDP2(dp_replicate_size=2)}[name]


def parallel_model(name: str, *, tied: bool = True) -> tuple[Any, Any]:
    strategy, info = strategy_named(name), cpu_info()
    mesh = strategy.build_mesh(info)
    return strategy.parallelize(tiny_llama(tied=tied), dist_info=info, mesh=mesh), strategy


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def clean_name(name: str) -> str:
    return name.removeprefix("module.")
