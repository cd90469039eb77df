"""Copy a training state to host memory, so that it can be written while training continues."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch.distributed.tensor import DTensor

_SHARD_DESCRIPTIONS = ("__create_chunk_list__", "__create_write_items__")
"""Attributes that a handle's ``describe_shards`` sets on a tensor's local part for torch's distributed checkpoint."""


class HostCopy:
    """Copies nested states into host buffers that it reuses for the next copy (pinned for tensors on a GPU).

    A copy is valid until the next one is made.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}

    def make(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of ``state`` with every tensor in host memory, once all copies have finished."""
        copied = self._copied((), state)
        if any(local_part(tensor).device.type == "cuda" for tensor in tensors_of(state)):
            torch.cuda.current_stream().synchronize()
        return copied

    def _copied(self, path: tuple[Any, ...], value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._copied((*path, key), each) for key, each in value.items()}
        if isinstance(value, DTensor):
            # from_local would move the part back to the mesh's device.
            return DTensor(self._copied_tensor(path, local_part(value)), value._spec, requires_grad=False)
        if isinstance(value, torch.Tensor):
            return self._copied_tensor(path, value)
        return deepcopy(value)

    @torch.no_grad()
    def _copied_tensor(self, path: tuple[Any, ...], tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            is_pinned = tensor.device.type == "cuda" and tensor.numel() > 0
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=is_pinned, requires_grad=False)
            self._buffers[path] = buffer
        buffer.copy_(tensor, non_blocking=tensor.device.type == "cuda")  # make waits for CUDA alone
        for name in _SHARD_DESCRIPTIONS:
            if hasattr(tensor, name):
                setattr(buffer, name, getattr(tensor, name))
        return buffer


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, with the attributes set on it."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def tensors_of(state: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor of a nested state."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors_of(value)


def num_bytes(state: Any) -> int:
    """Return the size in bytes of all tensors in ``state``; sharded tensors count whole."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(state))


def share_of(state: dict[str, Any], *, rank: int, world_size: int) -> dict[str, Any]:
    """Return ``state`` with only the tensors that ``rank`` must write, if every rank holds all of them.

    A state with sharded tensors is returned unchanged: its ranks need not hold the same names. Each tensor is
    assigned to the rank with the fewest bytes so far.
    """
    if any(isinstance(tensor, DTensor) for tensor in tensors_of(state)):
        return state
    loads = [0] * world_size

    def shared(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {}
        for key, each in value.items():
            if isinstance(each, torch.Tensor):
                owner = loads.index(min(loads))
                loads[owner] += each.numel() * each.element_size()
                if owner != rank:
                    continue
            kept[key] = shared(each)
        return kept

    return shared(state)
