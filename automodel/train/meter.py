"""Speed and memory between two logged lines, counting training alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Dense bf16 TFLOP/s from the makers' data sheets.
_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0}


class Meter:
    """Counts steps, tokens and seconds; evaluation and saving stand outside ``training()`` and do not count."""

    def __init__(self, device: torch.device, *, world_size: int, num_parameters: int) -> None:
        self.device = device
        self.world_size = world_size
        self.num_parameters = num_parameters
        self._reset()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Count the time of the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - start

    def count(self, num_tokens: int) -> None:
        """Count a step of ``num_tokens`` tokens over all ranks."""
        self._num_steps += 1
        self._num_tokens += num_tokens

    def read(self) -> dict[str, float | None]:
        """Return the figures since the last reading, and begin anew."""
        tokens_per_sec = self._num_tokens / max(self._seconds, 1e-9)
        figures = {
            "tokens_per_sec": tokens_per_sec,
            "tokens_per_sec_per_device": tokens_per_sec / self.world_size,
            "step_time_sec": self._seconds / max(1, self._num_steps),
            "peak_mem_gib": self._peak_mem_gib(),
            "mfu": self._mfu(tokens_per_sec / self.world_size),
        }
        self._reset()
        return figures

    def _mfu(self, tokens_per_sec_per_device: float) -> float | None:
        """Return the share of the peak that 6 FLOPs a parameter and token make (attention is not counted)."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        peak = next((tflops for chip, tflops in _PEAK_TFLOPS.items() if chip in name), None)
        return None if peak is None else 6 * self.num_parameters * tokens_per_sec_per_device / (peak * 1e12)

    def _peak_mem_gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def _reset(self) -> None:
        self._num_steps = self._num_tokens = 0
        self._seconds = 0.0
