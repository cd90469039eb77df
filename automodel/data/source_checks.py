"""Check the section of a source before anything is read: its files, its template, and the rest of the run."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel.config.paths import ROW_SUFFIXES
from automodel.data.chat.templates import BUILT_IN_TEMPLATES
from automodel.data.files.identify import is_data_file

if TYPE_CHECKING:
    from automodel.config import Config


def row_problems(section: dict[str, Any], cfg: Config, key: str) -> Iterator[str]:
    """Yield what is wrong with the keys that local files and hub data sets share."""
    choice = section.get("chat_template")
    if choice is not None and choice not in BUILT_IN_TEMPLATES and not Path(choice).expanduser().is_file():
        yield f"{key}.chat_template={choice} is neither a file nor one of: {', '.join(BUILT_IN_TEMPLATES)}"
    share, is_stream = section.get("validation_share"), section.get("streaming")
    if key == "validation_dataset" and share is not None:
        yield "validation_dataset.validation_share: dataset.validation_share sets aside rows of the training set"
    if key != "dataset":
        return
    if share is not None and cfg.validation_dataset is not None:
        yield f"dataset.validation_share={share:g} and a validation_dataset: choose one of them"
    if share is not None and is_stream:
        yield (
            f"dataset.validation_share={share:g} does not go with dataset.streaming=true, whose rows are not known "
            "ahead; use a validation_dataset"
        )
    if is_stream and cfg.step_scheduler.max_steps is None:
        yield "dataset.streaming=true needs step_scheduler.max_steps: the end of a stream is not known"
    for name in ("length_grouped", "max_tokens_per_batch"):
        if is_stream and getattr(cfg.dataloader, name):
            yield f"dataloader.{name} does not go with dataset.streaming=true, whose lengths are not known ahead"


def path_problems(key: str, paths: str | list[str] | None) -> Iterator[str]:
    """Yield what is wrong with the files, folders and globs that ``key`` names."""
    if paths == []:
        yield f"{key}=[] names no file"
    for path in [paths] if isinstance(paths, str) else paths or []:
        yield from _path_problems(key, path)


def _path_problems(key: str, path: str) -> Iterator[str]:
    file = Path(path).expanduser()
    if file.is_dir():
        if not _row_files(file):
            yield f"{key}={path}: {_what_else(file)}"
    elif file.exists():
        if not os.access(file, os.R_OK):
            yield f"{key}={path} cannot be read"
        elif file.is_file() and file.stat().st_size == 0:
            yield f"{key}={path} is empty"
    elif not glob.glob(str(file), recursive=True):
        yield f"{key}={path}: there is no such file"


def _row_files(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(file for file in folder.glob(pattern) if is_data_file(file))


def _what_else(folder: Path) -> str:
    """Say what a folder without rows is, and what to do."""
    if any(folder.glob("*.arrow")) or any(folder.glob("*/*.arrow")):
        return (
            "a folder of Dataset.save_to_disk, whose Arrow files are not read; write it as Parquet: "
            "datasets.load_from_disk(FOLDER).to_parquet(FILE) (each split separately, if it has several)"
        )
    below = _row_files(folder, "**/*")
    if below:
        folders = ", ".join(sorted({str(each.parent.relative_to(folder)) for each in below})[:5])
        return (
            f"the folder has no file of rows itself, but folders below it have ({folders}); name one of them, or all "
            f"by a glob: {folder}/**/*{below[0].suffix}"
        )
    return f"the folder has no file of rows ({', '.join(ROW_SUFFIXES)}; each may have .gz as well)"
