"""torch's flight recorder: the last collectives of this rank, kept in memory, and written to a file after a stall."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PREFIX = "rank_"
_NUM_ENTRIES = 2000


def record_collectives() -> None:
    """Have torch note the newest collectives of every process group that is made from now on.

    TORCH_FR_BUFFER_SIZE, where it is set, says how many; 0 turns it off.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(_NUM_ENTRIES))


def write_record(folder: Path) -> None:
    """Write ``rank_N`` into ``folder``, for torch's ``torchfrtrace``, where there is a record of anything."""
    try:
        record = _record()
        if pickle.loads(record).get("entries"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{PREFIX}{dist.get_rank()}").write_bytes(record)
    except Exception:  # whatever it is, the stall is what must be told
        return


def last_collective() -> str:
    """Return the newest collective in words, or nothing where none is known."""
    try:
        entries = pickle.loads(_record())["entries"]
    except Exception:  # no recorder, or one that writes otherwise
        return ""
    return _in_words(entries[-1]) if entries else ""


def _in_words(entry: dict[str, Any]) -> str:
    name, sizes = entry["profiling_name"], entry["input_sizes"]
    return f"{name} no. {entry['collective_seq_id']} of group {entry['process_group'][0]}, sizes {sizes}"


def _record() -> bytes:
    """Return what the recorder of the backend holds; NCCL has one of its own."""
    c10d = torch._C._distributed_c10d
    if "nccl" in dist.get_backend() and hasattr(c10d, "_dump_nccl_trace"):
        return c10d._dump_nccl_trace()
    return c10d._dump_fr_trace()
