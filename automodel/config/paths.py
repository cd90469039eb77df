"""Distinguish a local path from a hub id, without asking the hub."""

from __future__ import annotations

import glob
import re
from pathlib import Path

ROW_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt")
"""The files that hold rows; each may be gzipped and end in ``.gz`` as well."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def path_exists(text: str) -> bool:
    """Return whether there is something at a path; text that can be no path is none."""
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def looks_like_path(name: str) -> bool:
    """A hub id is ``name`` or ``owner/name``; a name that begins in an existing folder is a path."""
    return name[:1] in "./~" or name.count("/") > 1 or Path(name.split("/")[0]).is_dir()


def looks_like_hub_id(name: str) -> bool:
    """Return whether a name is ``owner/name`` and no path."""
    return _HUB_ID.fullmatch(name) is not None and not looks_like_path(name)


def looks_like_rows(name: str) -> bool:
    """Return whether a name is that of local rows: something there, a glob that finds something, or a known suffix."""
    return (
        path_exists(name)
        or looks_like_path(name)
        or name.lower().removesuffix(".gz").endswith(ROW_SUFFIXES)
        or bool(glob.glob(str(Path(name).expanduser())))
    )
