"""Strategy ``megatron_fsdp``: ZeRO stages 1 to 3 and their outer sharding by NVIDIA's ``megatron-fsdp`` package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from automodel.distributed.parallel.activations import ActivationCheckpointing, enable_activation_checkpointing
from automodel.distributed.parallel.handle import Handle, register_handle
from automodel.distributed.parallel.layers import decoder_layers
from automodel.distributed.parallel.precision import MixedPrecision, compute_dtype, convert_weights_, precision_problems
from automodel.distributed.parallel.strategy import (
    REPLICATE_AXIS,
    SHARD_AXIS,
    TP_AXIS,
    Strategy,
    build_mesh,
    mesh_problems,
)
from automodel.types import UserError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    from automodel.config import Config
    from automodel.distributed.runtime.dist_info import DistInfo


@dataclass(frozen=True)
class MegatronFSDP(Strategy):
    """What ``distributed=megatron_fsdp`` configures; see ``conf/distributed/megatron_fsdp.yaml``."""

    zero_stage: Literal[1, 2, 3] = 3
    defer_grad_sync: bool = True
    mixed_precision: MixedPrecision = "auto"
    dp_replicate_size: PositiveInt = 1
    shard_optimizer_over_replicas: bool = False
    activation_checkpointing: ActivationCheckpointing = False

    name = "megatron_fsdp"
    is_sharded = True

    @staticmethod
    def problems(section: dict[str, Any], cfg: Config, *, key: str, world_size: int) -> Iterator[str]:
        """Yield what does not fit together; see ``config/targets.py``."""
        yield from mesh_problems(section, world_size=world_size)
        yield from precision_problems(section, cfg)
        if section.get("shard_optimizer_over_replicas"):
            if section.get("dp_replicate_size") == 1:
                yield "distributed.shard_optimizer_over_replicas=true needs replicas: set distributed.dp_replicate_size"
            if section.get("zero_stage") != 3:
                yield "distributed.shard_optimizer_over_replicas=true needs distributed.zero_stage=3"
        if find_spec("megatron_fsdp") is None:
            yield "distributed=megatron_fsdp needs the package megatron-fsdp: pip install 'automodel[megatron]'"

    def build_mesh(self, dist_info: DistInfo) -> DeviceMesh:
        """Return the mesh (replicas, shards); every rank must call it.

        Raises:
            UserError: there is no CUDA device, whose streams the package cannot do without.
        """
        _require_cuda_streams()
        return build_mesh(dist_info, dp_replicate_size=self.dp_replicate_size)

    def parallelize(self, model: nn.Module, *, dist_info: DistInfo, mesh: DeviceMesh) -> nn.Module:
        """Move ``model`` to the device and shard it, a unit for each decoder layer; every rank must call it.

        Gradients come out as sums over the ranks, not averages.
        """
        import torch
        from megatron_fsdp import MixedPrecisionPolicy, fully_shard_model

        enable_activation_checkpointing(model, self.activation_checkpointing)
        dtype = compute_dtype(self.mixed_precision, dist_info.device)
        if dtype is not None:
            convert_weights_(model, dtype)
        has_replicas = self.dp_replicate_size > 1
        if has_replicas:
            both = mesh[REPLICATE_AXIS, SHARD_AXIS]._flatten("dp").get_group()
        return fully_shard_model(
            model,
            device_mesh=mesh,
            dp_shard_dim=SHARD_AXIS,
            tp_dim=TP_AXIS,
            dp_outer_dim=REPLICATE_AXIS if has_replicas else None,
            hybrid_fsdp_group=both if has_replicas else None,
            fsdp_unit_modules=sorted({type(layer) for layer in decoder_layers(model)}, key=str),
            zero_dp_strategy=self.zero_stage,
            outer_dp_sharding_strategy=int(self.shard_optimizer_over_replicas),
            device=dist_info.device,
            mixed_precision_policy=MixedPrecisionPolicy(
                main_params_dtype=torch.float32, main_grads_dtype=torch.float32, grad_comm_dtype=torch.float32
            ),
            # Its default, a sync after every micro-batch, reduces an accumulated buffer a second time.
            sync_model_each_microbatch=False,
            calculate_per_token_loss=True,
        )

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, model: Any) -> None:
        """Have every step of ``optimizer`` copied into the weights that the next forward computes with.

        The package's own wrapper of optimizers would take a hidden first step.
        """
        optimizer.register_step_post_hook(lambda *_: model.install_optimized_model_weights())


@register_handle("megatron_fsdp.MegatronFSDP")
class MegatronFSDPHandle(Handle):
    """The handle of the package's wrapper, which keeps weights and gradients in buffers of its own."""

    generates_in_lockstep = True

    @contextmanager
    def sync_context(self, is_optim_step: bool, *, defer: bool) -> Iterator[None]:
        """Reduce as the ZeRO stage allows; ``defer`` makes no difference.

        Stage 1 reduces on the last micro-batch, stages 2 and 3 on each one; the outer axis waits for the last.
        """
        wrapper, before = self.wrapper, self.wrapper.model_auto_sync
        wrapper.model_auto_sync = False  # it would reduce a buffer of accumulated gradients again
        wrapper.is_last_microbatch = is_optim_step
        try:
            yield
            if is_optim_step:
                wrapper.finish_grad_sync()
                _give_empty_shards_a_gradient(wrapper)
        finally:
            wrapper.model_auto_sync = before
            wrapper.is_last_microbatch = False

    def num_ranks_averaged(self, dp_size: int) -> int:
        """Return 1 where the wrapper sums, as ``parallelize`` has it do."""
        return 1 if self.wrapper.calculate_per_token_loss else dp_size

    def groups(self) -> list[dist.ProcessGroup]:
        """Return the group of all shards and replicas."""
        return [self.wrapper.dist_index.get_dp_group()]

    def zero_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Free every gradient, and zero the wrapper's buffers."""
        optimizer.zero_grad(set_to_none=True)
        self.wrapper.zero_grad_buffer()

    def whole_weights(self, *, only_trained: bool) -> dict[str, torch.Tensor]:
        """Return the whole weights on each rank, gathered one at a time."""
        from torch.distributed.tensor import DTensor

        model = self.plain_model
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {
            name: (whole_tensor(value) if isinstance(value, DTensor) else value).detach().cpu()
            for name, value in model.state_dict().items()
            if name in trained or not only_trained
        }

    def describe_shards(self, state: dict[str, Any]) -> None:
        """Note which part of each tensor this rank holds: the shards are uneven."""
        from megatron_fsdp.uneven_dtensor import preprocess_state_dict_for_uneven_dtensor

        preprocess_state_dict_for_uneven_dtensor(state)

    @contextmanager
    def generating(self) -> Iterator[Any]:
        """Gather the parameters as the wrapper's forward does, which ``generate`` bypasses."""
        self.wrapper.start_param_sync()
        yield self.plain_model


