"""Models whose loading goes wrong on one rank alone, and one whose attention is as particular as a device's.

They are named as a user would name a model of their own.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from automodel.models.demo import DemoModel
from automodel.models.hf import HFModel


def _raise() -> None:
    raise ValueError("this rank went wrong on purpose")


def _on_last_rank(action: Callable[[], Any]) -> type[DemoModel]:
    class Faulty(DemoModel):
        def build(self, *args: Any, **options: Any) -> Any:
            if dist.get_rank() == dist.get_world_size() - 1:
                action()
            return super().build(*args, **options)

    return Faulty


Raises = _on_last_rank(_raise)
Exits = _on_last_rank(lambda: os._exit(0))
Killed = _on_last_rank(lambda: os.kill(os.getpid(), signal.SIGKILL))
Sleeps = _on_last_rank(lambda: time.sleep(600))
Stopped = _on_last_rank(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def _half_precision_only(module: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
    """Compute in half precision alone, as flash attention does, to which transformers casts under autocast."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (each.to(torch.get_autocast_dtype("cpu")) for each in (query, key, value))
    if query.dtype == torch.float32:
        raise RuntimeError("this attention only supports fp16 and bf16")
    return sdpa_attention_forward(module, query, key, value, *args, **options)


class HalfPrecisionAttention(HFModel):
    """A pretrained model; ``model.attn_implementation=half_precision_only`` exists for it."""

    def build(self, *args: Any, **options: Any) -> Any:
        AttentionInterface.register("half_precision_only", _half_precision_only)
        AttentionMaskInterface.register("half_precision_only", sdpa_mask)
        return super().build(*args, **options)
