"""torch's flight recorder: the last collectives of this rank, kept in memory, and written to a file after a stall."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
import torch.distributed as dist

PREFIX = "rank_"
_NUM_ENTRIES = 2000  # as torch's tutorial recommends


def record_collectives() -> None:
    """Have torch record the newest collectives of every process group created from now on.

    TORCH_FR_BUFFER_SIZE, if it is set, says how many; 0 turns it off.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(_NUM_ENTRIES))


def write_record(folder: Path) -> None:
    """Write ``rank_N`` into ``folder``, for torch's ``torchfrtrace``, unless the record is empty."""
    try:
        record = _record()
        if pickle.loads(record).get("entries"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{PREFIX}{dist.get_rank()}").write_bytes(record)
    except Exception:  # no failure here may hide the stall
        return


def last_collective() -> str:
    """Describe the newest collective; empty where none is known."""
    try:
        entry = pickle.loads(_record())["entries"][-1]
        number, group = entry["collective_seq_id"], entry["process_group"][0]
        return f"{entry['profiling_name']} no. {number} of group {group}, sizes {entry['input_sizes']}"
    except Exception:  # no recorder, an empty one, or another format
        return ""


def _record() -> bytes:
    """Return the contents of the backend's recorder; NCCL has its own."""
    c10d = torch._C._distributed_c10d
    if "nccl" in dist.get_backend() and hasattr(c10d, "_dump_nccl_trace"):
        return c10d._dump_nccl_trace()
    return c10d._dump_fr_trace()
