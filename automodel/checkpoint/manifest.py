"""List the files of a checkpoint with sizes and checksums, so that damage is detected.

Each rank checksums the files that it wrote and later verifies a share of all files: one rank alone would take hours
for the terabytes of a large model.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from automodel.distributed.runtime.agreement import on_every_rank, run_on_all_ranks, run_on_main

MANIFEST = "manifest.json"
_BLOCK = 1 << 22

Entries = dict[str, dict[str, int]]


def seal(folder: Path, *, group: dist.ProcessGroup | None = None) -> None:
    """Flush every file in ``folder`` to disk and list it in the manifest; every rank must call it.

    Args:
        group: a process group of all ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    names = run_on_main(lambda: _files(folder), group=group)

    def sum_up() -> Entries:
        own = [name for name in names if _owner(name, world_size) == rank]
        for name in own:
            sync(folder / name)
        return {name: _size_and_checksum(folder / name) for name in own}

    gathered = on_every_rank(run_on_all_ranks(sum_up, group=group), group=group)

    def write() -> None:
        entries = {name: entry for each in gathered for name, entry in each.items()}
        (folder / MANIFEST).write_text(json.dumps(dict(sorted(entries.items())), indent=2))
        sync(folder / MANIFEST)
        sync(folder)

    run_on_main(write, group=group)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None if every file matches the manifest."""
    entries, problem = _outline(folder)
    return problem or _first_damaged(folder, entries, entries)


def damage_seen_by_all(folder: Path) -> str | None:
    """Return what ``damage`` returns, on every rank; every rank must call it and reads a share of the files."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    entries, problem = run_on_main(lambda: _outline(folder))
    if problem is not None:
        return problem
    found = on_every_rank(_first_damaged(folder, entries, sorted(entries)[rank::world_size]))
    return next((each for each in found if each is not None), None)


def sync(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _owner(name: str, world_size: int) -> int:
    """Return the rank that wrote a file: torch's writer puts the rank into the name; rank 0 wrote all others."""
    rank = name.removeprefix("__").partition("_")[0]
    return int(rank) if name.startswith("__") and rank.isdecimal() and int(rank) < world_size else 0


def _outline(folder: Path) -> tuple[Entries, str | None]:
    """Return the manifest, and the first problem that shows without reading the files, such as a wrong size."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return {}, f"no {MANIFEST}: the save was not finished, or automodel did not write this folder"
    except (OSError, ValueError):
        return {}, f"{MANIFEST} is damaged"
    for name, expected in entries.items():
        path = folder / name
        if not path.is_file():
            return {}, f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return {}, f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
    return entries, None


def _first_damaged(folder: Path, entries: Entries, names: Iterable[str]) -> str | None:
    for name in names:
        try:
            if _size_and_checksum(folder / name) != entries[name]:
                return f"{name} is damaged: its checksum differs"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def _size_and_checksum(path: Path) -> dict[str, int]:
    checksum, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"size": size, "crc32": checksum}
