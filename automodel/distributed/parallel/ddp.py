"""Strategy ``ddp``: the whole model on every rank, gradients averaged by torch's DistributedDataParallel."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from automodel.distributed.parallel.activations import (
    ActivationCheckpointing,
    activation_problems,
    enable_activation_checkpointing,
)
from automodel.distributed.parallel.handle import Handle, register_handle
from automodel.distributed.parallel.precision import MixedOrPurePrecision, compute_dtype, precision_problems
from automodel.distributed.parallel.strategy import Strategy, build_mesh
from automodel.types import UserError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from automodel.config import Config
    from automodel.distributed.runtime.dist_info import DistInfo


@dataclass(frozen=True)
class DDP(Strategy):
    """What ``distributed=ddp`` configures; see ``conf/distributed/ddp.yaml``."""

    defer_grad_sync: bool = True
    mixed_precision: MixedOrPurePrecision = "auto"
    activation_checkpointing: ActivationCheckpointing = False
    activation_offload: bool = False

    name = "ddp"

    @staticmethod
    def problems(section: dict[str, Any], cfg: Config, *, key: str, world_size: int) -> Iterator[str]:
        """Yield what does not fit together; see ``config/targets.py``."""
        yield from precision_problems(section, cfg)
        yield from activation_problems(section)

    def build_mesh(self, dist_info: DistInfo) -> DeviceMesh:
        """Return the mesh of replicas; every rank must call it."""
        return build_mesh(dist_info, dp_replicate_size=dist_info.world_size)

    def parallelize(self, model: nn.Module, *, dist_info: DistInfo, mesh: DeviceMesh) -> nn.Module:
        """Move ``model`` to the device and wrap it; a single rank has nothing to average and stays plain."""
        from torch.nn.parallel import DistributedDataParallel

        model.to(dist_info.device)
        offload_from = dist_info.device if self.activation_offload else None
        enable_activation_checkpointing(model, self.activation_checkpointing, offload_from=offload_from)
        if dist_info.world_size == 1:
            return model
        device_ids = [dist_info.device.index] if dist_info.device.type == "cuda" else None
        # The models' buffers (rotary frequencies) never change; torch 2.13 gave the option another name.
        options = inspect.signature(DistributedDataParallel).parameters
        sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        return DistributedDataParallel(
            model, device_ids=device_ids, gradient_as_bucket_view=True, **{sync_buffers: False}
        )

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Return the context of a forward: mixed precision with the weights kept as they are."""
        import torch

        dtype = compute_dtype(self.mixed_precision, device)
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@register_handle("torch.nn.parallel.DistributedDataParallel")
class DDPHandle(Handle):
    """The handle of DDP, which averages over its group in the last backward of a step."""

    def sync_context(self, is_optim_step: bool, *, defer: bool) -> AbstractContextManager[None]:
        """Reduce on the last micro-batch only; ``defer`` makes no difference.

        Raises:
            UserError: on leaving the last micro-batch, where trained parameters got no gradient.
        """
        return self._reduced() if is_optim_step else self.wrapper.no_sync()

    @contextmanager
    def _reduced(self) -> Iterator[None]:
        yield
        named = self.wrapper.module.named_parameters()
        unused = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
        if unused:
            # DDP waits for every one of them: the gradients of this step were not reduced, and torch says nothing yet.
            raise UserError(
                f"{len(unused)} trained parameters take no part in the loss, such as {unused[0]}: "
                "distributed=ddp reduces nothing without them; freeze them, or use distributed=fsdp2"
            )

    def groups(self) -> list[dist.ProcessGroup]:
        """Return the group of the replicas."""
        return [self.wrapper.process_group]

    def needs_warm_up(self, dp_size: int) -> bool:
        """Return whether there are three or more ranks.

        DDP reorders its buckets after its first backward, and the place of a gradient in its bucket decides the order
        in which three or more ranks are summed.
        """
        return dp_size >= 3
