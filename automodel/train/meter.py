"""Speed and memory of training between two logged lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from automodel.distributed.runtime.waits import wait_for_event
from automodel.train.flops import TrainingFlops, peak_flops_per_sec


class StepCounts(Protocol):
    """What a step counts over all ranks, as in ``StepResult``."""

    num_label_tokens: int
    num_tokens: int
    num_slots: int
    sum_squared_lengths: int


class Meter:
    """Counts steps, tokens and seconds in ``training()`` blocks; evaluation and saving are outside and do not count.

    On an accelerator, events in the device's stream measure the time: the host only enqueues work and finishes a step
    long before the device does.

    Args:
        flops: of the trained model.
    """

    def __init__(self, device: torch.device, *, world_size: int, flops: TrainingFlops) -> None:
        self.device = device
        self.world_size = world_size
        self.flops = flops
        self._reset()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Count the time of the block, and of the work that it enqueues."""
        start = self._now()
        try:
            yield
        finally:
            self._laps.append((start, self._now()))

    def count(self, step: StepCounts) -> None:
        """Count a step over all ranks."""
        self._num_steps += 1
        self._num_tokens += step.num_tokens
        self._num_slots += step.num_slots
        self._flops += self.flops.total(
            num_tokens=step.num_tokens,
            num_label_tokens=step.num_label_tokens,
            sum_squared_lengths=step.sum_squared_lengths,
        )

    def read(self) -> dict[str, float | None]:
        """Return the figures since the last call, and reset them.

        It waits for the end of the last step. The device is already there if a value of that step was read before, as
        for a logged line.
        """
        seconds = max(self._seconds(), 1e-9)
        tokens_per_sec = self._num_tokens / seconds
        figures = {
            "tokens_per_sec": tokens_per_sec,
            "tokens_per_sec_per_device": tokens_per_sec / self.world_size,
            "step_time_sec": seconds / max(1, self._num_steps),
            "padding_share": 1 - self._num_tokens / max(1, self._num_tokens, self._num_slots),
            "peak_mem_gib": self._peak_mem_gib(),
            "mfu": self._mfu(seconds),
        }
        self._reset()
        return figures

    def _now(self) -> Any:
        """Return the host's time, or an event that the device reaches after the work enqueued so far."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.get_device_module(self.device).Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self) -> float:
        if self.device.type == "cpu":
            return sum(end - start for start, end in self._laps)
        for _, end in self._laps[-1:]:
            wait_for_event(end)
        return sum(start.elapsed_time(end) for start, end in self._laps) / 1000

    def _mfu(self, seconds: float) -> float | None:
        """Return the model's FLOPs per second as a share of the devices' peak; None if the peak is unknown."""
        if self.device.type != "cuda":
            return None
        peak = peak_flops_per_sec(torch.cuda.get_device_name(self.device))
        return None if peak is None else self._flops / seconds / (peak * self.world_size)

    def _peak_mem_gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def _reset(self) -> None:
        self._num_steps = self._num_tokens = self._num_slots = 0
        self._flops = 0.0
        self._laps: list[tuple[Any, Any]] = []
