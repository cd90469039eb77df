"""A stand-in for torch.cuda's streams, so that the megatron-fsdp package runs over gloo on a CPU.

It checks numbers and schedules, not overlap. For the processes of tests alone, never for the library.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


class Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Stream:
    """A stream on which everything is done at once."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


def install() -> None:
    """Replace the streams of torch.cuda in this process."""
    cuda = torch.cuda
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_device = lambda: 0
    cuda.current_stream = lambda *args, **options: Stream()
    cuda.stream = lambda stream: nullcontext()
    cuda.synchronize = lambda *args, **options: None
    cuda.empty_cache = lambda: None
    torch.Tensor.cuda = lambda tensor, *args, **options: tensor
    torch.Tensor.record_stream = lambda tensor, stream: None
    import megatron_fsdp.param_and_grad_buffer as buffers

    # The package frees buffers in the order of its streams. Without them a collective must be done when the call is,
    # or gloo's threads write into memory that has been freed.
    coalesce = buffers._coalescing_manager
    if not getattr(coalesce, "is_synchronous", False):

        def synchronous(group: Any = None, device: Any = None, async_ops: bool = False) -> Any:
            return coalesce(group, device, async_ops=False)

        synchronous.is_synchronous = True
        buffers._coalescing_manager = synchronous
