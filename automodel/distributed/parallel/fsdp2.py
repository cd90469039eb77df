"""Strategy ``fsdp2``: parameters, gradients and optimizer state sharded by torch's ``fully_shard``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from automodel.distributed.parallel.layers import decoder_layers, enable_activation_checkpointing
from automodel.distributed.parallel.precision import MixedOrPurePrecision, compute_dtype
from automodel.distributed.parallel.strategy import REPLICATE_AXIS, SHARD_AXIS, TP_AXIS, build_mesh

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from automodel.distributed.runtime.dist_info import DistInfo


@dataclass(frozen=True)
class FSDP2:
    """What ``distributed=fsdp2`` configures; see ``conf/distributed/fsdp2.yaml``."""

    defer_grad_sync: bool = True
    mixed_precision: MixedOrPurePrecision = "auto"
    dp_replicate_size: int = 1
    tp_size: int = 1
    sequence_parallel: bool = False
    reshard_after_forward: bool = True
    num_prefetched_layers: int = 1
    cpu_offload: bool = False
    activation_checkpointing: bool = False

    name = "fsdp2"
    is_sharded = True

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
        if self.activation_checkpointing:
            enable_activation_checkpointing(model)
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

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Leave ``optimizer`` as it is."""

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Return the context of a forward: none, since the sharded units cast by themselves."""
        return nullcontext()