def whole_tensor(tensor: DTensor) -> torch.Tensor:
    """Return the whole of an unevenly sharded tensor on every rank; every rank of its mesh must call it."""
    import torch
    import torch.distributed as dist
    from megatron_fsdp.uneven_dtensor import gather_and_compute_chunk_metadata

    chunk = gather_and_compute_chunk_metadata(tensor)
    whole = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    place = tuple(slice(first, first + size) for first, size in zip(chunk.offsets, chunk.sizes, strict=True))
    whole[place] = tensor.to_local()
    # A sum of parts, not the package's gather of them: gloo gathers equal sizes alone.
    for axis, placement in enumerate(tensor.placements):
        if placement.is_shard():
            dist.all_reduce(whole, group=tensor.device_mesh.get_group(axis))
    return whole


def _give_empty_shards_a_gradient(wrapper: nn.Module) -> None:
    """Let every rank step every parameter, so that the optimizer's state has the same entries on all of them."""
    import torch
    from torch.distributed.tensor import DTensor

    for parameter in wrapper.parameters():
        is_empty = isinstance(parameter, DTensor) and parameter.to_local().numel() == 0
        if parameter.requires_grad and parameter.grad is None and is_empty:
            empty = torch.zeros_like(parameter.to_local())
            parameter.grad = DTensor.from_local(
                empty,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )


def _require_cuda_streams() -> None:
    import torch

    try:
        torch.cuda.current_stream()
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            "distributed=megatron_fsdp needs a CUDA device and none is usable here; distributed=fsdp2 shards on the CPU"
        ) from error
