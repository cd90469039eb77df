"""Copies of a training state in host memory, so that it can be written while training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch.distributed.tensor import DTensor

_SHARD_DESCRIPTIONS = ("__create_chunk_list__", "__create_write_items__")
"""What a handle's ``describe_shards`` notes on the local part of a tensor, for torch's distributed checkpoint."""


class HostCopy:
    """Copies nested states into host memory, which it keeps for the next copy (pinned, for tensors of a device).

    A copy holds until the next one is made.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}

    def make(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return ``state`` with every tensor in host memory of its own, and wait until all of it is there."""
        copied = self._copied((), state)
        if any(local_part(tensor).device.type == "cuda" for tensor in tensors_of(state)):
            torch.cuda.current_stream().synchronize()
        return copied

    def _copied(self, place: tuple[Any, ...], value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._copied((*place, key), each) for key, each in value.items()}
        if isinstance(value, DTensor):
            # Not from_local, which would move the part back to the mesh's device.
            return DTensor(self._copied_tensor(place, local_part(value)), value._spec, requires_grad=False)
        if isinstance(value, torch.Tensor):
            return self._copied_tensor(place, value)
        return deepcopy(value)

    @torch.no_grad()
    def _copied_tensor(self, place: tuple[Any, ...], tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            is_pinned = tensor.device.type == "cuda" and tensor.numel() > 0
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=is_pinned, requires_grad=False)
            self._buffers[place] = buffer
        buffer.copy_(tensor, non_blocking=tensor.device.type == "cuda")  # others would not be waited for
        for name in _SHARD_DESCRIPTIONS:
            if hasattr(tensor, name):
                setattr(buffer, name, getattr(tensor, name))
        return buffer


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, with what is noted on it."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def tensors_of(state: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor of a nested state."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors_of(value)


def num_bytes(state: Any) -> int:
    """Return how many bytes the tensors of ``state`` take, sharded ones as a whole."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(state))


def share_of(state: dict[str, Any], *, rank: int, world_size: int) -> dict[str, Any]:
    """Return ``state`` with the tensors alone that ``rank`` is to write, of those that every rank holds alike.

    A state with sharded tensors is returned as it is: its ranks need not hold the same names. Every tensor goes to
    the rank that has the least to write so far.
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
