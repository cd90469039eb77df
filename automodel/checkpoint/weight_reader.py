"""Read the weights of a training checkpoint of any layout in one process, without its optimizer state."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from automodel.checkpoint.unpickling import PlainPlanner, PlainReader

_PREFIX = "model."


class WeightReader:
    """Reads the weights of a checkpoint folder one at a time, by name; no process group is needed.

    Attributes:
        shapes: the shape of every weight, by name.
        dtypes: the dtype in which each was saved, by name.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = PlainReader(folder)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        entries = {
            key.removeprefix(_PREFIX): entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if key.startswith(_PREFIX) and isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = {name: tuple(entry.size) for name, entry in entries.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in entries.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return one whole weight on the CPU, assembled from the parts that the ranks saved."""
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        planner = PlainPlanner()
        planner.set_up_planner({_PREFIX + name: tensor}, self._metadata, is_coordinator=True)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        (plan,) = planner.create_global_plan([plan])
        self._reader.read_data(planner.finish_plan(plan), planner).wait()
        return tensor


def mismatches(reader: WeightReader, shapes: dict[str, tuple[int, ...]], *, ignored: set[str]) -> list[str]:
    """Return a line for each way in which the weights of a checkpoint do not fit the model.

    Args:
        shapes: the shapes that the model needs, by name.
        ignored: names that the checkpoint may hold in addition, such as the second name of a tied weight.
    """
    missing = sorted(shapes.keys() - reader.shapes.keys())
    unexpected = sorted(reader.shapes.keys() - shapes.keys() - ignored)
    others = sorted(name for name in shapes.keys() & reader.shapes.keys() if shapes[name] != reader.shapes[name])
    found = [
        f"{len(names)} {what}: {first_few(names)}"
        for names, what in (
            (missing, "weights of the model are missing from it"),
            (unexpected, "of its weights are unknown to the model"),
        )
        if names
    ]
    return found + [f"{name} has shape {reader.shapes[name]}, in the model {shapes[name]}" for name in others[:5]]


def first_few(names: list[str]) -> str:
    """Join the first five of ``names`` for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
