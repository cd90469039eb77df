"""Write weights as safetensors, shard by shard, with no more than about one shard in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = dict[str, torch.Tensor]


def write_weight_files(
    model: PreTrainedModel, described: Weights, *, read: Callable[[str], torch.Tensor], folder: Path, max_size: str
) -> None:
    """Write ``model.safetensors``, or shards of at most ``max_size`` with their index, into ``folder``.

    Names and layout are those of files on the hub: if transformers fuses or renames weights when it loads them, that
    is undone.

    Args:
        model: any model of the architecture, used only for its conversions; it may be on the meta device.
        described: the weights of the model by name, as meta tensors of the shape and type to write.
        read: returns a weight, of the shape and type described.
    """
    groups = _independent_groups(model, described)
    outlines: Weights = {}
    for names in groups:
        outlines |= _converted(model, {name: described[name] for name in names})
    split = split_torch_state_dict_into_shards(
        {name: torch.empty_like(tensor) for name, tensor in outlines.items()},  # views would count as shared
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_size,
    )
    ready: Weights = {}
    unread = iter(groups)
    for file_name, names in split.filename_to_tensors.items():
        while not ready.keys() >= set(names):
            ready |= _converted(model, {name: read(name) for name in next(unread)})
        save_file({name: _compact(ready.pop(name)) for name in names}, folder / file_name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _independent_groups(model: PreTrainedModel, described: Weights) -> list[list[str]]:
    """Return groups of weights that can be converted separately: each alone or, if that changes the result, all."""
    apart: dict[str, torch.Size] = {}
    for name, tensor in described.items():
        apart |= _shapes(_converted(model, {name: tensor}))
    is_same = apart == _shapes(_converted(model, described))
    return [[name] for name in described] if is_same else [list(described)]


def _converted(model: PreTrainedModel, weights: Weights) -> Weights:
    return revert_weight_conversion(model, dict(weights))


def _shapes(weights: Weights) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` contiguous and in its own storage."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
