"""Folders of prepared data that are built once and then shared: by the ranks of a node, and by later runs.

They stand under ``AUTOMODEL_CACHE`` (default: ``automodel`` in the user's cache folder), named after a hash of all that
decides what is in them. Nothing there is ever changed; any of it may be deleted while no run reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from automodel.types import UserError


def cache_root() -> Path:
    """Return the folder that holds all prepared data."""
    chosen = os.environ.get("AUTOMODEL_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "automodel"


def hash_of(facts: Mapping[str, Any]) -> str:
    """Return a name for ``facts``, the same in every process."""
    return hashlib.sha256(canonical(facts)).hexdigest()[:32]


def canonical(value: Any) -> bytes:
    """Return ``value`` as JSON that is the same for equal values; what JSON cannot hold, such as a date, as text."""
    return json.dumps(value, sort_keys=True, default=str).encode()


def build_once(facts: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """Return the folder of what ``facts`` decide, made by ``build(folder)`` if it is not there yet.

    Two processes that want it at once wait for each other, and one builds. A folder counts once it is whole: one
    whose builder was killed is never seen, and the next builder sweeps it away.

    Raises:
        UserError: the cache cannot be written.
    """
    from filelock import FileLock

    root, name = cache_root(), hash_of(facts)
    done, partial = root / name, root / f"{name}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            if not done.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    build(partial)
                    (partial / "facts.json").write_text(json.dumps(facts, indent=1, default=str))
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
                partial.rename(done)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"prepared data cannot be written to {root} ({reason}); make room there, or choose another folder with "
            "AUTOMODEL_CACHE"
        ) from error
    return done
