"""A tiny Llama and rows of uneven length, the same in every process."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from automodel.distributed.parallel.ddp import DDP
from automodel.distributed.parallel.fsdp2 import FSDP2
from automodel.distributed.parallel.megatron_fsdp import MegatronFSDP, whole_tensor
from automodel.distributed.parallel.strategy import DataParallel, data_parallel
from automodel.distributed.runtime.dist_info import DistInfo
from tests.dist import cuda_streams

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


STRATEGIES = {
    "ddp": DDP(),
    "ddp bf16": DDP(mixed_precision="bf16"),
    "fsdp2 bf16": FSDP2(mixed_precision="bf16"),
    "hsdp bf16": FSDP2(mixed_precision="bf16", dp_replicate_size=2),
    "fsdp2": FSDP2(),
    "hsdp": FSDP2(dp_replicate_size=2),
    "zero1": MegatronFSDP(zero_stage=1),
    "zero2": MegatronFSDP(zero_stage=2),
    "zero3": MegatronFSDP(zero_stage=3),
    "zero1 x 2": MegatronFSDP(zero_stage=1, dp_replicate_size=2),
    "zero3 x 2": MegatronFSDP(zero_stage=3, dp_replicate_size=2),
    "zero3 x 2 outer": MegatronFSDP(zero_stage=3, dp_replicate_size=2, shard_optimizer_over_replicas=True),
    "tp2": FSDP2(tp_size=2),
    "tp2 sequence": FSDP2(tp_size=2, sequence_parallel=True),
    "hsdp x tp2": FSDP2(tp_size=2, dp_replicate_size=2),
}


def parallel_model(name: str, *, tied: bool = True, model: nn.Module | None = None) -> tuple[Any, Any, DataParallel]:
    """Return the tiny Llama (or ``model``) under a strategy, the strategy, and this rank's place in it."""
    strategy, info = STRATEGIES[name], cpu_info()
    if name.startswith("zero"):
        cuda_streams.install()
    mesh = _mesh(name)
    model = tiny_llama(tied=tied) if model is None else model
    return strategy.parallelize(model, dist_info=info, mesh=mesh), strategy, data_parallel(mesh)


@cache
def _mesh(name: str) -> DeviceMesh:
    """Return the mesh of a strategy, one for all tests: each group has threads that wake a hundred times a second."""
    return STRATEGIES[name].build_mesh(cpu_info())


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that may be sharded, evenly or not; every rank must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    return whole_tensor(tensor) if hasattr(tensor, "__fsdp_param__") else tensor.full_tensor()


def clean_name(name: str) -> str:
    """Return the name of a parameter without the prefix of a wrapper."""
    return name.removeprefix("module.")
