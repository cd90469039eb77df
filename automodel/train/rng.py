"""Seeding, and the state of every random generator of this rank."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, *, rank: int = 0) -> None:
    """Seed python, numpy and torch on every device; each ``rank`` gets its own random numbers (dropout)."""
    mixed = (seed * 1_000_003 + rank) % 2**32
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def make_deterministic() -> None:
    """Make torch use deterministic kernels everywhere; they are slower."""
    import os

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.backends.cudnn.benchmark = False


def rng_state() -> dict[str, Any]:
    """Return the state of every generator of this rank, as JSON values."""
    version, words, next_gauss = random.getstate()
    kind, keys, *position = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(words), next_gauss],
        "numpy": [kind, keys.tolist(), *position],
        "torch": _as_text(torch.get_rng_state()),
    }
    if torch.cuda.is_initialized():  # a rank that computes on the CPU must not allocate memory on a GPU
        state["cuda"] = _as_text(torch.cuda.get_rng_state())
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what ``rng_state`` returned."""
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
    kind, keys, *position = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *position))
    torch.set_rng_state(_from_text(state["torch"]))
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(_from_text(state["cuda"]))


def _as_text(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_text(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
