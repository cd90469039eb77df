"""Muon for the matrices of the layers and AdamW for everything else, in one optimizer, also on sharded weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
_EPS = 1e-7


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on the groups marked ``is_hidden``, AdamW on the others.

    The update of a matrix is its momentum made orthogonal, scaled by 0.2 sqrt(max(rows, columns)), which gives it the
    size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so one rate and one decay suit both. A sharded matrix is
    gathered for it, one at a time, and every rank makes the whole orthogonal, in float32: torch's Muon computes in
    bf16, where the rounding of a gradient's last bit changes the update by percents.

    Args:
        fused: use AdamW's fused kernel; a step then reads ``found_inf`` on the device, as the fused optimizers do.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        fused: bool,
        is_hidden: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                    "fused": fused, "is_hidden": is_hidden}  # fmt: skip
        super().__init__(params, defaults)
        others = self._groups(is_hidden=False)
        self._adamw = torch.optim.AdamW(others, fused=fused) if others else None  # adds its options to these groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Update every parameter that has a gradient; every rank that holds a shard must call it."""
        found_inf = getattr(self, "found_inf", None)
        for group in self._groups(is_hidden=True):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, is_bad=found_inf)
        if self._adamw is not None:
            # Loading a checkpoint gives this object new groups and a new state.
            self._adamw.param_groups, self._adamw.state = self._groups(is_hidden=False), self.state
            self._adamw.grad_scale, self._adamw.found_inf = None, found_inf
            self._adamw.step()

    def _groups(self, *, is_hidden: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["is_hidden"] is is_hidden]

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], *, is_bad: torch.Tensor | None) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average, lr, momentum = state["momentum_buffer"], group["lr"], group["momentum"]
        new_average = average.lerp(gradient, 1 - momentum)
        update = _on_whole(orthogonal, gradient.lerp(new_average, momentum))
        scale = lr * 0.2 * max(parameter.shape) ** 0.5
        new = (parameter * (1 - lr * group["weight_decay"])).sub_(update, alpha=scale)
        for tensor, value in ((average, new_average), (parameter, new)):
            local, new_local = _local(tensor), _local(value)
            local.copy_(new_local if is_bad is None else torch.where(is_bad > 0, local, new_local))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return a float32 matrix with the singular vectors of ``matrix`` and singular values between about 0.7 and 1.2.

    It is the Newton-Schulz iteration of Jordan et al. (2024), with their coefficients and five iterations.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.float().T if is_tall else matrix.float()
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def _on_whole(function: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """Return ``function`` of the whole of a tensor, sharded as the tensor is."""
    if not isinstance(tensor, DTensor):
        return function(tensor)
    replicas = [Replicate()] * tensor.device_mesh.ndim
    whole = DTensor.from_local(function(tensor.full_tensor()), tensor.device_mesh, replicas, run_check=False)
    return whole.redistribute(placements=tensor.placements)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
