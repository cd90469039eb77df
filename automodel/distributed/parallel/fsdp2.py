"""Strategy ``fsdp2``: parameters, gradients and optimizer state sharded by torch's ``fully_shard``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from automodel.distributed.parallel.activations import (
    ActivationCheckpointing,
    activation_problems,
    enable_activation_checkpointing,
)
from automodel.distributed.parallel.handle import Handle, register_handle, without_compile
from automodel.distributed.parallel.layers import decoder_layers
from automodel.distributed.parallel.precision import MixedOrPurePrecision, compute_dtype, precision_problems
from automodel.distributed.parallel.strategy import (
    REPLICATE_AXIS,
    SHARD_AXIS,
    TP_AXIS,
    Strategy,
    build_mesh,
    mesh_problems,
)

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from automodel.config import Config
    from automodel.distributed.runtime.dist_info import DistInfo


@dataclass(frozen=True)
class FSDP2(Strategy):
    """What ``distributed=fsdp2`` configures; see ``conf/distributed/fsdp2.yaml``."""

    defer_grad_sync: bool = True
    mixed_precision: MixedOrPurePrecision = "auto"
    dp_replicate_size: PositiveInt = 1
    tp_size: PositiveInt = 1
    sequence_parallel: bool = False
    reshard_after_forward: bool = True
    num_prefetched_layers: PositiveInt = 1
    cpu_offload: bool = False
    activation_checkpointing: ActivationCheckpointing = False
    activation_offload: bool = False

    name = "fsdp2"
    is_sharded = True

    @staticmethod
    def problems(section: dict[str, Any], cfg: Config, *, key: str, world_size: int) -> Iterator[str]:
        """Yield what does not fit together; see ``config/targets.py``."""
        yield from mesh_problems(section, world_size=world_size)
        yield from precision_problems(section, cfg)
        yield from activation_problems(section)
        if section.get("sequence_parallel") and section.get("tp_size") == 1:
            yield "distributed.sequence_parallel=true splits what tensor parallel leaves whole: set distributed.tp_size"

    @property
    def length_multiple(self) -> int:
        """What the length of a batch should be a multiple of."""
        return self.tp_size if self.sequence_parallel else 1

    def build_mesh(self, dist_info: DistInfo) -> DeviceMesh:
        """Return the mesh (replicas, shards, tensor parallel); every rank must call it."""
        return build_mesh(dist_info, dp_replicate_size=self.dp_replicate_size, tp_size=self.tp_size)

    def parallelize(self, model: nn.Module, *, dist_info: DistInfo, mesh: DeviceMesh) -> nn.Module:
        """Shard ``model`` in place, a unit for each decoder layer and one for the rest; every rank must call it."""
        import torch
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        from automodel.distributed.parallel.tensor_parallel import apply_tensor_parallel

        if self.tp_size > 1:
            apply_tensor_parallel(model, mesh[TP_AXIS], sequence_parallel=self.sequence_parallel)
        offload_from = dist_info.device if self.activation_offload else None
        enable_activation_checkpointing(model, self.activation_checkpointing, offload_from=offload_from)
        dtype = compute_dtype(self.mixed_precision, dist_info.device)
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        has_accelerator = dist_info.device.type != "cpu"
        options = {
            "mesh": mesh[REPLICATE_AXIS, SHARD_AXIS] if self.dp_replicate_size > 1 else mesh[SHARD_AXIS],
            "mp_policy": precision,
            "offload_policy": CPUOffloadPolicy(pin_memory=has_accelerator) if self.cpu_offload else OffloadPolicy(),
        }
        layers = decoder_layers(model)
        for layer in layers:
            fully_shard(layer, reshard_after_forward=self.reshard_after_forward, **options)
        model = fully_shard(model, **options)
        if hasattr(model, "generate"):  # which may enter the model below its own forward, as PEFT's does
            register_fsdp_forward_method(model, "generate")
        self._prefetch(layers)
        return model

    def device_of_shards(self, dist_info: DistInfo) -> torch.device | None:
        """Return where the shards of a model belong that came to ``parallelize`` on the meta device."""
        import torch

        on_host = self.cpu_offload or dist_info.device.type == "mps"
        return torch.device("cpu") if on_host else dist_info.device

    def _prefetch(self, layers: list[nn.Module]) -> None:
        """Gather the weights of further layers while one computes; torch alone looks one layer ahead."""
        if self.num_prefetched_layers == 1:
            return
        for index, layer in enumerate(layers):
            layer.set_modules_to_forward_prefetch(layers[index + 1 : index + 1 + self.num_prefetched_layers])
            earlier = layers[max(0, index - self.num_prefetched_layers) : index]
            layer.set_modules_to_backward_prefetch(earlier[::-1])


@register_handle("torch.distributed.fsdp.FSDPModule")
class FSDP2Handle(Handle):
    """The handle of FSDP2 and HSDP, which shard a model in place and average over the axes of their mesh."""

    generates_in_lockstep = True

    @property
    def plain_model(self) -> Any:
        """The model itself: it is sharded in place."""
        return without_compile(self.model)

    @property
    def plain_class(self) -> type:
        """The model's class in transformers, which ``fully_shard`` replaces by a subclass of its own."""
        from torch.distributed.fsdp import FSDPModule

        return next(kind for kind in type(self.plain_model).__mro__ if not issubclass(kind, FSDPModule))

    @contextmanager
    def sync_context(self, is_optim_step: bool, *, defer: bool) -> Iterator[None]:
        """Reduce-scatter on the last micro-batch, or on each one without ``defer``; all-reduce on the last alone."""
        self._set_sync(reduce_scatter=is_optim_step or not defer, all_reduce=is_optim_step, last=is_optim_step)
        try:
            yield
        finally:
            # The setters are sticky: leave the module as torch makes it.
            self._set_sync(reduce_scatter=True, all_reduce=True, last=True)

    def _set_sync(self, *, reduce_scatter: bool, all_reduce: bool, last: bool) -> None:
        for unit in self._units():
            unit.set_requires_gradient_sync(reduce_scatter, recurse=False)
            unit.set_requires_all_reduce(all_reduce, recurse=False)
            unit.set_is_last_backward(last)

    def groups(self) -> list[dist.ProcessGroup]:
        """Return the groups of shards and of replicas."""
        mesh = self.wrapper._get_fsdp_state()._fsdp_param_group.mesh_info.mesh
        return [mesh.get_group(axis) for axis in range(mesh.ndim)]

    def reshard(self) -> None:
        """Free the outermost parameters, which stay gathered after a forward without a backward."""
        for unit in self._units():
            unit.reshard()

    def _units(self) -> list[Any]:
        from torch.distributed.fsdp import FSDPModule

        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]
