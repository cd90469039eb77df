"""Read the pickles in a checkpoint without running code: a checkpoint may come from anyone."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_METADATA_CLASSES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
}  # fmt: skip
"""Everything that torch's writer pickles into ``.metadata``, except dtypes and paths."""
_PATHS = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}


class PlainReader(FileSystemReader):
    """Reads a checkpoint folder whose metadata holds only the classes that torch's writer uses.

    Raises:
        pickle.UnpicklingError: from ``read_metadata``, if it holds anything else.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata of the folder."""
        with open(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError("it is not the metadata of a checkpoint")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"it names {info.relative_path}, a file outside of the checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class PlainPlanner(DefaultLoadPlanner):
    """Loads non-tensor entries only if they are plain data: numbers, text and containers of them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load an entry into the state dict."""
        loaded, name = torch.load(value, weights_only=True), read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


def hidden_code(folder: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """Return which part of a checkpoint could be read only by running code, or None; nothing is run.

    Args:
        share: (index, count): check every ``count``-th entry from ``index`` on; the metadata is always checked.
    """
    index, count = share
    try:
        metadata = PlainReader(folder).read_metadata()
        names = [name for name, kind in metadata.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)]
        places = {name: metadata.storage_data[MetadataIndex(name)] for name in sorted(names)[index::count]}
    except Exception as error:  # a pickle that is not what torch writes can fail in any way
        return f"its .metadata is not that of a checkpoint, and is not loaded: {_short(error)}"
    for name, place in places.items():
        try:
            with (folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        except Exception as error:
            return f"its entry {name} is not plain data, and is not loaded: {_short(error)}"
    return None


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """Return ``state`` with numpy scalars converted to Python numbers, which ``hidden_code`` accepts.

    Raises:
        TypeError: a value is neither a tensor nor plain data, so a checkpoint with it could not be loaded.
    """
    state = _without_numpy(state)
    leaves = dict(_leaves(state, ""))
    if _loads(list(leaves.values())):
        return state
    name, value = next((name, value) for name, value in leaves.items() if not _loads(value))
    raise TypeError(
        f"{name} has type {type(value).__module__}.{type(value).__qualname__}, but a checkpoint can hold only tensors, "
        "numbers and text: leave it out of the state_dict"
    )


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return _PATHS[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _without_numpy(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(_without_numpy(each) for each in value)
    return {key: _without_numpy(each) for key, each in value.items()} if type(value) is dict else value


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, f"{name}.{key}" if name else str(key))
    elif not isinstance(value, torch.Tensor):
        yield name, value


def _loads(value: Any) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:
        return False
    return True


def _short(error: Exception) -> str:
    text = str(error)
    if text.startswith("Weights only load failed"):  # the rest is a page long, and recommends loading it anyway
        named = re.search(r"GLOBAL (\S+)", text)
        return f"it names {named[1]}" if named else "it was not written by torch.save"
    return f"{type(error).__name__}: {text}".splitlines()[0]
